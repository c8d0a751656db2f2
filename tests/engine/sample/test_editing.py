"""In- and outpainting, and what a picture or codes begin: which tokens are known, and what stays of the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.sample
from engine.sample.editing import Edit, start_of_edit, start_of_prefix
from engine.sample.holes import drawn_share, hole_of_boxes, hole_of_cells, known_cells
from engine.sample.pipeline import StructMARPipeline
from models.frozen.vq import CodeCodec, VqConfig, build_vq
from tests.helpers.family import family_model
from tests.helpers.tiny import World, write_world
from util.images import to_model_range

FAST = {"num_inference_steps": 3, "num_diffusion_steps": 3, "seed": 1}


def picture(height: int = 32, width: int = 32) -> np.ndarray:
    draws = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (height, width, 3), generator=draws).numpy().astype(np.uint8)


def some_hole(height: int = 32, width: int = 32) -> np.ndarray:
    hole = np.zeros((height, width), dtype=bool)
    hole[9:14, 18:21] = True
    return hole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> StructMARPipeline:
    loaded = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def code_parts(trunk: str, patch_size: int) -> tuple[Any, CodeCodec]:
    torch.manual_seed(3)
    network = build_vq(VqConfig((8, 8, 8), 1, 8, 20, 4, norm_num_groups=4))
    return family_model(trunk, patch_size=patch_size), CodeCodec(network, "id")


def test_known_cells_are_those_away_from_the_hole() -> None:
    """By hand: the hole lies in rows 2 and 3, columns 4 and 5 of cells of 4 px; a cell more on all sides is unknown."""
    known = known_cells(some_hole(), 4).view(8, 8)
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[1:5, 3:7] = False
    assert torch.equal(known, expected)
    corner = np.zeros((16, 24), dtype=bool)
    corner[0, 0] = True
    assert known_cells(corner, 8).tolist() == [False, False, True, False, False, True]


def test_boxes_as_holes() -> None:
    hole = hole_of_boxes([(0.25, 0.5, 0.75, 1.0)], (8, 16))
    assert hole.sum() == 4 * 8 and hole[4:, 4:12].all()
    assert hole_of_boxes([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], (8, 16)).sum() == 64


def test_boxes_as_cells() -> None:
    """[.25, .25, .5, .5] of 16 x 16 cells touches 4 x 4; with the cell around them that is hidden too, 6 x 6."""
    hole = hole_of_cells([(0.25, 0.25, 0.5, 0.5)], (64, 64), 4)
    assert hole.sum() == 16 * 4 * 4 and hole[16:32, 16:32].all()
    assert int((~known_cells(hole, 4)).sum()) == 36
    for box, rows, columns in (
        ((0.26, 0.2, 0.49, 0.51), (4, 20), (8, 16)),  # all that it touches
        ((0.0, 0.99, 0.01, 1.0), (28, 32), (0, 4)),
        (tuple(np.float32([0.375, 0.3, 0.625, 0.7]).tolist()), (8, 24), (12, 20)),
        ((1 - 1e-6, 0.0, 1.0, 1e-6), (0, 4), (28, 32)),  # smaller than the rounding
    ):
        found = np.argwhere(hole_of_cells([box], (32, 32), 4))
        assert (found.min(0).tolist(), (found.max(0) + 1).tolist()) == ([rows[0], columns[0]], [rows[1], columns[1]])
    tenths = hole_of_cells([(np.float32(0.3), np.float32(0.1), np.float32(0.7), np.float32(0.6))], (40, 40), 4)
    assert tenths.sum() == 4 * 5 * 16  # rounding touches no cell more
    with pytest.raises(ValueError, match=r"box 0.5 0 0.5 1 has no inside"):
        hole_of_cells([(0.5, 0, 0.5, 1)], (32, 32), 4)


def test_the_picture_passes_into_what_is_drawn() -> None:
    """By hand, over four pixels: .8, .6, .4, .2, then as it was."""
    hole = np.zeros((16, 16), dtype=bool)
    hole[4:8, 4:8] = True
    share = drawn_share(hole, 4)
    np.testing.assert_allclose(share[5, 4:14], [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-6)
    assert share[12, 12] == 0 and share[[11, 0], [11, 5]] == pytest.approx(0.2)
    assert np.array_equal(drawn_share(hole, 0), hole)
    own = picture(16, 16)
    drawn = to_model_range(picture(32, 32)[16:, 16:])
    shown = Edit(own, hole, feather=4).put_back(drawn[None].repeat(2, 1, 1, 1))
    assert torch.equal(shown[1][:, hole], drawn[:, hole])
    assert torch.equal(shown[0][:, share == 0], to_model_range(own)[:, share == 0])
    edge = torch.lerp(to_model_range(own)[:, 5, 9], drawn[:, 5, 9], 0.6)
    torch.testing.assert_close(shown[0][:, 5, 9], edge)
    assert torch.equal(Edit(own, hole, 4, keep_pixels=False).put_back(drawn), drawn)


def test_the_filling_is_the_mean_of_what_stays() -> None:
    edit = Edit(picture(), some_hole())
    filled, own = edit.filled(), to_model_range(edit.picture)
    hole = torch.from_numpy(edit.hole)
    assert torch.equal(filled[:, ~hole], own[:, ~hole])
    torch.testing.assert_close(filled[:, hole], own[:, ~hole].mean(1, keepdim=True).expand(-1, int(hole.sum())))


REFUSED: list[tuple[np.ndarray, np.ndarray, str]] = [
    (picture(), some_hole(32, 40), "the mask is 40x32 px, but the image is 32x32 px"),
    (picture(), np.zeros((32, 32), dtype=bool), "nothing to draw"),
    (picture(), np.ones((32, 32), dtype=bool), "leaves nothing of the image"),
]


@pytest.mark.parametrize(("image", "hole", "message"), REFUSED, ids=[each[2] for each in REFUSED])
def test_edits_that_make_no_sense(image: np.ndarray, hole: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit(image, hole)


def test_a_call_keeps_the_pixels_outside_the_hole(pipe: StructMARPipeline) -> None:
    """And draws those inside by caption, boxes and seed."""
    own, hole = picture(), some_hole()
    given: dict[str, Any] = {"image": Image.fromarray(own), "mask": Image.fromarray(hole)}
    drawn = [np.asarray(pipe("a dog", **FAST | {"seed": seed}, **given).images[0]) for seed in (1, 2)]
    assert np.array_equal(drawn[0][~hole], own[~hole]) and np.array_equal(drawn[1][~hole], own[~hole])
    assert not np.array_equal(drawn[0][hole], own[hole]) and not np.array_equal(drawn[0][hole], drawn[1][hole])
    latents = pipe("a dog", **FAST, output_type="latent", image=own, mask=hole).images
    start = start_of_edit(pipe.model, pipe.codec, Edit(own, hole))
    tokens, known = pipe.model.patchify(latents), start.known.known
    assert torch.equal(tokens[known], start.known.tokens[known]) and not torch.equal(tokens, start.known.tokens)
    tensor = pipe("a dog", **FAST, output_type="pt", image=own, mask=hole, num_images_per_prompt=3).images
    assert tensor.shape == (3, 3, 32, 32)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"image": picture()}, "the image: there is no object to draw anew, the layout has no boxes"),
    ({"mask": some_hole()}, "mask needs image"),
    ({"keep_pixels": False}, "keep_pixels needs image"),
    ({"image": picture(30, 32), "mask": some_hole(30, 32)}, "is 32x30 px, which are no whole tokens of 4x4 px"),
    ({"image": picture(40, 32), "mask": some_hole(40, 32)}, "is 32x40 px, but this model draws pictures of 32x32 px"),
    ({"image": picture()[..., 0], "mask": some_hole()}, r"image must be uint8 \[H, W, 3\], got uint8 \[32, 32\]"),
    ({"image": picture(), "mask": some_hole().astype(float)}, r"or bool \[H, W\], got float64 \[32, 32\]"),
]


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=[each[1] for each in CALLS])
def test_calls_that_make_no_sense(pipe: StructMARPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a dog", **FAST, **arguments)


@pytest.mark.parametrize("trunk", ["mae", "single"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_codes_of_a_picture(trunk: str, patch_size: int) -> None:
    """Codes that are hidden on their own have cells of their own size."""
    model, codec = code_parts(trunk, patch_size)
    start = start_of_edit(model, codec, Edit(picture(), some_hole()))
    side = 8 if trunk == "single" or patch_size == 1 else 4
    assert start.known.known.shape == (1, side**2) and start.grid == model.config.grid
    expected = torch.ones(side, side, dtype=torch.bool)
    expected[slice(1, 5) if side == 8 else slice(0, 3), slice(3, 7) if side == 8 else slice(1, 4)] = False
    assert torch.equal(start.known.known.view(side, side), expected)
    tokens = start.known.tokens
    assert torch.equal(tokens, tokens.round()) and tokens.min() >= 0 and tokens.max() < 20


def test_prefixes_of_pictures_and_of_codes(tmp_path: Path) -> None:
    model, codec = code_parts("single", 2)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    start = start_of_prefix(model, codec, str(tmp_path / "a.png"), 10)
    assert start.known.known[0].tolist() == [True] * 10 + [False] * 54 and start.edit is None
    np.save(tmp_path / "codes.npy", start.known.tokens.numpy().astype(np.int16))
    again = start_of_prefix(model, codec, str(tmp_path / "codes.npy"), 10)
    assert torch.equal(again.known.tokens[:, :10], start.known.tokens[:, :10])

    for content, message in (
        (np.arange(5), "are 5, but --prefix_k 10 asks for 10"),
        (np.arange(15, 30), "go from 15 to 24, the codebook has 20"),
        (np.zeros(20), "must be whole numbers, got float64"),
    ):
        np.save(tmp_path / "bad.npy", content)
        with pytest.raises(ValueError, match=rf"bad\.npy {message}"):
            start_of_prefix(model, codec, str(tmp_path / "bad.npy"), 10)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"bad\.npy is no array of numpy"):
        start_of_prefix(model, codec, str(tmp_path / "bad.npy"), 10)
    Image.fromarray(picture(40, 32)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 32x40 px, the prefix is of 32x32 px"):
        start_of_prefix(model, codec, str(tmp_path / "b.png"), 10)


@pytest.mark.parametrize("way", ["mask", "edit_boxes", "keep_boxes"])
def test_the_command(world: World, tmp_path: Path, way: str) -> None:
    """By a mask or by boxes; the part that stays is as it was."""
    own, hole = picture(), some_hole()
    Image.fromarray(own).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    box = [0.25, 0.25, 0.75, 0.5]
    if way == "keep_boxes":
        hole = ~hole_of_boxes([box], (32, 32))
    if way == "edit_boxes":  # and a cell around the cells that it touches
        hole = np.zeros((32, 32), dtype=bool)
        hole[4:20, 4:28] = True
    value = [str(tmp_path / "mask.png")] if way == "mask" else [str(each) for each in box]
    flags = ["--image", str(tmp_path / "photo.png"), f"--{way}", *value, "--num_iter", "3", "--num_sampling_steps", "3"]
    scripts.sample.main(
        ["--resume", str(world.checkpoint), *world.frozen_flags(), "--prompt", "a dog", "--num_images", "2", *flags,
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    for name in ("0000.png", "0001.png"):
        drawn = np.asarray(Image.open(tmp_path / "out" / name))
        assert np.array_equal(drawn[~hole], own[~hole]) and not np.array_equal(drawn[hole], own[hole])
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]["image"].endswith("photo.png")


FLAGS: list[tuple[list[str], str]] = [
    (["--image", "PHOTO"], "--image without one of --mask, --edit_boxes, .*--remove needs --layout, the objects of"),
    (["--image", "PHOTO", "--move", "dog", "0", "0", "1", "1"], "--move needs --layout, the objects of the picture"),
    (["--edit_boxes", "0", "0", "1", "1"], "--edit_boxes needs --image, the picture that it changes"),
    (["--no-keep_pixels"], "--no-keep_pixels needs --image"),
    (["--image", "PHOTO", "--mask", "PHOTO", "--remove", "dog"], "in one way .*, got --mask and --remove"),
    (["--image", "PHOTO", "--edit_boxes", "0", "0", "1"], "--edit_boxes takes four numbers a box, .* got 3 numbers"),
    (["--image", "PHOTO", "--edit_boxes", "0", "0", "1", "0"], "box 0 0 1 0 has no inside"),
    (["--image", "PHOTO", "--mask", "nowhere.png"], "nowhere.png"),
    (["--image", "PHOTO", "--mask", "PHOTO", "--prefix_k", "3"], "--prefix_k 3 does not go with --image"),
    (["--prefix_source", "PHOTO"], "needs --prefix_k, how many tokens of it are taken"),
    (["--prefix_source", "CODES", "--prefix_k", "3"], "begin no picture of a diffusion head: give an image"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[each[1] for each in FLAGS])
def test_flags_that_make_no_sense(world: World, tmp_path: Path, flags: list[str], message: str) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    np.save(tmp_path / "codes.npy", np.zeros(9, dtype=np.int64))
    names = {"PHOTO": str(tmp_path / "photo.png"), "CODES": str(tmp_path / "codes.npy")}
    words = [names.get(word, word) for word in flags]
    plain = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--prompt", "a dog", "--num_iter", "3"]
    with pytest.raises(SystemExit, match=message):
        scripts.sample.main([*plain, *words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_prefix_by_the_command(world: World, tmp_path: Path) -> None:
    """Drawn token by token, or of a picture."""
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    for source in ("self", str(tmp_path / "photo.png")):
        scripts.sample.main(
            ["--resume", str(world.checkpoint), *world.frozen_flags(), "--prompt", "a dog", "--num_images", "1",
             "--num_iter", "3", "--num_sampling_steps", "2", "--prefix_k", "4", "--prefix_source", source,
             "--output_dir", str(tmp_path / "out")]
        )  # fmt: skip
        assert np.asarray(Image.open(tmp_path / "out" / "0000.png")).shape == (32, 32, 3)
