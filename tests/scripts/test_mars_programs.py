"""MARS from a checkpoint to pictures, captions and pages: what is written, what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.caption
import scripts.export_weights
import scripts.sample
import scripts.tell
from engine.checkpoint.mars_weights import export_mars, is_mars_file, load_mars, read_mars_file, read_mars_identity
from engine.cli.arguments_mars_sample import GUIDANCE
from engine.sample.mars import MarsPipeline
from models.mars.sampling import DrawOptions
from tests.helpers.lm_files import write_lm
from tests.helpers.mars_run import write_mars_world
from tests.helpers.mars_world import MAX_TOKENS, SIDE, MarsWorld, tiny_model, write_mars, write_upscaler
from tests.helpers.scene_files import write_coco
from util.checkpoint import load_plain, safetensors_metadata, save_atomic
from util.coco import CocoIndex
from util.images import center_crop, load_image, read_png_text, save_png

PROMPT = "a red dog"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> MarsWorld:
    return write_mars(tmp_path_factory.mktemp("mars"))


@pytest.fixture(scope="module")
def pipe(world: MarsWorld) -> MarsPipeline:
    return MarsPipeline.from_checkpoint(world.checkpoint, world.lm, world.vq)


@pytest.fixture
def sample(world: MarsWorld, tmp_path: Path) -> Callable[..., Path]:
    def run(*flags: str, resume: Path | None = None, output: str = "out") -> Path:
        scripts.sample.main([*world.flags(resume), "--output_dir", str(tmp_path / output), *flags])
        return tmp_path / output

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """One of the model's size, one larger and oblong."""
    draws = np.random.default_rng(0)
    paths = [tmp_path / "own.png", tmp_path / "larger.png"]
    for path, size in zip(paths, ((SIDE, SIDE), (3 * SIDE, 2 * SIDE)), strict=True):
        save_png(draws.integers(256, size=(*size, 3), dtype=np.uint8), path, {})
    return paths


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_exported_file_draws_the_same_and_has_no_weight_of_the_language_model(sample, world, tmp_path) -> None:
    file = tmp_path / "mars.safetensors"
    scripts.export_weights.main(["--resume", str(world.checkpoint), "--output", str(file)])
    assert {name.startswith("visual_") or ".visual." in name for name in load_plain(file)} == {True}
    assert load_plain(file).keys() == load_plain(world.checkpoint)["model"].keys()
    assert json.loads(safetensors_metadata(file)["mars"]) == load_plain(world.checkpoint)["mars"]
    assert read_mars_identity(file) == read_mars_identity(world.checkpoint)
    flags = ("--prompt", PROMPT, "--num_images", "2")
    before, after = sample(*flags, output="before"), sample(*flags, resume=file, output="after")
    assert all(np.array_equal(pixels(before / name), pixels(after / name)) for name in ("0000.png", "0001.png"))
    assert not np.array_equal(pixels(before / "0000.png"), pixels(before / "0001.png"))


def test_reloaded_weights_are_those_of_the_model(world) -> None:
    model, _ = tiny_model(world)
    loaded = load_mars(world.checkpoint, world.lm, world.vq)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())
    assert loaded.words.max_tokens == MAX_TOKENS and not loaded.model.training


def test_averaged_weights_are_taken_where_there_are_some(world, tmp_path) -> None:
    content = load_plain(world.checkpoint)
    content["model_ema"] = {"visual_head.weight": torch.ones_like(content["model"]["visual_head.weight"])}
    save_atomic(content, tmp_path / "both.pth")
    for flag, file in (("--ema", "ema"), ("--no-ema", "raw")):
        output = tmp_path / f"{file}.safetensors"
        scripts.export_weights.main(["--resume", str(tmp_path / "both.pth"), "--output", str(output), flag])
        assert safetensors_metadata(output)["weights"] == file
        assert bool((load_plain(output)["visual_head.weight"] == 1).all()) == (file == "ema")


