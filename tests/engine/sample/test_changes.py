"""Objects of a picture repainted, moved and removed, and margins: what is drawn anew, and under which layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.sample
from engine.data.scenes import KnownLabels, Scene, read_entry, text_scene
from engine.sample.changes import Changes, Move, object_of, with_goals
from engine.sample.editing import Edit, Start, iterations_from, rows_alike, start_of_edit, starts_of_edits
from engine.sample.generate import ImageConditions
from engine.sample.holes import known_cells
from engine.sample.pipeline import StructMARPipeline
from models.frozen.vq import CodeCodec, VqConfig, build_vq
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.sampler import KnownTokens
from tests.helpers.family import family_model
from tests.helpers.tiny import CATEGORIES, CONFIG, World, write_world
from util.types import LayoutBatch

FAST = {"num_inference_steps": 3, "num_diffusion_steps": 3, "seed": 1}
DOG, OTHER_DOG, BALL = [0.0, 0.0, 0.25, 0.25], [0.5, 0.0, 0.75, 0.25], [0.0, 0.625, 0.25, 0.875]
AWAY = (0.625, 0.625, 0.875, 0.875)
QUICK = SamplingConfig(num_iter=5, num_sampling_steps=3, cfg_text=2.0, cfg_layout=3.0, clip_x0=3.0)


def picture(height: int = 32, width: int = 32, seed: int = 5) -> np.ndarray:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=draws).numpy().astype(np.uint8)


def some_scene(*edited: int, scales: tuple[float, ...] = (1, 1, 1)) -> Scene:
    """Two dogs and a ball."""
    labels = ("dog", "dog", "sports ball")
    objects: list[dict[str, Any]] = [
        {"label": label, "bbox": box, "scale": scale}
        for label, box, scale in zip(labels, (DOG, OTHER_DOG, BALL), scales, strict=True)
    ]
    for index in edited:
        objects[index]["edit"] = True
    return read_entry({"prompt": "two dogs", "objects": objects}, "entry 0", KnownLabels(CATEGORIES, 4))


def cells(*boxes: tuple[int, int, int, int], side: int = 8) -> np.ndarray:
    """x0, y0, x1, y1 in cells -> bool [rows, columns]."""
    found = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        found[y0:y1, x0:x1] = True
    return found


def of_cells(hole: np.ndarray, cell: int = 4) -> np.ndarray:
    """A hole of whole cells, cell by cell."""
    small = hole[::cell, ::cell]
    assert np.array_equal(small.repeat(cell, 0).repeat(cell, 1), hole)
    return small


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> StructMARPipeline:
    loaded = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    loaded.set_progress_bar_config(disable=True)
    return loaded


FIRST, SECOND, THIRD, GOAL = (0, 0, 2, 2), (4, 0, 6, 2), (0, 5, 2, 7), (5, 5, 7, 7)
CHANGED: dict[str, tuple[Changes, tuple[int, ...], np.ndarray, list[str]]] = {
    "all": (Changes(), (), cells(FIRST, SECOND, THIRD), ["dog", "dog", "sports ball"]),
    "marked": (Changes(), (1,), cells(SECOND), ["dog", "dog", "sports ball"]),
    "moved": (Changes(move=[Move("dog:2", AWAY)]), (), cells(SECOND, GOAL), ["dog", "dog", "sports ball"]),
    "removed": (Changes(remove=["dog:1"]), (), cells(FIRST), ["dog", "sports ball"]),
    "all three": (
        Changes(move=[Move("sports ball", AWAY)], remove=["dog:1"]), (1,), cells(FIRST, SECOND, THIRD, GOAL),
        ["dog", "sports ball"],
    ),
    "boxes": (Changes(edit_boxes=[(0.3, 0.3, 0.4, 0.4)]), (), cells((2, 2, 4, 4)), ["dog", "dog", "sports ball"]),
}  # fmt: skip


@pytest.mark.parametrize("way", CHANGED)
def test_what_is_drawn_anew(way: str) -> None:
    """Old cells, new cells, and the layout as it will be."""
    changes, edited, hole, names = CHANGED[way]
    scene, edit = changes.of(CONFIG, some_scene(*edited), picture(), "the image")
    assert np.array_equal(of_cells(edit.hole), hole) and edit.feather == 4
    assert scene.names == names and len(scene.layout) == len(names)
    boxes = {"moved": [DOG, list(AWAY), BALL], "removed": [OTHER_DOG, BALL], "all three": [OTHER_DOG, list(AWAY)]}
    assert scene.layout.boxes_xyxy.tolist() == boxes.get(way, [DOG, OTHER_DOG, BALL])
    assert scene.edited == {"marked": (1,), "all three": (0,)}.get(way, ())


def test_what_goes_with_an_object_stays_with_it() -> None:
    scene = with_goals(some_scene(scales=(1, 2, 3)), {0: None, 2: AWAY})
    assert scene.layout.scales == (2, 3) and scene.layout.categories.tolist() == [1, 2]
    phrased = replace(some_scene(), layout=replace(some_scene().layout, phrases=("red", "", "blue")))
    assert with_goals(phrased, {0: None}).layout.phrases == ("", "blue")
    nothing = with_goals(some_scene(), {0: None, 1: None, 2: None})
    assert len(nothing.layout) == 0 and nothing.names == []


def test_objects_by_name() -> None:
    scene = replace(some_scene(), names=["dog", "dog", "ratio 16:9"])
    assert [object_of(scene, name, "x") for name in ("dog:1", "dog:2", "ratio 16:9:1")] == [0, 1, 2]
    for name, message in (
        ("cat", "x: no object 'cat', there are 'dog', 'dog', 'ratio 16:9'"),
        ("dog", "x: 2 objects are 'dog': say dog:1 to dog:2"),
        ("dog:3", "x: no object 'dog:3', 2 of the objects are 'dog'"),
        ("dog:0", "x: no object 'dog:0'"),
    ):
        with pytest.raises(ValueError, match=message):
            object_of(scene, name, "x")


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Move("dog", (0.5, 0, 0.2, 1)), "move 'dog': 'bbox' needs x0 < x1"),
    (lambda: Move("dog", (0.5, 0, 2, 1)), "move 'dog': 'bbox' x1 = 2 is not in"),
    (lambda: Changes(edit_boxes=[AWAY], remove=["dog"]), "in one way what is drawn anew, got edit_boxes and remove"),
    (lambda: Changes(outpaint=(0, 1, -1, 0)), "outpaint must be cells from 0 on"),
]
CANNOT: list[tuple[Changes, Scene, str]] = [
    (Changes(), text_scene("a"), "photo: there is no object to draw anew"),
    (Changes(remove=["cat"]), some_scene(), "photo: no object 'cat'"),
    (Changes(remove=["dog:1"], move=[Move("dog:1", AWAY)]), some_scene(), "photo: 'dog:1' is moved or removed twice"),
    (Changes(edit_boxes=[AWAY]), some_scene(1), "photo: the layout marks what to edit, and so does edit_boxes"),
    (Changes(edit_boxes=[(0.1, 0.1, 0.9, 0.9)]), some_scene(), "and one cell of 4 px on all sides, leaves nothing"),
    (Changes(mask=np.zeros((32, 32), dtype=bool)), some_scene(), "photo: the mask has no hole"),
    (Changes(outpaint=(4, 0, 4, 0)), some_scene(), "photo: outpaint 4 0 4 0 leaves nothing of 8x8 cells"),
    (Changes(outpaint=(2, 0, 2, 0)), some_scene(), "leaves 16x32 px for an image of 32x32 px: choose a margin"),
    (Changes(outpaint=(0, 0, 0, 0)), some_scene(), "photo: the mask has no hole"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[each[1] for each in MISTAKES])
def test_changes_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("changes", "scene", "message"), CANNOT, ids=[each[2] for each in CANNOT])
def test_changes_that_the_picture_cannot_have(changes: Changes, scene: Scene, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changes.of(CONFIG, scene, picture(), "photo")


def test_a_margin_around_a_smaller_picture() -> None:
    own = picture(64, 64)
    _, edit = Changes(outpaint=(1, 2, 3, 2)).of(CONFIG, text_scene("a"), own, "photo")
    assert np.array_equal(of_cells(~edit.hole), cells((1, 2, 5, 6)))
    small = np.asarray(Image.fromarray(own).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(edit.picture[8:24, 4:20], small)
    assert np.array_equal(known_cells(edit.hole, 4).numpy().reshape(8, 8), cells((2, 3, 4, 5)))


def test_a_larger_canvas_leaves_the_picture_as_it_is() -> None:
    config = replace(CONFIG, learned_pos=False, rope_mode="full")
    own, scene = picture(), replace(text_scene("a"), size=(32, 48))
    _, edit = Changes(outpaint=(2, 0, 2, 0)).of(config, scene, own, "photo")
    assert edit.picture.shape == (32, 48, 3) and np.array_equal(edit.picture[:, 8:40], own)


def parts_of(head: str, trunk: str, pipe: StructMARPipeline) -> tuple[Any, Any]:
    model = family_model(trunk, head, num_categories=3)
    if head == "diffusion":
        return model, pipe.codec
    torch.manual_seed(3)
    return model, CodeCodec(build_vq(VqConfig((8, 8, 8), 1, 8, 20, 4, norm_num_groups=4)), "id")


@pytest.mark.parametrize("trunk", ["mae", "single"])
@pytest.mark.parametrize("head", ["diffusion", "discrete"])
def test_each_image_has_a_hole_of_its_own(pipe: StructMARPipeline, head: str, trunk: str) -> None:
    """Known tokens and pixels stay, and no image depends on the holes of the others."""
    model, codec = parts_of(head, trunk, pipe)
    ways = [Changes(move=[Move("dog:1", AWAY)]), Changes(remove=["sports ball"]), Changes(remove=["dog:1"])]
    pairs = [way.of(model.config, some_scene(), picture(seed=row), "a") for row, way in enumerate(ways)]
    starts = starts_of_edits(model, codec, [edit for _, edit in pairs])
    scenes = [scene for scene, _ in pairs]
    parts = StructMARPipeline.from_parts(model, codec, pipe.caption_encoder)
    parts._of_scenes = lambda given, _: layouts_of(model, given)  # type: ignore[method-assign]
    config = default_sampling(head, num_iter=3, **({"num_sampling_steps": 3} if head == "diffusion" else {}))
    together = parts.draw(scenes, config, [1, 2, 3], starts=starts)
    for row, (scene, edit) in enumerate(pairs):
        far = ~known_cells(edit.hole, 4).numpy().reshape(8, 8).repeat(4, 0).repeat(4, 1)
        assert np.array_equal(together[row][~far], edit.picture[~far])
        assert not np.array_equal(together[row][edit.hole], edit.picture[edit.hole])
        alone = parts.draw([scene], config, [row + 1], starts=[starts[row]])[0]
        assert np.abs(alone.astype(int) - together[row]).max() <= 1
    counts = [start.num_unknown for start in starts]
    assert counts[0] > counts[1] and counts[1] == 12 and counts[2] == 9


def layouts_of(model: Any, scenes: list[Scene]) -> Any:
    """Conditions without text, which this family's models do not have."""
    batch = LayoutBatch.collate([scene.layout for scene in scenes], model.config.max_objects)
    return lambda rows: ImageConditions(layout=batch.map(lambda tensor: tensor[rows]))


