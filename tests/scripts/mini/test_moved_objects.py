"""What is measured of moved objects: which are chosen, where they go, and what counts as found, left and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.scenes import KnownLabels, Scene, read_entry
from engine.eval.judge import Judge
from engine.sample.changes import Changes
from engine.sample.pipeline import StructMARPipeline
from models.frozen.detections import Detections
from models.sampling.config import SamplingConfig
from scripts.mini.edit_sheet import EXAMPLES, Shown, hidden_pixels, sheet, veiled
from scripts.mini.moves import Seen, Trial, answers, choose, edit, format_table, look
from tests.helpers.tiny import CATEGORIES, CONFIG, write_world
from util.types import Category

DOG, BALL, GOAL = (0.0, 0.0, 0.25, 0.25), (0.0, 0.625, 0.25, 0.875), (0.625, 0.625, 0.875, 0.875)


def some_scene(*boxes: Sequence[float]) -> Scene:
    objects = [{"label": ("dog", "sports ball")[k % 2], "bbox": list(box)} for k, box in enumerate(boxes)]
    return read_entry({"prompt": "a dog and a ball", "objects": objects}, "entry 0", KnownLabels(CATEGORIES, 4))


def trial(place: int = 0, goal: tuple[float, float, float, float] = GOAL) -> Trial:
    draws = np.random.default_rng(place)
    return Trial(place, draws.integers(0, 256, (32, 32, 3), dtype=np.uint8), some_scene(DOG, BALL), 0, goal)


def seen(*found: tuple[str, Sequence[float]]) -> Seen:
    return Seen(np.array([box for _, box in found], dtype=np.float64).reshape(-1, 4), [name for name, _ in found])


def test_an_object_goes_to_a_free_place_of_the_same_size() -> None:
    scene, nothing = some_scene(DOG, BALL), np.zeros((32, 32, 3), dtype=np.uint8)
    for seed in range(20):
        chosen = choose(3, nothing, scene, torch.Generator().manual_seed(seed))
        assert chosen is not None and chosen.place == 3 and chosen.name in ("dog:1", "sports ball:1")
        x0, y0, x1, y1 = chosen.goal
        old = chosen.box(chosen.index)
        np.testing.assert_allclose([x1 - x0, y1 - y0], old[2:] - old[:2], atol=2e-4)
        assert x1 <= old[0] or x0 >= old[2] or y1 <= old[1] or y0 >= old[3]  # away from the old box
    assert choose(0, nothing, some_scene((0, 0, 1, 1)), torch.Generator().manual_seed(0)) is None


def test_found_by_class_and_place() -> None:
    """A box is found with IoU 0.5; what fits another object of the class better does not count."""
    half = (0.0, 0.0, 0.25, 0.125)  # of DOG: IoU 0.5
    assert seen(("dog", half)).has("dog", np.array(DOG))
    assert not seen(("dog", (0.0, 0.0, 0.25, 0.12))).has("dog", np.array(DOG))
    assert not seen(("sports ball", DOG)).has("dog", np.array(DOG)) and not seen().has("dog", np.array(DOG))
    assert not seen(("dog", half)).has("dog", np.array(DOG), [np.array(half)])
    assert seen(("dog", half), ("dog", DOG)).has("dog", np.array(DOG), [np.array(half)])


@pytest.mark.parametrize(
    ("way", "after", "expected"),
    [
        ("moved", seen(("dog", GOAL), ("sports ball", BALL)), {"found": True, "left": False, "kept_far": True}),
        ("moved", seen(("dog", DOG)), {"found": False, "left": True, "kept_far": False}),
        ("removed", seen(("sports ball", BALL)), {"left": False, "kept_far": True}),
        ("repainted", seen(("dog", DOG), ("sports ball", BALL)), {"found": True, "kept_far": True}),
    ],
)
def test_answers(way: str, after: Seen, expected: dict[str, bool]) -> None:
    before = seen(("dog", DOG), ("sports ball", BALL))
    hidden = np.zeros((32, 32), dtype=bool)
    counts = answers([trial(2)], [hidden], [before], [after], way)
    assert {name: each.right[0] for name, each in counts.items() if each.right} == expected
    assert all(each.places in ([], [2]) for each in counts.values())
    hidden[27:, 0] = True  # a corner of the ball's box
    near = answers([trial()], [hidden], [before], [after], way)
    assert near["kept_near"].right == counts["kept_far"].right and not near["kept_far"].right
    unseen = answers([trial()], [hidden], [seen()], [after], way)
    assert not unseen["kept_near"].right and not unseen["kept_far"].right  # it was not there before


class Fixed:
    """Finds the same in every picture."""

    id, arch, categories = "id", "fixed", (Category(18, "dog"), Category(37, "sports ball"))

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        boxes = torch.tensor([[0.0, 0, 8, 8], [0, 20, 8, 28]])
        return [Detections(boxes, torch.tensor([18, 37]), torch.tensor([0.9, 0.4])) for _ in images]


def test_a_run_from_drawings_to_a_table(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    pipe = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    pipe.identity = None  # then the options are the head's defaults
    own = SamplingConfig(num_iter=2, num_sampling_steps=2)
    trials = [trial(0), trial(1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructMARPipeline, "own_sampling", own)
        pictures, hidden = edit(pipe, trials, "moved", 0, 2, "fp32")
    for each, picture, pixels in zip(trials, pictures, hidden, strict=True):
        assert np.array_equal(picture[~pixels], each.picture[~pixels]) and 0 < pixels.mean() < 1
    judge = Judge.of(Fixed(), Fixed.categories)
    before, after = (look(judge, each, 0.5) for each in ([one.picture for one in trials], pictures))
    assert before[0].names == ["dog"] and before[0].boxes.tolist() == [[0, 0, 0.25, 0.25]]
    counts = answers(trials, hidden, before, after, "moved")
    weights = np.array([[1, 1], [2, 0]])
    row = {"drawn_share": 0.4} | {name: each.result(weights) for name, each in counts.items()}
    table = format_table({"rows": {"moved": row}, "num_objects": 2, "num_images": 3, "num_without_place": 1,
                          "num_too_large": 0})  # fmt: skip
    assert "| moved | 40 % | 0.0 [0.0, 0.0] of 2 | 100.0 [100.0, 100.0] of 2 |  |  |" in table


def test_the_sheet_shows_what_is_drawn_anew() -> None:
    one = trial()
    changes, scene = one.edited("removed")
    assert scene.prompt == "a sports ball" and changes.remove == ["dog:1"]
    after, edits = changes.of(CONFIG, scene, one.picture, "a")
    hidden = hidden_pixels(edits, 4)
    assert hidden[:12, :12].all() and hidden.sum() == 144
    shown = veiled(edits, 4)
    assert np.array_equal(shown[~hidden], one.picture[~hidden]) and shown[hidden].min() >= 191
    picture = sheet([Shown(one.scene, one.picture, edits, 4, after, one.picture, "removed")], side=64)
    assert picture.shape[1] == 3 * 64 + 4 * 8
    assert {type(example.changes) for example in EXAMPLES} == {Changes}
