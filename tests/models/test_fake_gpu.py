"""A pretended GPU: on a machine without one, FakeTensorMode follows devices and shapes through model, loss and sampler.

An operation on mixed devices raises, and so does a read of a value (`.item()`, `nonzero`): a host sync.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.heads.diffloss import DiffusionNoise
from models.heads.diffusion_sampler import Trace
from models.heads.discrete import NoNoise
from models.heads.discrete_sampler import CodeTrace
from models.masking import TokenMask
from models.policy.base import Estimator, Samples, ScoringNoise
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.auto_layout import AutoLayout
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.controls import NoControls
from models.sampling.guidance import embed_branches
from models.sampling.sampler import SamplingRun, unmask
from models.structmar import StructMAR, StructMARConfig, TrainingNoise, preset_config
from tests.helpers.sampling import run_unmask
from util.types import LayoutBatch, TextContext

CONFIG = preset_config("mar_mini", num_categories=12, text_dim=64, diffusion_batch_mul=2)
BATCH, SLOTS, TOKENS = 3, CONFIG.max_objects, 7


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def build(config: StructMARConfig = CONFIG) -> StructMAR:
    with torch.device("cuda"):
        return StructMAR(config)


def conditions_on_gpu() -> tuple[TextContext, LayoutBatch]:
    text = TextContext(
        torch.randn(BATCH, TOKENS, 64, device="cuda"),
        torch.ones(BATCH, TOKENS, dtype=torch.bool, device="cuda"),
        torch.randn(BATCH, 64, device="cuda"),
    )
    layout = LayoutBatch(
        torch.rand(BATCH, SLOTS, 4, device="cuda"),
        torch.zeros(BATCH, SLOTS, dtype=torch.int64, device="cuda"),
        torch.ones(BATCH, SLOTS, dtype=torch.bool, device="cuda"),
    )
    return text, layout


class Copies(TorchDispatchMode):
    """Notes every operation that makes a tensor on the GPU from one on the CPU, or the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ({t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)} for tree in (args, result))
        if given and made and given != made:
            self.seen.append(str(func))
        return result


def test_the_mode_finds_mixed_devices_and_syncs() -> None:
    """Otherwise the tests below would prove nothing."""
    there = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="device"):
        there + torch.ones(2)
    with pytest.raises(DataDependentOutputException):
        there.sum().item()


def test_loss() -> None:
    model = build()
    text, layout = conditions_on_gpu()
    mask = TokenMask(torch.ones(BATCH, CONFIG.num_tokens, dtype=torch.bool, device="cuda"), 50)
    rows = CONFIG.diffusion_batch_mul * BATCH * 50
    noise = DiffusionNoise(
        torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.randn(rows, CONFIG.token_dim, device="cuda")
    )
    latents = torch.randn(BATCH, 16, 8, 8, device="cuda")
    loss = model(latents, TrainingNoise(mask, noise), text=text, layout=layout)
    assert loss.device.type == "cuda" and loss.shape == ()
    labels = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
    assert model(latents, TrainingNoise(mask, noise), labels=labels).device.type == "cuda"


FEWER = {"num_sampling_steps_last": 2, "guidance_interval": (0.2, 1.0), "uncond_refresh": 3, "order": "halton"}