def start_with(num_unknown: int) -> Start:
    known = torch.arange(64)[None] >= num_unknown
    return Start(KnownTokens(torch.zeros(1, 64, 4), known), (8, 8))


def test_images_with_as_many_unknown_tokens_share_batches() -> None:
    starts, scenes = [start_with(count) for count in (9, 2, 9, 0)], [text_scene("a")] * 4
    assert rows_alike(CONFIG, scenes, starts) == [[0, 2], [1], [3]]
    assert rows_alike(CONFIG, scenes, None) == [[0, 1, 2, 3]]
    assert iterations_from(starts, 4, 2, QUICK) == (5 + 2) + 5
    assert iterations_from(None, 4, 3, QUICK) == 10


def test_what_several_images_share_is_encoded_once(pipe: StructMARPipeline) -> None:
    _, edit = Changes().of(CONFIG, some_scene(), picture(), "a")
    other = Edit(picture(seed=6), edit.hole)
    starts = starts_of_edits(pipe.model, pipe.codec, [edit, other, edit])
    assert starts[0] is starts[2] and starts[0] is not starts[1]
    again = start_of_edit(pipe.model, pipe.codec, edit)
    assert torch.equal(again.known.tokens, starts[0].known.tokens)


def test_a_call_moves_and_removes(pipe: StructMARPipeline) -> None:
    """The same image as by `draw`, for each prompt its own picture and change."""
    own = [picture(seed=1), picture(seed=2)]
    boxes, labels = [[DOG, BALL], [OTHER_DOG]], [["dog", "sports ball"], ["dog"]]
    move = [{"dog:1": list(AWAY)}, None]
    options: dict[str, Any] = {"move": move, "remove": [None, ["dog"]], "keep_pixels": False}
    images = pipe(["a", "b"], boxes, labels, **FAST, image=[Image.fromarray(each) for each in own], **options).images
    for row, way in enumerate(({"move": move[0]}, {"remove": ["dog"]})):
        arguments = FAST | {"seed": 1 + row, "image": own[row]} | way
        alone = np.asarray(pipe("ab"[row], boxes[row], labels[row], **arguments, keep_pixels=False).images[0])
        assert np.abs(np.asarray(images[row]).astype(int) - alone).max() <= 1
        kept = np.asarray(pipe("ab"[row], boxes[row], labels[row], **arguments).images[0])
        same = (kept == own[row]).all(-1)
        assert 0.25 < same.mean() < 1 and not (alone == own[row]).all(-1)[same].all()
    marked = pipe("a", [DOG, BALL], ["dog", "sports ball"], **FAST, image=own[0], edit=[False, True]).images[0]
    assert np.array_equal(np.asarray(marked)[:16], own[0][:16]) and not np.array_equal(np.asarray(marked), own[0])
    wide = pipe("a", [DOG], ["dog"], **FAST, image=picture(), outpaint=(2, 2, 2, 2)).images[0]
    assert np.asarray(wide).shape == (32, 32, 3)


