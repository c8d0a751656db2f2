"""Several sizes and aspect ratios from one checkpoint, as a user meets them: training, pipeline, scripts.sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_mar
import scripts.sample
from engine.data.scenes import text_scene
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import argv, load_checkpoint, read_metrics, write_world

SIZES = {"sizes": "32x32 48x32 32x48", "learned_pos": False, "train_mode": "full", "warmup_epochs": 0, "log_freq": 1}


def flags(root: Path, output: str, **changes: object) -> list[str]:
    values = SIZES | changes
    sizes, learned_pos = values.pop("sizes"), values.pop("learned_pos")
    words = argv(root, output, **values)
    words += ["--sizes", *str(sizes).split()] if sizes else []
    return words if learned_pos else [*words, "--no-learned_pos"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("sizes"))


@pytest.mark.parametrize("first", [3, 5])
def test_stopped_within_an_epoch_it_is_the_run_that_never_stopped(world: Path, first: int) -> None:
    """9 images, 4 batches of 2 an epoch: both stops lie within one."""
    whole, cut = f"whole{first}", f"cut{first}"
    assert main_mar.main(flags(world, whole, max_steps=7)) == 0
    assert main_mar.main(flags(world, cut, max_steps=first)) == 0
    assert main_mar.main(flags(world, cut, max_steps=7)) == 0
    one, other = load_checkpoint(world, whole), load_checkpoint(world, cut)
    assert (one["epoch"], one["images_in_epoch"]) == (1, 6)
    for state in (one, other):
        del state["args"]
    assert_same(one, other)
    assert [line["loss"] for line in read_metrics(world, whole)] == [line["loss"] for line in read_metrics(world, cut)]


def test_another_batch_size_goes_on_with_the_images_that_are_left(world: Path) -> None:
    assert main_mar.main(flags(world, "batches", max_steps=2)) == 0
    assert main_mar.main(flags(world, "batches", batch_size=1, max_steps=4)) == 0
    state = load_checkpoint(world, "batches")
    assert (state["epoch"], state["images_in_epoch"]) == (0, 6)
    assert state["buckets"]["stretches"] == [[0, 2], [4, 1]]


def test_sizes_do_not_change_within_an_epoch(world: Path) -> None:
    assert main_mar.main(flags(world, "changed", max_steps=1)) == 0
    for sizes in ("32x32 48x32", ""):
        with pytest.raises(SystemExit, match=r"checkpoint-last\.pth: image 2 .* sizes can only change between epochs"):
            main_mar.main(flags(world, "changed", sizes=sizes, max_steps=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_pos": True}, "--sizes: learned positions are of one size alone, add --no-learned_pos"),
        ({"sizes": "32x36"}, "a picture of 32x36 px (height x width): both must be multiples of vae_stride x "),
        ({"sizes": "32"}, "--sizes must be HEIGHTxWIDTH in pixels, like 96x64, got '32'"),
        ({"buckets": True}, "--buckets are the sizes of --img_size 32: they do not go with --sizes"),
        ({"sizes": "", "buckets": True, "learned_pos": True}, "--buckets: learned positions are of one size alone"),
    ],
)
def test_what_does_not_go_together(
    world: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main_mar.main(flags(world, "refused", **changes))
    assert message in f"{caught.value}{capsys.readouterr().err}"
    assert not (world / "refused").exists()


def test_buckets_are_those_of_the_picture_size(world: Path) -> None:
    assert main_mar.main(flags(world, "buckets", sizes="", buckets=True, max_steps=1)) == 0
    sizes = load_checkpoint(world, "buckets")["buckets"]["sizes"]
    assert [32, 32] in sizes
    assert [16, 64] in sizes


# --- sampling ------------------------------------------------------------------------------------------------------

FAST = {"num_iter": 3, "num_sampling_steps": 3}
CONFIG = SamplingConfig(**FAST, cfg_text=2.0, cfg_layout=3.0)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """After two steps on three sizes, which the model is told."""
    assert main_mar.main(flags(world, "trained", size_condition=True, batch_size=3, max_steps=2)) == 0
    return world / "trained" / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def pipe(world: Path, trained: Path) -> StructMARPipeline:
    return StructMARPipeline.from_checkpoint(trained, world / "vae.ckpt", world / "clip")


def test_two_steps_teach_the_size_condition(world: Path, trained: Path) -> None:
    weights = load_checkpoint(world, "trained")["model"]
    assert weights["size_embed.mlp.2.weight"].abs().sum() > 0


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 48), (16, 64)])
def test_a_call_gives_images_of_the_size_asked_for(pipe: StructMARPipeline, size: tuple[int, int]) -> None:
    box = {"boxes": [[0.1, 0.2, 0.6, 0.9]], "phrases": [pipe.labels[0]]}
    options = {"num_inference_steps": 3, "num_diffusion_steps": 3, "seed": 4}
    image = pipe("a dog", **box, **options, height=size[0], width=size[1]).images[0]
    assert image.size == size[::-1]
    assert np.asarray(image).std() > 0
    if size == (32, 32):
        assert np.array_equal(np.asarray(image), np.asarray(pipe("a dog", **box, **options).images[0]))


def test_what_a_call_refuses(pipe: StructMARPipeline) -> None:
    with pytest.raises(ValueError, match="a picture of 32x36 px"):
        pipe("a dog", height=32, width=36)
    with pytest.raises(ValueError, match="height must be a whole number from 1 on, got 0"):
        pipe("a dog", height=0)
    with pytest.raises(ValueError, match="num_inference_steps 3 exceeds the 2 tokens of an image"):
        pipe("a dog", height=8, width=16, num_inference_steps=3)


def test_scenes_of_many_sizes_are_drawn_as_each_alone(pipe: StructMARPipeline) -> None:
    sizes = [(32, 48), None, (48, 32), (32, 48), None]
    scenes = [replace(text_scene(f"a {word}"), size=size) for word, size in zip("abcde", sizes, strict=True)]
    ticks: list[int] = []
    together = pipe.draw(scenes, CONFIG, range(5), batch_size=2, progress=lambda: ticks.append(1))
    assert [picture.shape[:2] for picture in together] == [size or (32, 32) for size in sizes]
    assert len(ticks) == 3 * CONFIG.num_iter
    for row, scene in enumerate(scenes):
        alone = pipe.draw([scene], CONFIG, [row])[0]
        assert np.abs(alone.astype(int) - together[row]).max() <= 1


def test_an_edited_picture_has_its_own_size(pipe: StructMARPipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    hole = np.zeros((48, 32), dtype=bool)
    hole[30:] = True
    options = {"num_inference_steps": 2, "num_diffusion_steps": 2, "seed": 1, "image": picture, "mask": hole}
    edited = np.asarray(pipe("a dog", **options).images[0])
    assert edited.shape == (48, 32, 3)
    assert np.array_equal(edited[~hole], picture[~hole])
    assert np.array_equal(edited, np.asarray(pipe("a dog", **options, height=48, width=32).images[0]))
    with pytest.raises(ValueError, match="size 32x32: what the images start from has 6 x 4 tokens"):
        pipe("a dog", **options, height=32, width=32)


def test_an_interrupted_call_keeps_its_size(pipe: StructMARPipeline) -> None:
    def stop(pipe: StructMARPipeline, *_: object) -> None:
        pipe.interrupt = True

    options = {"num_inference_steps": 3, "num_diffusion_steps": 3, "batch_size": 1, "callback_on_step_end": stop}
    latents = pipe(["a", "b"], **options, height=48, width=32, output_type="latent").images
    assert latents.shape[2:] == (6, 4)
    assert not latents[1].any()


def sampled(world: Path, checkpoint: Path, output: Path, *words: str) -> list[Image.Image]:
    frozen = ["--vae_path", str(world / "vae.ckpt"), "--clip_path", str(world / "clip"), "--device", "cpu"]
    fast = [word for name, value in FAST.items() for word in (f"--{name}", str(value))]
    scripts.sample.main(["--resume", str(checkpoint), *frozen, *fast, "--output_dir", str(output), *words])
    return [Image.open(path) for path in sorted(output.glob("0*.png"))]


def test_the_program_samples_all_three_sizes(world: Path, trained: Path, tmp_path: Path) -> None:
    for number, size in enumerate(("32x32", "48x32", "32x48")):
        out = tmp_path / str(number)
        (image,) = sampled(world, trained, out, "--prompt", "a dog", "--size", size, "--num_images", "1")
        assert f"{image.height}x{image.width}" == size
        (entry,) = json.loads((out / "samples.json").read_text())["images"]
        assert f"{entry['height']}x{entry['width']}" == size


def test_a_layout_files_entries_have_their_own_sizes(world: Path, trained: Path, tmp_path: Path) -> None:
    objects = [{"label": "tomato", "bbox": [0.1, 0.1, 0.6, 0.5]}]
    sizes = [{"height": 48, "width": 32}, {}, {"height": 32, "width": 48}, {"height": 48, "width": 32}]
    entries = [{"prompt": "a dog", "objects": objects, **size} for size in sizes]
    (tmp_path / "layout.json").write_text(json.dumps(entries))
    words = ["--layout", str(tmp_path / "layout.json"), "--num_images", "1"]
    images = sampled(world, trained, tmp_path / "out", *words)
    assert [image.size for image in images] == [(32, 48), (32, 32), (48, 32), (32, 48)]
    listed = json.loads((tmp_path / "out" / "samples.json").read_text())["images"]
    assert [{key: each[key] for key in ("height", "width") if key in each} for each in listed] == sizes
    images = sampled(world, trained, tmp_path / "one", *words, "--size", "32x64")
    assert {image.size for image in images} == {(64, 32)}


def test_positions_may_be_scaled(world: Path, trained: Path, tmp_path: Path) -> None:
    words = ["--prompt", "a dog", "--num_images", "1", "--size"]
    pictures = {}
    for scale in ("index", "fit"):
        for size in ("32x32", "64x64"):
            (image,) = sampled(world, trained, tmp_path / f"{scale}{size}", *words, size, "--rope_scale", scale)
            pictures[scale, size] = np.asarray(image)
    assert np.array_equal(pictures["index", "32x32"], pictures["fit", "32x32"])
    assert not np.array_equal(pictures["index", "64x64"], pictures["fit", "64x64"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"height": 48}, "entry 0: 'width' must be a whole number of pixels from 1 to 4096, got None"),
        ({"height": 48, "width": "32"}, "entry 0: 'width' must be a whole number of pixels from 1 to 4096, got '32'"),
        ({"height": 5000, "width": 32}, "'height' must be a whole number of pixels from 1 to 4096, got 5000"),
        ({"height": 36, "width": 32}, "a picture of 36x32 px (height x width): both must be multiples"),
    ],
)
def test_sizes_of_a_layout_file_are_checked(
    world: Path, trained: Path, tmp_path: Path, entry: dict[str, object], message: str
) -> None:
    (tmp_path / "layout.json").write_text(json.dumps({"prompt": "a dog", "objects": [], **entry}))
    with pytest.raises(SystemExit) as caught:
        sampled(world, trained, tmp_path / "out", "--layout", str(tmp_path / "layout.json"))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_learned_positions_are_of_one_size(world: Path, tmp_path: Path) -> None:
    assert main_mar.main(argv(world, "learned", max_steps=1)) == 0
    checkpoint = world / "learned" / "checkpoint-last.pth"
    with pytest.raises(SystemExit, match="other grids need a model with learned_pos=False"):
        sampled(world, checkpoint, tmp_path / "out", "--prompt", "a dog", "--size", "48x32")
    sampled(world, checkpoint, tmp_path / "same", "--prompt", "a dog", "--size", "32x32")
