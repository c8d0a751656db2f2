"""--compile: compiled blocks give the loss and gradients of eager ones, whatever the number of visible tokens."""

from __future__ import annotations

import pytest
import torch

from engine.parallel import compile_blocks
from models.weights import select_trainable
from tests import reference
from tests.structured import generator, some_layout, some_text, structured_model


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """A minute of compilation; three draws have three numbers of visible tokens."""
    eager, compiled = structured_model(), structured_model()
    compile_blocks(compiled.fsdp_units())
    latents = reference.tensors()["train.latents"]
    sizes = set()
    for seed in (1, 3, 5):
        losses, gradients = [], []
        for model in (eager, compiled):
            chosen = select_trainable(model, "full")
            model.zero_grad()
            mask, draws = model.sample_training_draws(2, generator(seed), 0.7)
            loss = model(latents, mask, draws, text=some_text(), layout=some_layout())
            loss.backward()
            losses.append(loss.detach())
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in chosen.values()]))
            sizes.add(mask.num_masked)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        assert reference.relative_error(gradients[1], gradients[0]) < 1e-4
    assert len(sizes) == 3