CONTROLS: list[dict[str, Any]] = [
    {"layout_schedule": (0.8, 0.1)},
    {"layout_scale": 0.5, "negative_prompt": "a ball", "uncond_refresh": 2},
    {"mask_threshold": 0.2, "start_step": 1},
]


@pytest.mark.parametrize("options", CONTROLS, ids=["schedule", "strength and negative prompt", "auto guidance"])
def test_edits_under_controls(pipe: StructMARPipeline, options: dict[str, Any]) -> None:
    """In a batch of images with holes of several sizes each comes out as alone, and the control changes it."""
    own, boxes, labels = picture(), [[DOG, BALL]] * 2, [["dog", "sports ball"]] * 2
    call: dict[str, Any] = FAST | {"num_inference_steps": 4, "guidance_scale": 2.0, "layout_guidance_scale": 3.0}
    edits: dict[str, Any] = {"image": own, "remove": [["sports ball"], None], "edit": [None, [True, True]]}
    prompts = ["a dog and a sports ball", "a dog"]
    plain = pipe(prompts, boxes, labels, **call, **edits, output_type="latent").images
    together = pipe(prompts, boxes, labels, **call, **edits, **options, output_type="latent").images
    assert not torch.allclose(plain, together)
    for row, edit in enumerate(({"remove": ["sports ball"]}, {"edit": [True, True]})):
        one = call | options | edit | {"seed": 1 + row, "image": own}
        alone = pipe(prompts[row], boxes[row], labels[row], **one, output_type="latent").images
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"edit": [True]}, "2 boxes need as many values of edit, got 1"),
    ({"edit": "dog"}, "edit must be True or False for each box, got 'dog'"),
    ({"move": ["dog"]}, r"move must be like \{'dog:1'"),
    ({"move": {"dog": [0, 1]}}, "move 'dog': 'bbox' must be four numbers"),
    ({"remove": "dog"}, "remove must be a list"),
    ({"outpaint": (1, 2)}, "outpaint must be four whole numbers of cells"),
    ({"edit_boxes": [[0, 0, 1]]}, "edit_boxes, box 0: 'bbox' must be four numbers"),
    ({"keep_pixels": 1}, "keep_pixels must be True or False, got 1"),
    ({"image": [picture(), picture()]}, "image must be one for each of the 1 prompts"),
]


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=[each[1] for each in CALLS])
def test_calls_that_make_no_sense(pipe: StructMARPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a", [DOG, BALL], ["dog", "sports ball"], **FAST, **{"image": picture(), **arguments})


def command(world: World, folder: Path, scenes: list[Scene], *flags: str) -> list[str]:
    Image.fromarray(picture()).save(folder / "photo.png")
    (folder / "scene.json").write_text(json.dumps([scene.to_dict() for scene in scenes]))
    words = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--layout", str(folder / "scene.json")]
    return [*words, "--num_iter", "3", "--num_sampling_steps", "3", "--num_images", "2", *flags]


@pytest.mark.parametrize("way", ["edit", "move", "remove", "outpaint"])
def test_the_command(world: World, pipe: StructMARPipeline, tmp_path: Path, way: str) -> None:
    """Gives the images that the pipeline gives, and the list says which objects they show."""
    flags = {
        "edit": [],
        "move": ["--move", "dog:2", *map(str, AWAY)],
        "remove": ["--remove", "dog:1"],
        "outpaint": ["--outpaint", "2", "1", "2", "3"],
    }[way]
    call: dict[str, Any] = {
        "edit": {"edit": [False, False, True]},
        "move": {"move": {"dog:2": AWAY}},
        "remove": {"remove": ["dog:1"]},
        "outpaint": {"outpaint": (2, 1, 2, 3)},
    }[way]
    scene = some_scene(*([2] if way == "edit" else []))
    words = command(world, tmp_path, [scene], "--image", str(tmp_path / "photo.png"), *flags)
    scripts.sample.main([*words, "--output_dir", str(tmp_path / "out"), "--seed", "1"])
    options = FAST | {"boxes": [DOG, OTHER_DOG, BALL], "phrases": scene.names, "num_images_per_prompt": 2} | call
    expected = pipe("two dogs", image=picture(), **options).images
    for index, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{index:04d}.png")), np.asarray(image))
    listed = json.loads((tmp_path / "out" / "samples.json").read_text())["images"][0]["objects"]
    assert len(listed) == (2 if way == "remove" else 3)
    assert (listed[1]["bbox"] == list(AWAY)) == (way == "move")


FLAGS: list[tuple[list[str], str]] = [
    (["--image", "PHOTO", "--move", "dog:1", "0", "0", "1"], "--move takes LABEL:n x0 y0 x1 y1 .*, got 4 words"),
    (["--image", "PHOTO", "--move", "dog:1", "0", "0", "1", "x"], "--move dog:1 takes four numbers, .* '0 0 1 x'"),
    (["--image", "PHOTO", "--move", "dog:1", "0", "0", "1", "2"], "move 'dog:1': 'bbox' y1 = 2"),
    (["--image", "PHOTO", "--remove", "dog:9"], r"photo\.png: no object 'dog:9'"),
    (["--image", "PHOTO", "--outpaint", "8", "0", "0", "0"], "outpaint 8 0 0 0 leaves nothing"),
    ([], "scene.json: 'edit' needs --image"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[each[1] for each in FLAGS])
def test_flags_that_make_no_sense(world: World, tmp_path: Path, flags: list[str], message: str) -> None:
    """Found before anything is written."""
    words = command(world, tmp_path, [some_scene(*([] if flags else [1]))])
    given = [str(tmp_path / "photo.png") if word == "PHOTO" else word for word in flags]
    with pytest.raises(SystemExit, match=message):
        scripts.sample.main([*words, *given, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_of_several_scenes(world: World, tmp_path: Path) -> None:
    """Each has its own hole in the picture."""
    scenes = [some_scene(0), some_scene(1, 2)]
    words = command(world, tmp_path, scenes, "--image", str(tmp_path / "photo.png"), "--num_images", "1")
    scripts.sample.main([*words, "--output_dir", str(tmp_path / "out")])
    drawn = [np.asarray(Image.open(tmp_path / "out" / name)) for name in ("0000.png", "0001.png")]
    own = picture()
    assert np.array_equal(drawn[0][12:], own[12:]) and not np.array_equal(drawn[0][:8, :8], own[:8, :8])
    assert np.array_equal(drawn[1][:12, :12], own[:12, :12]) and not np.array_equal(drawn[1][20:28, :8], own[20:28, :8])
