"""Our MAR computes what the public MAR code does: encoder, decoder, losses, gradients, sampling, names and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.heads.diffloss import DiffusionNoise
from models.masking import TokenMask
from models.sampling.config import SamplingConfig
from models.sampling.guidance import embed_branches
from models.structmar import StructMAR, TrainingNoise, preset_config
from tests.helpers import reference
from tests.helpers.plain_sampler import PlainNoise
from tests.helpers.sampling import run_unmask

MASK = TokenMask(reference.tensors()["train.mask"].bool(), int(reference.tensors()["train.mask"][0].sum()))


def masked_rows(name: str) -> Tensor:
    """The reference's rows (all tokens, tiled) reduced to the masked ones in our order."""
    rows = reference.tensors()[f"train.{name}"]
    batch, repeats = MASK.masked.shape[0], reference.meta()["config"]["diffusion_batch_mul"]
    tiled = rows.view(repeats, batch, -1, *rows.shape[1:])
    ids = MASK.masked_ids()
    return torch.stack([tiled[:, image, ids[image]] for image in range(batch)], dim=1).flatten(0, 2)


@pytest.fixture
def model() -> StructMAR:
    return reference.tiny_model()


def test_encoder_and_decoder(model: StructMAR) -> None:
    data = reference.tensors()
    tokens = model.patchify(data["train.latents"])
    assert torch.equal(tokens, data["train.tokens"])
    assert torch.equal(model.unpatchify(tokens, model.config.grid), data["train.latents"])
    context = model.prepare(model.embed_conditions(2, labels=data["train.labels"]))
    encoded = model.encode(tokens, MASK.kept_ids(), context)
    assert reference.relative_error(encoded, data["train.encoder_out"]) < 1e-5
    decoded = model.decode(encoded, MASK.kept_ids(), context)
    assert reference.relative_error(decoded, data["train.decoder_out"]) < 1e-5


def test_token_loss(model: StructMAR) -> None:
    data = reference.tensors()
    repeats = model.config.diffusion_batch_mul
    target = data["train.tokens"].flatten(0, 1).repeat(repeats, 1)
    z = data["train.decoder_out"].flatten(0, 1).repeat(repeats, 1)
    loss = model.diffloss.token_loss(target, z, DiffusionNoise(data["train.timesteps"], data["train.noise"]))
    torch.testing.assert_close(loss, data["train.token_loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("structured", [False, True], ids=["mar", "structmar"])
def test_loss_and_gradients(structured: bool) -> None:
    data = reference.tensors()
    model = reference.tiny_model(**(reference.STRUCTURED if structured else {}))
    noise = TrainingNoise(MASK, DiffusionNoise(masked_rows("timesteps"), masked_rows("noise")))
    loss = model(data["train.latents"], noise, labels=data["train.labels"])
    torch.testing.assert_close(loss, data["train.loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in zip(reference.meta()["grad_names"], data["train.grad_norms"], strict=True):
        gradient = gradients[name]
        assert gradient is not None, name
        torch.testing.assert_close(
            gradient.norm(), norm, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def recorded_noise(index: int) -> PlainNoise:
    """The draws of a reference run. With guidance it drew for both halves per reverse step and used the first."""
    data, settings = reference.tensors(), reference.meta()["samples"][index]
    rows = data[f"sample{index}.noise_rows"].tolist()
    calls = list(data[f"sample{index}.noise_tape"].view(-1, 16).split(rows))
    batch = reference.meta()["batch"]

    def noise(_iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        drawn = [calls.pop(0)[: batch * num_tokens] for _ in range(num_draws)]
        return torch.stack(drawn).view(num_draws, batch, num_tokens, 16)

    assert len(calls) == settings["tape_calls"]
    return noise


def sample_with_recorded_noise(model: StructMAR, index: int) -> Tensor:
    settings = reference.meta()["samples"][index]
    config = SamplingConfig(
        num_iter=settings["num_iter"],
        num_sampling_steps=50,
        cfg_text=settings["cfg"],
        cfg_schedule=settings["cfg_schedule"],
        temperature=settings["temperature"],
    )
    data = reference.tensors()
    with torch.no_grad():
        branches, config = embed_branches(model, config, 2, None, None, data["train.labels"])
        tokens, _ = run_unmask(model, branches, data[f"sample{index}.orders"], recorded_noise(index), config)
        return model.unpatchify(tokens, model.config.grid)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("structured", [False, True], ids=["mar", "structmar"])
def test_sampling(index: int, structured: bool) -> None:
    model = reference.tiny_model(**(reference.STRUCTURED if structured else {}))
    expected = reference.tensors()[f"sample{index}.latents"]
    assert reference.relative_error(sample_with_recorded_noise(model, index), expected) < 1e-4


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_names_and_shapes_of_the_presets(name: str) -> None:
    manifest = json.loads((Path(__file__).parents[1] / "data" / "manifest.json").read_text())[name]
    with torch.device("meta"):
        model = StructMAR(preset_config(name, rope_mode="off"))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == manifest["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["params"]


@pytest.mark.parametrize("with_labels", [True, False])
def test_day_zero_law(with_labels: bool) -> None:
    """A StructMAR just built on MAR weights, without text and layout, is MAR: with labels and without."""
    data = reference.tensors()
    labels = data["train.labels"] if with_labels else None
    tokens = data["train.tokens"]

    def output(model: StructMAR) -> Tensor:
        context = model.prepare(model.embed_conditions(2, labels=labels))
        return model.predict(tokens, MASK.kept_ids(), context)

    plain, structured = reference.tiny_model(), reference.tiny_model(**reference.STRUCTURED)
    assert reference.relative_error(output(structured), output(plain)) < 1e-5


Perturb = Callable[[StructMAR], None]


def _gate(model: StructMAR) -> None:
    model.decoder_blocks[0].cross.gate.data.fill_(0.5)
    model.text_null.data.normal_()


def _rope(model: StructMAR) -> None:
    model.encoder_blocks[1].attn.rope_strength.data.fill_(0.5)


def _null(model: StructMAR) -> None:
    model.layout_embed.null.data.normal_()


@pytest.mark.parametrize("perturb", [_gate, _rope, _null])
def test_day_zero_law_can_fail(perturb: Perturb) -> None:
    """Each new part matters once it leaves its initial value, so the law above checks something."""
    tokens = reference.tensors()["train.tokens"]
    model = reference.tiny_model(**reference.STRUCTURED)
    before = model.predict(tokens, MASK.kept_ids(), model.prepare(model.embed_conditions(2)))
    perturb(model)
    after = model.predict(tokens, MASK.kept_ids(), model.prepare(model.embed_conditions(2)))
    assert reference.relative_error(after, before) > 1e-4
