"""--compile: compiled blocks and a compiled head give what eager ones give, whatever the number of visible tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import models.context
import models.heads.diffusion_sampler
from engine.train.parallel import compile_parts
from models.sampling.config import default_sampling
from models.sampling.sampler import sample
from models.weights import select_trainable
from tests.helpers import reference
from tests.helpers.family import LLAMA, family_model, some_latents
from tests.helpers.sampled import QUICK, conditions, sampled, world
from tests.helpers.structured import generator, some_layout, some_text, structured_model


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """What one test has compiled counts against the next one's limit of variants of a function."""
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """A minute of compilation; three draws have three numbers of visible tokens."""
    eager, compiled = structured_model(), structured_model()
    compile_parts(compiled)
    latents = reference.tensors()["train.latents"]
    sizes = set()
    for seed in (1, 3, 5):
        losses, gradients = [], []
        for model in (eager, compiled):
            chosen = select_trainable(model, "full")
            model.zero_grad()
            noise = model.sample_training_noise(2, generator(seed), 0.7)
            loss = model(latents, noise, text=some_text(), layout=some_layout())
            loss.backward()
            losses.append(loss.detach())
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in chosen.values()]))
            sizes.add(noise.mask.num_masked)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        assert reference.relative_error(gradients[1], gradients[0]) < 1e-4
    assert len(sizes) == 3


@pytest.mark.slow
def test_compiled_codes_equal_eager() -> None:
    """The blocks and the head of MaskGIL's family: a loss, its gradients and codes that are drawn."""
    options = {"num_categories": 5, "text_dim": 12, "patch_size": 2, "decoder_depth": 1} | LLAMA
    config = default_sampling("discrete", num_iter=3, cfg_text=2.0, cfg_layout=2.0)
    losses, gradients, codes = [], [], []
    for is_compiled in (False, True):
        model = family_model(**options).train()
        if is_compiled:
            compile_parts(model)
        noise = model.sample_training_noise(2, generator(1), 0.7)
        loss = model(some_latents(model), noise, text=some_text(), layout=some_layout())
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.code_head.out.weight.grad)
        codes.append(sample(model.eval(), config, [generator(1), generator(2)], some_text(), some_layout()).tokens)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert reference.relative_error(gradients[1], gradients[0]) < 1e-4
    assert (codes[0] == codes[1]).float().mean() > 0.95  # a draw at the edge between two codes may fall either way


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_sampling_equals_eager(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """aot_eager traces and runs the traced operations one by one: half a minute, where compiling takes minutes. A part
    that cannot be traced is an error here."""

    @lru_cache
    def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Any]:
        assert mode == "default"
        return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)

    for module in (models.context, models.heads.diffusion_sampler):
        monkeypatch.setattr(module, "compiled", compiled)
    eager = world("tiny")
    model = structured_model()
    compile_parts(model)
    run = partial(sampled, config=replace(QUICK, cfg_text=1.5, cfg_layout=3.0), dtype=dtype)
    text, layout = conditions(eager)
    expected, found = (run(each, text=text, layout=layout)[0] for each in (eager, model))
    error = float((found - expected).square().mean() / expected.square().mean())
    assert compiled.cache_info().misses == 2  # the blocks' and the head's
    assert error < (1e-10 if dtype == torch.float32 else 1e-2)


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(ValueError, match="CUDA device, not on cpu"):
        compile_parts(structured_model(), cuda_graphs=True)


@pytest.mark.slow
def test_compiled_blocks_follow_a_layout_that_fades() -> None:
    """With strengths of their own, and none once the layout is gone: values change, the compiled code does not."""
    layout = replace(some_layout(), scales=torch.tensor([[0.5, 2.0, 1.0, 1.0], [0.3, 1.0, 1.0, 1.0]]))
    config = replace(QUICK, num_iter=5, num_sampling_steps=2, cfg_text=1.5, cfg_layout=3.0, layout_schedule=(0.1, 0.4))
    eager, compiled = structured_model(), structured_model()
    compile_parts(compiled)
    expected, found = (
        sample(model, config, [generator(1), generator(2)], some_text(), layout).tokens for model in (eager, compiled)
    )
    assert reference.relative_error(found, expected) < 1e-4