@pytest.mark.parametrize("options", [{}, FEWER], ids=["plain", "fewer"])
@pytest.mark.parametrize(
    ("scales", "dtype"),
    [((1.0, 1.0), torch.float32), ((2.0, 2.0), torch.bfloat16), ((1.5, 3.0), torch.float32)],
    ids=str,
)
def test_sampling_loop(scales: tuple[float, float], dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The whole loop: nothing left on the CPU, no value read back, and nothing copied over once it has begun."""
    model = build().eval()
    text, layout = conditions_on_gpu()
    config = SamplingConfig(8, 5, cfg_text=scales[0], cfg_layout=scales[1], clip_x0=5.0, **options)
    orders = torch.zeros(BATCH, CONFIG.num_tokens, dtype=torch.int64, device="cuda")

    def noise(_iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        return torch.randn(num_draws, BATCH, num_tokens, CONFIG.token_dim).to("cuda")  # drawn on the host

    copies = Copies()

    def iterations() -> Iterator[int]:
        assert copies.seen  # the noise
        copies.seen.clear()
        yield from range(8)

    with torch.no_grad(), copies:
        branches, config = embed_branches(model, config, BATCH, text, layout, None)
        tokens, trace = run_unmask(
            model, branches, orders, noise, config, dtype=dtype, record=not options, iterations=iterations()
        )
    assert copies.seen == []
    assert tokens.device.type == "cuda" and (trace is None or trace.states.device.type == "cuda")
    assert model.unpatchify(tokens, CONFIG.grid).shape == (BATCH, 16, 8, 8)


CODES = default_sampling("discrete", num_iter=3, cfg_text=1.5, cfg_layout=3.0, top_k=10, top_p=0.9)
UNMASKED = {count: CODES.masked_counts(count) for count in (16, 64)}  # before anything is pretended
SINGLE = {"trunk": "single", "encoder_depth": 0, "learned_pos": False}


@pytest.mark.parametrize("counts", [(3, 50, 17), None])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_loss_of_codes(patch_size: int, counts: tuple[int, ...] | None) -> None:
    """Rows that hide different numbers of codes are scored without a look at the mask."""
    config = preset_config("maskgil_mini", patch_size=patch_size, vae_stride=8 // patch_size)
    model = build(config)
    num_units = math.prod(config.unit_grid())
    mask = TokenMask(torch.ones(BATCH, num_units, dtype=torch.bool, device="cuda"), 50, counts)
    latents = torch.zeros(BATCH, 1, *config.unit_grid(), device="cuda")
    loss = model(latents, TrainingNoise(mask, NoNoise()), labels=torch.zeros(BATCH, dtype=torch.int64, device="cuda"))
    assert loss.device.type == "cuda" and loss.shape == ()


@pytest.mark.parametrize(("trunk", "order"), [({"patch_size": 2}, "halton"), (SINGLE, "confidence")], ids=str)
def test_sampling_loop_of_codes(trunk: dict[str, Any], order: str) -> None:
    """The noise of all iterations is drawn before the first; then nothing is read back or copied over."""
    codes = {"head": "discrete", "vae_embed_dim": 1, "codebook_size": 50, "diffusion_batch_mul": 1}
    config = replace(CONFIG, **{"encoder_depth": 1, "decoder_depth": 2} | codes | trunk)
    model, copies = build(config).eval(), Copies()
    text, layout = conditions_on_gpu()
    generators = [torch.Generator()] * BATCH

    def iterations() -> Iterator[int]:
        copies.seen.clear()
        yield from range(3)

    with torch.no_grad(), copies:
        branches, sampling = embed_branches(model, replace(CODES, order=order), BATCH, text, layout, None)
        run = SamplingRun(model, branches, sampling, generators, NoControls(), torch.bfloat16, record=True)
        own = run.own_order(UNMASKED[math.prod(config.unit_grid())])
        tokens, orders, trace = unmask(run, run.start(), own, iterations=iterations())
    assert copies.seen == []
    assert isinstance(trace, CodeTrace)
    assert {part.device.type for part in (tokens, orders, trace.log_probs)} == {"cuda"}


@pytest.mark.parametrize("is_dropped", [False, True])
def test_auto_layout_guidance(is_dropped: bool) -> None:
    """Maps are seen, and masks or their boxes made of them, without a value read back or copied over."""
    codes = {"head": "discrete", "vae_embed_dim": 1, "codebook_size": 50, "diffusion_batch_mul": 1}
    config = replace(CONFIG, **{"decoder_depth": 2} | codes | SINGLE)
    model, copies = build(config).eval(), Copies()
    text, layout = conditions_on_gpu()
    options = replace(CODES, mask_threshold=0.5, start_step=1, auto_update=True, drop_grounding_tokens=is_dropped)
    words = torch.ones(BATCH, text.valid.shape[1] + 1, config.max_objects, device="cuda")

    def iterations() -> Iterator[int]:
        copies.seen.clear()
        yield from range(3)

    with torch.no_grad(), copies:
        branches, sampling = embed_branches(model, options, BATCH, text, layout, None)
        controls = AutoLayout(
            options, words, layout, lambda other: model.embed_conditions(BATCH, text=text, layout=other), math.inf
        )
        run = SamplingRun(model, branches, sampling, [torch.Generator()] * BATCH, controls, torch.bfloat16)
        tokens, _, _ = unmask(run, run.start(), run.own_order(UNMASKED[64]), iterations=iterations())
    assert copies.seen == [] and tokens.device.type == "cuda"
    assert controls.mean is not None and controls.mean.device.type == "cuda"


GUIDED = SamplingConfig(num_iter=6, num_sampling_steps=8, cfg_text=1.5, cfg_layout=3.0, clip_x0=5.0)


@pytest.mark.parametrize(
    "estimator", [ElboEstimator(num_iter=6, num_draws=2), TrajectoryEstimator(GUIDED, 2)], ids=["elbo", "trajectory"]
)
def test_log_probabilities(estimator: Estimator) -> None:
    """A pass of each estimator of continuous tokens."""
    model = build().eval()
    text, layout = conditions_on_gpu()
    with torch.device("cuda"), torch.no_grad():
        trace = Trace(torch.randn(BATCH, CONFIG.num_tokens, 9, 16), torch.randn(BATCH, CONFIG.num_tokens, 8))
        tokens, orders = torch.randn(BATCH, CONFIG.num_tokens, 16), torch.zeros(BATCH, CONFIG.num_tokens).long()
        ids = torch.zeros(BATCH, 4, dtype=torch.int64)
        draws = ScoringNoise(ids, ids, torch.zeros(BATCH, 4, 2).long(), torch.randn(BATCH, 4, 2, 16), (2, 3), 1)
        output = estimator.log_probs(model, Samples(tokens, orders, CONFIG.grid, text, layout, trace), draws)
    assert output.log_prob.device.type == "cuda" and output.mean.shape == (BATCH, 4, 2, 16)


def test_exact_log_probabilities_of_codes() -> None:
    """With all guidance branches; nothing is copied over in a pass."""
    codes = {"head": "discrete", "vae_embed_dim": 1, "codebook_size": 50, "diffusion_batch_mul": 1, "patch_size": 2}
    config = replace(CONFIG, **{"decoder_depth": 2, "code_dim": 8} | codes | SINGLE)
    model, copies = build(config).eval(), Copies()
    text, layout = conditions_on_gpu()
    scales = {"cfg_text": 1.5, "cfg_layout": 3.0}
    estimator = ExactEstimator(default_sampling("discrete", num_iter=6, order="random", schedule="mar", **scales), 6)
    with torch.device("cuda"), torch.no_grad(), copies:
        tokens, orders = torch.zeros(BATCH, 64, 1), torch.zeros(BATCH, 64).long()
        samples = Samples(tokens, orders, config.grid, text, layout, CodeTrace(torch.zeros(BATCH, 64)))
        passes = estimator.draw_noise(samples, torch.Generator())
        copies.seen.clear()
        log_prob = estimator.log_probs(model, samples, passes[2]).log_prob
        gap = estimator.replay_gap(samples, passes[2], log_prob)
    assert copies.seen == [] and log_prob.device.type == "cuda"
    assert log_prob.shape == (*passes[2].token_ids.shape, 1) and gap is not None and gap.device.type == "cuda"