def test_pictures_tell_how_they_were_made_and_do_not_depend_on_the_batch(sample, pipe) -> None:
    out = sample(
        "--prompt", PROMPT, "--num_images", "3", "--seed", "5", "--cfg", "2", "--top_k", "9", "--batch_size", "2"
    )
    content = json.loads((out / "samples.json").read_text())
    assert [image["seed"] for image in content["images"]] == [5, 6, 7]
    assert content["sampling"]["guidance"] == 2 and content["sampling"]["top_k"] == 9
    assert content["checkpoint"]["base_type"] == "qwen2" and content["checkpoint"]["step"] == 7
    assert read_png_text(out / "0001.png")["prompt"] == PROMPT
    (alone,) = pipe.draw([PROMPT], [6], DrawOptions(guidance=2, top_k=9))
    assert np.array_equal(pixels(out / "0001.png"), alone)
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"000{k}.png" for k in range(3)),
        "grid.png",
        "samples.json",
    ]


@pytest.mark.parametrize(
    ("flags", "used"), [((), GUIDANCE), (("--cfg", "1"), 1), (("--cfg", "2", "--cfg_text", "3"), 3)]
)
def test_settings_name_the_guidance_that_is_used(sample, flags, used) -> None:
    out = sample("--prompt", PROMPT, "--num_images", "1", *flags)
    content = json.loads((out / "samples.json").read_text())
    told = read_png_text(out / "0000.png")
    assert {content["settings"]["cfg"], content["sampling"]["guidance"]} == {used}
    assert {json.loads(told["settings"])["cfg"], json.loads(told["sampling"])["guidance"]} == {used}


def test_help_names_the_guidance_of_mars() -> None:
    assert DrawOptions().guidance == GUIDANCE
    assert f"--cfg {GUIDANCE:g} unless" in " ".join(scripts.sample.get_parser().format_help().split())


def test_captions_of_a_dataset_and_another_size(sample, tmp_path) -> None:
    write_coco(tmp_path / "coco")
    source = ("--coco_root", str(tmp_path / "coco"), "--coco_split", "val2017", "--num_images", "2")
    out = sample(*source, "--size", f"{SIDE}x{2 * SIDE}")
    images = json.loads((out / "samples.json").read_text())["images"]
    assert [image["prompt"] for image in images] == ["caption 0 of 1", "caption 0 of 3"]
    assert [image["objects"] for image in images] == [[], []]
    assert pixels(out / "0000.png").shape == (SIDE, 2 * SIDE, 3)


def test_a_small_picture_is_drawn_then_a_large_one(sample, world, pipe, tmp_path) -> None:
    file = write_upscaler(world, tmp_path / "upscale.pth")
    flags = ("--prompt", PROMPT, "--num_images", "2", "--cfg", "2", "--upscale", str(file))
    out = sample(*flags)
    assert pixels(out / "0000.png").shape == (2 * SIDE, 2 * SIDE, 3)
    content = json.loads((out / "samples.json").read_text())
    larger_one, small_one = content["checkpoint"], content["checkpoint"]["small"]
    assert (larger_one["stage"], larger_one["step"], larger_one["path"]) == ("upscale", 9, str(file))
    assert (small_one["stage"], small_one["step"], small_one["weights"]) == ("joint", 7, "raw")
    assert json.loads(read_png_text(out / "0000.png")["checkpoint"]) == larger_one
    larger = MarsPipeline.from_checkpoint(file, world.lm, world.vq, upscales=True)
    options = DrawOptions(guidance=2)
    low = pipe.draw_codes([PROMPT], [1], options)
    codes = larger.draw_codes([PROMPT], [1], options, low=low)
    assert np.array_equal(pixels(out / "0001.png"), larger.pictures_of(codes)[0])
    assert content["images"][1]["psnr_to_small"] == pytest.approx(larger.psnr_of(codes, low)[0])
    exported = tmp_path / "upscale.safetensors"
    scripts.export_weights.main(["--resume", str(file), "--output", str(exported)])
    again = sample(*flags[:-1], str(exported), output="again")
    assert np.array_equal(pixels(out / "0001.png"), pixels(again / "0001.png"))
    with pytest.raises(ValueError, match="got 1 prompts and 2 pictures"):
        larger.draw_codes([PROMPT], [1], low=low.repeat(2, 1, 1))


