"""A model, inputs and a run small enough for many steps a second."""

from __future__ import annotations

import torch

from engine.data.inputs import StepInputs
from models.heads.diffloss import DiffusionNoise
from models.masking import TokenMask
from models.structmar import StructMAR, TrainingNoise, preset_config
from models.weights import select_trainable
from tests.helpers.tiny_run import SIZES
from util.distributed import DistInfo
from util.types import Layout, LayoutBatch, TextContext

CPU = DistInfo(0, 1, 0, torch.device("cpu"))


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


SMALLER = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in TINY.items()}


CONFIG = preset_config("mar_mini", **SIZES, **SMALLER, num_categories=3, text_dim=6)


def tiny_model(mode: str = "full") -> StructMAR:
    """With every part in play: no gate closed, no projection zero."""
    torch.manual_seed(3)
    model = StructMAR(CONFIG)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith(("gate", "rope_strength")):
            torch.nn.init.constant_(parameter, 0.5)
    select_trainable(model, mode)
    return model


def tiny_inputs(batch_size: int, seed: int = 0, dropped: bool = False) -> StepInputs:
    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, 4, 4, 4, generator=draws)
    text = TextContext.collate([torch.randn(2 + row % 3, 6, generator=draws) for row in range(batch_size)])
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4]])
    rows = [Layout(boxes[: 1 + row % 2], torch.tensor([row % 3, 2])[: 1 + row % 2]) for row in range(batch_size)]
    layout = LayoutBatch.collate(rows, CONFIG.max_objects)
    if dropped:
        everything = torch.ones(batch_size, dtype=torch.bool)
        text, layout = text.dropped(everything), layout.dropped(everything)
    return StepInputs(latents, text=text, layout=layout)


def rows_of(inputs: StepInputs, rows: slice | list[int]) -> StepInputs:
    text, layout = inputs.text, inputs.layout
    assert text is not None
    assert layout is not None
    return StepInputs(
        inputs.latents[rows],
        text=TextContext(text.tokens[rows], text.valid[rows], text.pooled[rows]),
        layout=LayoutBatch(layout.boxes_xyxy[rows], layout.categories[rows], layout.valid[rows]),
    )


def rows_of_noise(noise: TrainingNoise, rows: slice) -> TrainingNoise:
    """diffusion_batch_mul is 1 here: noise lies image by image."""
    mask, head = noise.mask, noise.head
    assert isinstance(head, DiffusionNoise)
    of_images = slice(rows.start * mask.num_masked, rows.stop * mask.num_masked)
    part = TokenMask(mask.masked[rows], mask.num_masked)
    return TrainingNoise(part, DiffusionNoise(head.timesteps[of_images], head.noise[of_images]))


def gradients(model: StructMAR) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
