"""Pictures with sidecars through the real programs: cached, trained on beside COCO, drawn, scored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import main_mar
import scripts.sample
from engine.checkpoint.load import export_weights
from engine.data.coco import CocoLayoutDataset, DataConfig
from engine.eval.profiles import load_profile
from engine.eval.targets import load_eval_set
from scripts import cache_latents
from tests.helpers.coco_fixture import FixtureBox, FixtureImage, write_coco
from tests.helpers.sidecar_files import write_categories, write_sidecars
from tests.helpers.tiny_run import argv, read_metrics, write_world
from util.types import UNKNOWN

CAPTIONS = ("a red dog", "red a")
OWN = [FixtureImage(k, 40, 36 + k, [FixtureBox((1, 3)[k % 2], (4, 6, 16, 20))], CAPTIONS) for k in range(1, 5)]
JOINED = {"coco_split": "train2014+mine", "log_freq": 1}
WITH_PHRASES: dict[str, Any] = {"coco_split": "train2014+named", "log_freq": 1, "phrases": True, "phrase_prob": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's train2014 with two folders of sidecars beside it: "mine", and "named", where one label is no category."""
    root = write_world(tmp_path_factory.mktemp("world"), num_images=4)
    write_categories(root / "coco")
    write_sidecars(root / "coco", "mine", OWN)
    named = write_sidecars(root / "coco", "named", OWN)
    box = {"label": "a red dog", "bbox": [0.25, 0.25, 0.75, 0.75]}
    (named / "1.bbox").write_text((named / "1.bbox").read_text() + "\n" + json.dumps(box))
    return root


def train(world: Path, output: str, **flags: object) -> list[float]:
    main_mar.main(argv(world, output, **flags))
    return [line["loss"] for line in read_metrics(world, output)]


def test_cached_training_on_both_is_uncached_training(world: Path) -> None:
    flags = {"coco_root": world / "coco", "vae_path": world / "vae.ckpt", "clip_path": world / "clip"}
    settings = {"cached_path": world / "cache", "img_size": 32, "num_workers": 0, "device": "cpu"}
    names = flags | settings | {"coco_split": JOINED["coco_split"]}
    cache_latents.main([word for name, value in names.items() for word in (f"--{name}", str(value))])
    uncached = train(world, "uncached", **JOINED, epochs=1, num_preview=1, num_iter=2, num_sampling_steps=2,
                     sample_freq=4, eval_split="mine")  # fmt: skip
    assert len(uncached) == 4  # batches of two, of four pictures each
    assert (world / "uncached" / "samples" / "step-0000004.png").is_file()
    cached = train(world, "cached", **JOINED, epochs=1, use_cached=True, cached_path=world / "cache")
    assert cached == pytest.approx(uncached, rel=1e-4)


def test_labels_that_are_no_categories_are_phrases(world: Path, tmp_path: Path) -> None:
    """Refused by a model that knows none; else trained on, whatever --phrase_prob says, and drawn."""
    with pytest.raises(SystemExit, match=r"named/1\.bbox, object 1: label 'a red dog' is none of the 4 .*--phrases"):
        train(world, "refused", coco_split="train2014+named")
    assert len(train(world, "named", **WITH_PHRASES, epochs=1)) == 4
    weights = world / "named.safetensors"
    export_weights(world / "named" / "checkpoint-last.pth", weights)
    frozen = ["--vae_path", str(world / "vae.ckpt"), "--clip_path", str(world / "clip")]
    quick = ["--num_iter", "2", "--num_sampling_steps", "2", "--num_images", "8", "--device", "cpu"]
    source = ["--coco_root", str(world / "coco"), "--coco_split", "named+mine", "--output_dir", str(tmp_path / "out")]
    scripts.sample.main(["--resume", str(weights), *frozen, *quick, *source])
    images = json.loads((tmp_path / "out" / "samples.json").read_text())["images"]
    labels = {item["label"] for image in images for item in image["objects"]}
    assert "a red dog" in labels and labels - {"a red dog"} <= {"tomato", "leaf"}


def test_a_box_without_category_always_has_its_phrase(world: Path) -> None:
    root = str(world / "coco")
    for prob in (0.0, 0.5):
        config = DataConfig(root, "train2014+named", img_size=32, phrase_prob=prob, has_phrases=True)
        dataset = CocoLayoutDataset.from_config(config)
        told = 0
        for epoch in range(8):
            dataset.set_epoch(epoch)
            for sample in (dataset[item] for item in range(len(dataset))):
                phrases = sample.layout.phrases or ("",) * len(sample.layout)
                own = list(zip(sample.layout.categories.tolist(), phrases, strict=True))
                told += (UNKNOWN, "a red dog") in own
                assert prob or all(phrase == "" for category, phrase in own if category != UNKNOWN)
        assert told == 8


def test_sidecars_are_scored_as_jsons_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same targets; boxes that no detector can know are left out and counted."""
    profile = load_profile("coco-original")
    write_coco(tmp_path, "val2017", OWN)
    mine = write_sidecars(tmp_path, "mine", OWN)
    write_categories(tmp_path)
    (mine / "1.bbox").write_text((mine / "1.bbox").read_text() + '\n{"label": "a kite", "bbox": [0, 0, 1, 1]}')
    with caplog.at_level(logging.INFO):
        found, expected = (load_eval_set(tmp_path, profile, split) for split in ("mine", "val2017"))
    assert found.removed["boxes: label of no category"] == 1 and "label of no category 1" in caplog.text
    own = {Path(target.file_name).stem: target for target in found.targets}
    assert len(own) == len(expected.targets) == len(OWN)
    for target in expected.targets:
        other = own[str(target.image_id)]
        assert other.boxes_px == pytest.approx(target.boxes_px) and other.scene.names == target.scene.names
        assert other.scene.prompt == target.scene.prompt and found.picture(other).shape[:2] == other.size[::-1]
    with pytest.raises(ValueError, match=r"an evaluation is of one split, got 'val2017\+mine'"):
        load_eval_set(tmp_path, profile, "val2017+mine")
