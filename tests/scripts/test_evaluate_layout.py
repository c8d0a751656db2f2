"""scripts/evaluate_layout.py, from the command line to the files: what is written, resumed, and refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engine.eval.run
import scripts.evaluate_layout
from engine.checkpoint.load import load_for_sampling
from engine.eval.profiles import load_profile
from tests.conftest import ROOT
from tests.helpers.eval_world import BOXES, write_dataset, write_detector, write_many_sizes, write_profile
from tests.helpers.processes import in_two_processes
from tests.helpers.tiny import CONFIG, World, write_checkpoint, write_world
from tests.helpers.vq_file import write_vq
from util.checkpoint import sha256_file, sha256_tensors
from util.types import Category

FAST = ["--num_iter", "4", "--num_sampling_steps", "4", "--clip_x0", "3", "--device", "cpu", "--num_resamples", "20"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    write_dataset(world.root / "coco")
    write_detector(world.root / "detector.pth")
    write_profile(world.root / "tiny.yaml")
    return world


@pytest.fixture
def evaluate(world, tmp_path):
    """Runs the script in this process; returns results.json. None as a value leaves a flag out."""

    def run(output: str = "out", **flags: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "profile": world.root / "tiny.yaml",
            "coco_root": world.root / "coco",
            "detector": world.root / "detector.pth",
            "resume": world.checkpoint,
            "vae_path": world.vae,
            "clip_path": world.clip,
            "batch_size": 2,
            "output_dir": tmp_path / output,
        } | flags
        words = list(FAST)
        for name, value in values.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None:
                words += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
        scripts.evaluate_layout.main(words)
        return json.loads((tmp_path / output / "results.json").read_text())

    return run


def write_folder(folder: Path, size: int = 32, ids=tuple(BOXES), name="{:012d}.png") -> Path:
    folder.mkdir()
    for image_id in ids:
        Image.fromarray(np.full((size, size, 3), 90, dtype=np.uint8)).save(folder / name.format(image_id))
    return folder


def test_a_checkpoint_from_generation_to_report(world, evaluate, tmp_path, capsys):
    results = evaluate(seeds=[0, 3], no_layout_run=True)
    out = tmp_path / "out"
    assert [(row["name"], row["kind"], row["num_seeds"]) for row in results["rows"]] == [
        ("real images", "bound", 1),
        ("VAE round trip", "bound", 1),
        ("StructMAR, full", "model", 2),
        ("no layout", "control", 2),
        ("shuffled layouts", "control", 2),
    ]
    profile = load_profile(world.root / "tiny.yaml")
    assert (results["profile"]["name"], results["profile"]["hash"]) == ("tiny", profile.hash)
    assert results["dataset"]["num_images"] == len(BOXES) and results["seeds"] == [0, 3]
    weights = load_for_sampling(world.checkpoint).model.state_dict()
    assert results["source"]["weights_sha256"] == sha256_tensors(weights)
    assert results["detector"] == {
        "arch": "fasterrcnn_mini",
        "id": sha256_file(world.root / "detector.pth"),
        "is_reward": False,
        "unknown_categories": [],
    }
    assert len(list((out / "images" / "seed_3").glob("*.png"))) == len(BOXES)
    a, b = (np.asarray(Image.open(out / "images" / f"seed_{seed}" / f"{3:012d}.png")) for seed in (0, 3))
    assert a.shape == (32, 32, 3) and not np.array_equal(a, b)
    lines = [json.loads(line) for line in (out / "per_image.jsonl").read_text().splitlines()]
    assert len(lines) == len(BOXES) * (1 + 1 + 2 + 2 + 2)
    model = next(line for line in lines if line["row"] == "StructMAR, full")
    assert (out / model["picture"]).is_file()
    truth = json.loads((out / "ground_truth_conditioned.json").read_text())
    assert len(truth["images"]) == len(BOXES)
    found = json.loads((out / "detections" / "StructMAR__full_seed_3.json").read_text())
    assert {entry["image_id"] for entry in found} <= set(BOXES)
    assert "<svg" in (out / "report.html").read_text()
    assert "| StructMAR, full" in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_results(evaluate, tmp_path, monkeypatch):
    """Killed in the middle of generating, the same command makes only what is missing, and the same numbers."""
    whole = evaluate("whole")
    make = engine.eval.run.generate_chunk
    calls = []

    def dies_at_the_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        make(*arguments)

    monkeypatch.setattr(engine.eval.run, "generate_chunk", dies_at_the_second)
    with pytest.raises(SystemExit) as stopped:
        evaluate("killed")
    assert stopped.value.code == 130
    assert not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.setattr(engine.eval.run, "generate_chunk", make)
    images = tmp_path / "killed" / "images" / "seed_0"
    kept = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    assert len(kept) == 2
    assert evaluate("killed") == whole
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert {name: (images / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.integration
def test_two_processes_give_what_one_gives(evaluate, tmp_path):
    evaluate("one", seeds=[0, 5])
    in_two_processes(lambda _: len(evaluate("two", seeds=[0, 5])), join_group=False)
    for name in ("results.json", "per_image.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_rescore_takes_another_detector_and_never_generates(world, evaluate, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--rescore: no .*generation.json"):
        evaluate(rescore=True)
    first = evaluate()
    monkeypatch.setattr(engine.eval.run, "generate_chunk", lambda *_: pytest.fail("generated"))
    other = write_detector(tmp_path / "other.pth", seed=1)
    second = evaluate(rescore=True, detector=other)
    assert second["detector"]["id"] == sha256_file(other) and second["source"] == first["source"]
    assert second["rows"] != first["rows"]
    (tmp_path / "out" / "images" / "seed_0" / f"{8:012d}.png").unlink()
    with pytest.raises(SystemExit, match="--rescore: 1 of 5 images are missing"):
        evaluate(rescore=True)


def test_images_of_other_settings_never_mix(evaluate):
    evaluate()
    with pytest.raises(SystemExit, match=r"generation.json: .* sampling .*'num_iter': 4.*'num_iter': 8"):
        evaluate(num_iter=8)


def test_a_folder_of_any_model(world, evaluate, tmp_path):
    folder = write_folder(tmp_path / "theirs", name="{}.png")
    results = evaluate(resume=None, images=folder, name="Theirs")
    assert [row["name"] for row in results["rows"]] == ["real images", "VAE round trip", "Theirs", "shuffled layouts"]
    assert results["source"] == {"kind": "images", "folder": "theirs"} and results["sampling"] is None
    results = evaluate(resume=None, images=folder, vae_path="nowhere", **{"no-real_bound": True})
    assert [row["name"] for row in results["rows"]] == ["theirs", "shuffled layouts"]
    assert set(results["skipped"]) == {"real images", "VAE round trip", "image quality"}


def test_real_photos_as_a_folder_score_as_the_bound(world, evaluate):
    results = evaluate(resume=None, images=world.root / "coco" / "val2017", image_size="source")
    real, model = results["rows"][0], results["rows"][2]
    assert real["conditioned"] == model["conditioned"] and real["layout"] == model["layout"]


def test_pictures_of_any_size_go_the_photographs_way(world, evaluate, tmp_path):
    """Enlarged photographs, in several sizes, score about as the photographs; the sizes are on record."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for factor, image_id in zip((1, 2, 2, 3, 1), BOXES, strict=True):
        with Image.open(world.root / "coco" / "val2017" / f"{image_id:012d}.png") as image:
            image.resize((64 * factor, 64 * factor), Image.Resampling.NEAREST).save(folder / f"{image_id}.png")
    flags = {"resume": None, "images": folder, "name": "theirs"}
    with pytest.raises(SystemExit, match=r"3.png is 64x64, but profile tiny says 32x32"):
        evaluate(**flags)
    results = evaluate(**flags, image_size="any")
    assert results["source"] == {
        "kind": "images", "folder": "theirs", "image_size": "any",
        "sizes": {"128x128": 2, "64x64": 2, "192x192": 1}, "resized": "center_crop to 32 px",
    }  # fmt: skip
    assert "center_crop to 32 px" in (tmp_path / "out" / "report.html").read_text()
    real, theirs = results["rows"][0], results["rows"][2]
    assert theirs["layout"]["extra_rate"]["value"] == pytest.approx(real["layout"]["extra_rate"]["value"], abs=0.5)
    with pytest.raises(SystemExit, match="--image_size any: profile coco-original keeps every photograph's own size"):
        evaluate(**flags, image_size="any", profile="coco-original")


