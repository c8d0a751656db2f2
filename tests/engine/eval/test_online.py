"""--online_eval with a detector: the evaluation's numbers in the run's metrics, and what it refuses."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import yaml

import main_mar
from engine.checkpoint.load import load_for_sampling
from engine.eval.online import SHOWN
from engine.eval.profiles import load_profile
from tests.helpers.coco_fixture import CATEGORIES
from tests.helpers.eval_world import write_detector
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import argv, read_metrics, write_world
from util.checkpoint import load_plain, safetensors_metadata
from util.names import BEST_BY
from util.types import Category

EVERY_EPOCH = {"online_eval": True, "eval_freq": 1, "num_preview": 1, "num_iter": 2, "num_sampling_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_world(tmp_path_factory.mktemp("online") / "world")
    categories = sorted((Category(each["id"], each["name"]) for each in CATEGORIES), key=lambda each: each.id)
    write_detector(root / "detector.pth", categories)
    settings = vars(load_profile("mini")) | {"name": "tiny", "split": "val2014", "resolution": 32, "max_objects": 4}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    (root / "tiny.yaml").write_text(yaml.safe_dump(plain))
    return root


def scored(root: Path, **flags: object) -> list[str]:
    return argv(
        root,
        eval_detector=root / "detector.pth",
        eval_profile=root / "tiny.yaml",
        eval_images=3,
        **EVERY_EPOCH,
        **flags,
    )


def test_every_round_is_scored_on_the_same_scenes(world):
    main_mar.main(scored(world, output="scored", epochs=2, max_steps=None))
    rounds = [entry for entry in read_metrics(world, "scored") if "eval/AP50" in entry]
    steps_per_epoch = 9 // 2
    assert [entry["step"] for entry in rounds] == [steps_per_epoch, 2 * steps_per_epoch]
    assert set(rounds[0]) == {"step", "eval/AP", "eval/AP50", "eval/mIoU", "eval/SR50", "eval/extra_rate"}
    assert rounds[0]["eval/extra_rate"] >= 0 and 0 <= rounds[0]["eval/mIoU"] <= 1
    assert "evaluation of 3 layouts at step 4" in (world / "scored" / "log.txt").read_text()


def test_the_best_weights_are_kept_and_started_from(world, caplog):
    """Averaged, with their score; in the same folder only over the later checkpoint, if that is said."""
    assert {f"eval/{name}" for _, name in SHOWN} == set(BEST_BY)
    best = world / "best" / "checkpoint-best.safetensors"
    command = scored(world, output="best", epochs=2, keep_best="eval/mIoU", keep_every=4, lr=1e-30)
    main_mar.main(command)
    rounds = [entry for entry in read_metrics(world, "best") if "eval/mIoU" in entry]
    value, step = max((entry["eval/mIoU"], -entry["step"]) for entry in rounds)
    noted = {"name": "eval/mIoU", "value": value, "step": -step}
    assert json.loads(safetensors_metadata(best)["best"]) == noted
    state = load_plain(world / "best" / f"checkpoint-{-step:07d}.pth")
    assert state["best"] == noted
    assert_same(load_for_sampling(best).model.state_dict(), OrderedDict({**state["model"], **state["model_ema"]}))
    before = best.read_bytes()
    with pytest.raises(SystemExit, match="add --no-auto_resume, which overwrites it"):
        main_mar.main([*command, "--resume", "best"])
    main_mar.main([*command, "--resume", "best", "--no-auto_resume"])
    assert f"from the weights of {best}" in caplog.text
    assert best.read_bytes() == before  # nothing was better
    with pytest.raises(SystemExit, match="--keep_best eval/AP needs its scores"):
        main_mar.main([*argv(world, "without"), "--keep_best", "eval/AP"])


@pytest.mark.integration
def test_two_processes_share_the_work(world):
    in_two_processes(lambda _: main_mar.main(scored(world, output="shared", epochs=1, eval_bsz=2)), join_group=False)
    rounds = [entry for entry in read_metrics(world, "shared") if "eval/AP50" in entry]
    assert len(rounds) == 1 and 0 <= rounds[0]["eval/mIoU"] <= 1


def test_scores_change_nothing_that_is_trained(world):
    main_mar.main(argv(world, "plain", epochs=1))
    main_mar.main(scored(world, output="watched", epochs=1))
    plain, watched = (
        [entry["loss"] for entry in read_metrics(world, output) if "loss" in entry] for output in ("plain", "watched")
    )
    assert plain == watched


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"eval_profile": "structmar-256"},
            "--eval_profile structmar-256 has 256 px and up to 16 objects, the model",
        ),
        ({"eval_detector": "nowhere.pth"}, "--eval_detector nowhere.pth does not exist"),
        ({"eval_images": 0}, "--eval_images must be positive, got 0"),
        ({"eval_split": "test1999"}, "test1999"),
    ],
)
def test_mistakes_stop_it_before_it_writes(world, flags, message):
    words = scored(world, output="wrong")
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    with pytest.raises(SystemExit, match=message):
        main_mar.main(words)
    assert not (world / "wrong").exists()


def test_a_detector_of_other_classes_is_refused(world, tmp_path):
    few = write_detector(tmp_path / "few.pth", [Category(1, "tomato")])
    with pytest.raises(SystemExit, match="knows 1 categories, but not leaf, plum, lemon"):
        main_mar.main([*scored(world, output="few"), "--eval_detector", str(few)])
    assert not (world / "few").exists()