def test_a_file_of_one_stage_is_refused_for_another(sample, world, pictures, tmp_path) -> None:
    file, flags = write_upscaler(world, tmp_path / "upscale.pth"), ("--prompt", PROMPT)
    with pytest.raises(SystemExit, match="upscale.pth is of stage upscale, which makes pictures larger"):
        sample(*flags, resume=file)
    with pytest.raises(SystemExit, match="mars.pth is of stage joint, which draws: --upscale takes weights of upscale"):
        sample(*flags, "--upscale", str(world.checkpoint))
    with pytest.raises(SystemExit, match="is of stage upscale"):
        scripts.caption.main([*world.flags(file), "--images", str(pictures[0])])
    other = write_upscaler(world, tmp_path / "other.pth", low_grid=(2, 4))
    with pytest.raises(SystemExit, match=r"other.pth makes .* of \(2, 4\) codes larger, .*mars.pth draws \(4, 4\)"):
        sample(*flags, "--upscale", str(other))
    with pytest.raises(SystemExit, match="--size 16x16 does not go with --upscale"):
        sample(*flags, "--upscale", str(file), "--size", "16x16")
    with pytest.raises(SystemExit, match="--upscale .* needs --lm_path"):
        sample(*flags, "--upscale", str(file), "--lm_path", "")
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "layout": (["--prompt", "a", "--layout", "x.json"], "--layout x.json does not go with --lm_path"),
    "iterations": (["--prompt", "a", "--num_iter", "8"], "--num_iter 8 does not go with --lm_path"),
    "text encoder": (["--prompt", "a", "--text_encoder", "x"], "--text_encoder x does not go with --lm_path"),
    "boxes": (["--prompt", "a", "--edit_boxes", "0", "0", "1", "1"], "--edit_boxes 0.0 0.0 1.0 1.0 does not go with"),
    "nothing": ([], "exactly one of --prompt, --coco_root"),
    "temperature": (["--prompt", "a", "--temperature", "0"], "temperature must be above 0, got 0"),
    "size": (["--prompt", "a", "--size", "7x8"], "7x8 pixels are no whole codes of 2x2 pixels"),
    "many": (["--prompt", "a", "--size", "40x40"], "402 positions are more than the 160"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_anything_is_drawn(sample, tmp_path, case) -> None:
    flags, message = MISTAKES[case]
    with pytest.raises(SystemExit, match=message):
        sample(*flags)
    assert not (tmp_path / "out").exists()


def test_another_language_model_is_refused_or_allowed(world, tmp_path) -> None:
    other = write_lm(tmp_path / "lm", seed=1)
    flags = [*world.flags(), "--prompt", "a", "--output_dir", str(tmp_path / "out"), "--num_images", "1"]
    with pytest.raises(
        SystemExit, match=r"language model .*lm has id \w{64}, but the checkpoint was trained with \w{64}"
    ):
        scripts.sample.main([*flags, "--lm_path", str(other)])
    scripts.sample.main([*flags, "--lm_path", str(other), "--allow_other_frozen"])
    assert (tmp_path / "out" / "0000.png").is_file()


def test_what_holds_no_mars_is_refused(world, tmp_path) -> None:
    content = {name: value for name, value in load_plain(world.checkpoint).items() if name != "mars"}
    save_atomic(content, tmp_path / "other.pth")
    assert is_mars_file(world.checkpoint) and not is_mars_file(tmp_path / "other.pth")
    save_atomic(load_plain(world.checkpoint) | {"format": "structmar-mars-run-2"}, tmp_path / "later.pth")
    for read in (read_mars_file, read_mars_identity):
        with pytest.raises(
            ValueError, match=r"later\.pth has format 'structmar-mars-run-2', this version reads '.*-1'"
        ):
            read(tmp_path / "later.pth")
    with pytest.raises(SystemExit, match=r"other\.pth does not hold MARS"):
        scripts.sample.main(
            [*world.flags(tmp_path / "other.pth"), "--prompt", "a", "--output_dir", str(tmp_path / "o")]
        )
    content["model"]["lm.head"] = torch.zeros(2)
    save_atomic(content | {"mars": load_plain(world.checkpoint)["mars"]}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"lm\.head is of the frozen language model"):
        export_mars(tmp_path / "more.pth", tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.pth does not fit the model: has lm\.head besides"):
        load_mars(tmp_path / "more.pth", world.lm, world.vq)


def test_a_structmar_is_not_made_of_it(sample, world, tmp_path) -> None:
    export_mars(world.checkpoint, tmp_path / "mars.safetensors")
    for file in (world.checkpoint, tmp_path / "mars.safetensors"):
        with pytest.raises(SystemExit, match=rf"{file.name} holds MARS, .* give it by --lm_path"):
            sample("--prompt", "a", "--lm_path", "", resume=file)


def test_captions_are_lines_of_json(world, pipe, pictures, tmp_path, capsys) -> None:
    flags = [*world.flags(), "--images", *map(str, pictures), "--max_words", "6", "--batch_size", "1"]
    scripts.caption.main([*flags, "--begin", "a red"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(path) for path in pictures]
    assert all(line["caption"].startswith("a red") for line in lines)
    both = pipe.describe([pixels(path) for path in pictures], "a red", max_words=6)
    assert [line["caption"] for line in lines] == both
    scripts.caption.main([*flags, "--output", str(tmp_path / "captions.jsonl")])
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2


def test_pictures_are_cut_as_in_training_and_low_precision_draws(sample, pipe, pictures) -> None:
    large = Image.open(pictures[1])
    assert torch.equal(pipe.codes_of([np.asarray(large)]), pipe.codes_of([center_crop(large, SIDE)]))
    out = sample("--prompt", PROMPT, "--num_images", "1", "--precision", "bf16")
    assert pixels(out / "0000.png").shape == (SIDE, SIDE, 3)


def test_captions_of_a_datasets_pictures(world, pipe, tmp_path, capsys) -> None:
    data = write_mars_world(tmp_path / "data") / "coco"
    source = ["--coco_root", str(data), "--coco_split", "val2014", "--max_words", "6", "--num_images"]
    index = CocoIndex.load(data, "val2014")
    scripts.caption.main([*world.flags(), *source, "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [index.image_path(place) for place in range(3)]
    own = pipe.describe([np.asarray(load_image(path)) for path in files], max_words=6)
    images = zip(index.images, files, own, strict=False)
    assert lines == [{"image_id": image.id, "file": str(file), "caption": text} for image, file, text in images]
    with pytest.raises(SystemExit, match="--num_images 5: val2014 of .* has 4 images"):
        scripts.caption.main([*world.flags(), *source, "5"])
    files[1].unlink()
    with pytest.raises(SystemExit, match=f"picture {files[1]} does not exist"):
        scripts.caption.main([*world.flags(), *source, "3"])
    with pytest.raises(SystemExit, match="exactly one of --images, --coco_root"):
        scripts.caption.main([*world.flags(), *source, "1", "--images", "a.png"])


def test_a_page_of_words_and_pictures(world, pipe, pictures, tmp_path) -> None:
    out = tmp_path / "out"
    flags = [*world.flags(), "--images", str(pictures[0]), "--prompt", PROMPT, "--output_dir", str(out)]
    scripts.tell.main([*flags, "--image_threshold", "0", "--max_images", "1", "--max_words", "3", "--cfg", "1"])
    blocks = (out / "page.md").read_text().split("\n\n")
    assert blocks[:3] == ["![](0000.png)", PROMPT, "![](0001.png)"]
    assert np.array_equal(pixels(out / "0000.png"), pixels(pictures[0]))
    assert json.loads((out / "samples.json").read_text())["sampling"]["end_ids"] == [pipe.parts.words.end_token]
    scripts.tell.main([*flags, "--max_images", "0", "--max_words", "3"])
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "page.md", "samples.json"]
    scripts.sample.main([*world.flags(), "--prompt", PROMPT, "--num_images", "1", "--output_dir", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "grid.png", "samples.json"]
    with pytest.raises(
        SystemExit, match="--max_images 64 and --max_words 3 after 22 positions: 1176 positions are more"
    ):
        scripts.tell.main([*flags, "--max_images", "64", "--max_words", "3"])
    with pytest.raises(SystemExit, match="say what comes before by --prompt, --images or both"):
        scripts.tell.main([*world.flags(), "--output_dir", str(out)])