def test_bounds_are_detected_once_for_several_models(world, evaluate, tmp_path, monkeypatch):
    """By the second evaluation with another model; its numbers are those that it has without sharing."""
    folder = write_folder(tmp_path / "theirs")
    alone = evaluate("alone", resume=None, images=folder)
    shared = {"bounds_dir": tmp_path / "bounds"}
    evaluate("first", **shared)
    rows = []
    detect = engine.eval.run.detect
    monkeypatch.setattr(engine.eval.run, "detect", lambda *args: rows.append(args) or detect(*args))
    assert evaluate("second", resume=None, images=folder, **shared) == alone
    assert len(rows) == 1  # the model's
    evaluate("third", resume=None, images=folder, vae_bound=True, max_images=4, **shared)
    assert len(rows) == 4  # of other images: both bounds too


def test_the_bound_of_a_tokenizer_of_codes(world, evaluate, tmp_path):
    flags = {"resume": None, "images": write_folder(tmp_path / "theirs")}
    bounds = [
        next(row for row in evaluate(name, vae_path=path, **flags)["rows"] if row["name"] == "VAE round trip")
        for name, path in (("kl", world.vae), ("vq", write_vq(tmp_path / "vq.pt")))
    ]
    assert bounds[0] != bounds[1] and {bound["kind"] for bound in bounds} == {"bound"}


