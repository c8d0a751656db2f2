"""Several sizes and aspect ratios from one checkpoint, as a user meets them: main_mar.py --sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

import main_mar
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
