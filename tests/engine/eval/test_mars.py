"""What a look at MARS finds: losses that are the pictures' own, and captions that are a line each."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.eval.mars import HeldOut, MarsEvaluation, MarsLook, MarsPreview
from engine.train.mars import MarsState
from models.frozen.causal_lm import open_tokenizer
from models.frozen.codec import load_codec
from models.frozen.codes import CodeCodec
from models.mars.losses import MarsObjective
from models.mars.sampling import DrawOptions
from models.mars.words import CaptionWords
from tests.helpers.mars_world import MAX_TOKENS, SIDE, MarsWorld, tiny_model, write_mars
from tests.helpers.vq_file import TINY_VQ
from util.distributed import DistInfo
from util.ema import Ema
from util.logging import MetricWriter

CPU = torch.device("cpu")
CAPTIONS = ("a dog", "a red kite and a green umbrella on the beach", "apples", "two cats", "a blue car in the snow")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> MarsWorld:
    return write_mars(tmp_path_factory.mktemp("looks"))


@pytest.fixture(scope="module")
def look(world: MarsWorld) -> MarsLook:
    model, _ = tiny_model(world)
    objective = MarsObjective(model)
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    state = MarsState(objective, objective, trainable, torch.optim.SGD(trainable.values(), 0.1), Ema({}, 0.0))
    words = CaptionWords(open_tokenizer(world.lm, model.lm), MAX_TOKENS)
    return MarsLook(state, words, "fp32", DistInfo(0, 1, 0, CPU))


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    size = (len(CAPTIONS), (SIDE // 2) ** 2)
    codes = torch.randint(TINY_VQ.codebook_size, size, generator=torch.Generator().manual_seed(5))
    return HeldOut(range(len(CAPTIONS)), codes, {"": CAPTIONS})


def test_losses_are_means_over_pictures_however_many_are_in_a_batch(look: MarsLook, held_out: HeldOut) -> None:
    with look.opened():
        alone = MarsEvaluation(look, held_out, 1).losses(CAPTIONS)
        for batch_size in (2, 3, len(CAPTIONS)):
            assert MarsEvaluation(look, held_out, batch_size).losses(CAPTIONS) == pytest.approx(alone, rel=1e-5)
        each = [MarsEvaluation(look, replace(held_out, codes=held_out.codes[i : i + 1]), 9).losses(CAPTIONS[i : i + 1])
                for i in range(len(CAPTIONS))]  # fmt: skip
    for name, value in alone.items():
        assert value == pytest.approx(sum(losses[name] for losses in each) / len(each), rel=1e-5)


def test_what_is_told_is_a_line_a_picture_whatever_it_is(
    world: MarsWorld, look: MarsLook, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    codec, few = load_codec(world.vq), held_out.first(2)
    assert isinstance(codec, CodeCodec)
    preview = MarsPreview(look, few, codec, DrawOptions(), 0, 2, tmp_path)
    monkeypatch.setattr(MarsPreview, "tell", lambda self: ["a\tred\nkite", " two\r\n\n dogs"])
    with caplog.at_level(logging.INFO):
        preview(3, MetricWriter(None))
    told = (tmp_path / "step-0000003.txt").read_text(encoding="utf-8")
    assert told == "0\ta red kite\n1\ttwo dogs\n"
    assert caplog.messages[-1].endswith("picture 0: a red kite")