def test_a_second_evaluation_in_the_folder_is_refused(evaluate, tmp_path):
    """While a process that lives holds it."""
    hold = "with held_folder(sys.argv[1]): print('held', flush=True), time.sleep(60)"
    code = f"import sys, time; from util.output import held_folder\n{hold}"
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as first:
        try:
            assert first.stdout is not None and first.stdout.readline()
            with pytest.raises(SystemExit, match=f"error: .*out.*{first.pid}"):
                evaluate()
        finally:
            first.kill()
    assert evaluate()["rows"]


def test_one_image_has_no_layouts_to_shuffle(world, evaluate):
    results = evaluate(resume=None, images=world.root / "coco" / "val2017", image_size="source", max_images=1)
    assert [row["name"] for row in results["rows"]] == ["real images", "VAE round trip", "val2017"]
    assert results["skipped"]["shuffled layouts"] == "needs at least two images"


def test_a_folder_called_as_a_row_needs_a_name(evaluate, tmp_path):
    folder = write_folder(tmp_path / "no_layout")
    with pytest.raises(SystemExit, match="folder's name 'no_layout' is the name of another row.*another --name"):
        evaluate(resume=None, images=folder)
    assert evaluate(resume=None, images=folder, name="theirs")["source"]["folder"] == "no_layout"


def test_a_picture_cut_off_is_made_again(world, evaluate, tmp_path):
    whole = evaluate()
    picture = tmp_path / "out" / "images" / "seed_0" / f"{11:012d}.png"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match="--rescore: 1 of 5 images are missing"):
        evaluate(rescore=True)
    assert evaluate() == whole and picture.read_bytes() == content


def test_a_broken_photograph_is_said_before_anything_is_generated(world, evaluate, tmp_path, monkeypatch):
    """Its header is good and its end is there: only decoding shows it."""
    monkeypatch.setattr(engine.eval.run, "generate_chunk", lambda *_: pytest.fail("generated"))
    root = tmp_path / "coco"
    shutil.copytree(world.root / "coco", root)
    photo = root / "val2017" / f"{20:012d}.png"
    content = photo.read_bytes()
    photo.write_bytes(content[:60] + bytes(40) + content[100:])
    with pytest.raises(SystemExit, match=f"cannot read image .*{20:012d}.png"):
        evaluate(coco_root=root)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_learned_positions_is_scored_in_the_photographs_own_sizes(world, evaluate, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-last.pth"
    checkpoint.parent.mkdir()
    write_checkpoint(world, checkpoint, replace(CONFIG, learned_pos=False))
    root = write_many_sizes(tmp_path / "coco", last=(32, 32))
    profile = write_profile(tmp_path / "original.yaml", geometry="original", size=None)
    flags = {"resume": checkpoint, "coco_root": root, "profile": profile}
    results = evaluate(**flags)
    assert [row["name"] for row in results["rows"]][:2] == ["real images", "StructMAR, full"]
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out" / "images" / "seed_0").glob("*.png"))]
    assert sizes == [(64, 64), (80, 64), (64, 96), (80, 64), (32, 32)]
    odd = write_many_sizes(tmp_path / "odd", last=(120, 70))
    with pytest.raises(SystemExit, match="image 20 of val2017: a picture of 70x120 px"):
        evaluate("odd", **flags | {"coco_root": odd})


def test_speed_flags_change_no_number(world, evaluate, tmp_path):
    """Photographs of unlike sizes, for which a shared batch would be padded, one or many at a time."""
    root = write_many_sizes(tmp_path / "coco", last=(120, 70))
    profile = write_profile(tmp_path / "original.yaml", geometry="original", size=None)
    flags = {"resume": None, "images": root / "val2017", "image_size": "source", "coco_root": root, "profile": profile}
    wanted = evaluate("one", **flags, detector_batch_size=1)
    for name, speed in {"two": {"detector_batch_size": 2}, "all": {"detector_batch_size": 16, "batch_size": 7}}.items():
        assert evaluate(name, **flags, **speed) == wanted, speed


def test_the_reward_detector_is_recognised(world, evaluate, capsys):
    for name in (str(world.root / "detector.pth"), sha256_file(world.root / "detector.pth")):
        assert evaluate(reward_detector=[name])["detector"]["is_reward"]
    assert "reward detector" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither a file nor a sha256"):
        evaluate(reward_detector=["nothing.pth"])


def test_features_stand_in_under_their_own_name(world, evaluate):
    results = evaluate(resume=None, images=world.root / "coco" / "val2017", image_size="source",
                       features=world.root / "detector.pth")  # fmt: skip
    quality = results["rows"][2]["quality"]
    assert list(quality) == ["Frechet distance (fasterrcnn_mini features)"]
    assert quality["Frechet distance (fasterrcnn_mini features)"] == pytest.approx(0, abs=1e-6)  # the same pictures


def test_unknown_classes(world, evaluate, tmp_path):
    detector = write_detector(tmp_path / "few.pth", [Category(1, "person"), Category(18, "dog")])
    with pytest.raises(SystemExit, match="not sports ball of the dataset's 3"):
        evaluate(detector=detector)
    results = evaluate(detector=detector, skip_unknown=True, resume=None, images=world.root / "coco" / "val2017",
                       image_size="source")  # fmt: skip
    assert results["detector"]["unknown_categories"] == ["sports ball"]
    assert set(results["rows"][0]["per_class"]) == {"person", "dog"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resume": None}, "exactly one of --resume, --images; got none"),
        ({"images": "x"}, "exactly one of --resume, --images; got both"),
        ({"detector": "none.onnx"}, "--detector none.onnx does not exist; a Faster R-CNN .* export"),
        ({"seeds": [1, 1]}, r"--seeds must be different numbers, got \[1, 1\]"),
        ({"num_resamples": 0}, "--num_resamples must be positive, got 0"),
        ({"profile": "nonsense"}, "nonsense"),
        ({"detector": "nowhere.pth"}, "nowhere.pth"),
        ({"resume": "nowhere.pth"}, "nowhere.pth"),
        ({"resume": None, "images": "nowhere"}, "--images nowhere is not a folder"),
        (
            {"profile": "structmar-256", "coco_split": "val2017"},
            "asks for pictures of 256 px, the checkpoint makes 32 px",
        ),
        ({"profile": "coco-original"}, "asks for photographs at their own sizes, the checkpoint makes 32 px"),
        ({"num_iter": 65}, "num_iter must lie between 1 and the number of tokens, 64, got 65"),
        ({"fid": "nowhere.pth"}, "nowhere.pth"),
        ({"name": "real images"}, "--name 'real images' is the name of another row"),
        ({"name": "Real_Images"}, "--name 'Real_Images' is the name of another row, or of its files: 'real images'"),
        ({"name": "/"}, "--name '/' must be one line with a letter or digit"),
        ({"name": "n" * 200}, "--name 'n+' must be .* at most 150 bytes"),
        ({"image_size": "source"}, "--image_size source is for --images"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(evaluate, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        evaluate(**flags)
    assert not (tmp_path / "out").exists()


def test_wrong_folders(evaluate, tmp_path):
    folder = write_folder(tmp_path / "big", size=48)
    with pytest.raises(SystemExit, match=f"{3:012d}.png is 48x48, but profile tiny says 32x32"):
        evaluate(resume=None, images=folder)
    folder = write_folder(tmp_path / "few", ids=(3, 11))
    with pytest.raises(SystemExit, match=r"lacks 3 of 5 images, the first is 8 \(000000000008.png"):
        evaluate(resume=None, images=folder)
    shutil.copy(folder / f"{3:012d}.png", folder / "3.png")
    with pytest.raises(SystemExit, match=rf"2 files for image 3 \({3:012d}.png\): {3:012d}.png, 3.png"):
        evaluate(resume=None, images=folder)
    folder = write_folder(tmp_path / "broken")
    content = (folder / f"{8:012d}.png").read_bytes()
    (folder / f"{8:012d}.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=f"cannot read image .*{8:012d}.png"):
        evaluate(resume=None, images=folder)
    assert not (tmp_path / "out").exists()


def test_missing_photos(world, evaluate, tmp_path):
    """They are the bound: their absence is said before anything is generated, with the flag that does without."""
    root = tmp_path / "coco"
    shutil.copytree(world.root / "coco", root)
    (root / "val2017" / f"{11:012d}.png").unlink()
    with pytest.raises(SystemExit, match=f"no photograph .*{11:012d}.png.*--no-real_bound"):
        evaluate(coco_root=root)
    shutil.rmtree(root / "val2017")
    with pytest.raises(SystemExit, match="no photographs at .*val2017.*--no-real_bound"):
        evaluate(coco_root=root)
    assert not (tmp_path / "out").exists()
    assert evaluate(coco_root=root, **{"no-real_bound": True})["rows"][0]["percent_of_bound"] is None
