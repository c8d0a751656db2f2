"""Times the sampler against its plain reference (`tests/plain_sampler.py`): same weights, same noise, one process.

Runs alternate (plain, ours, plain, ours, ...), so that a busy machine slows both alike; the medians' ratio is reported,
with the difference of the outputs in the same row. Pin it to a core: `taskset -c 1 python -m scripts.benchmark`.
Cases: a trained model, if given (`--weights`), and slices of mar_base on random weights: some iterations of a schedule
of 64, few reverse steps. A slice with one reverse step is the backbone, nearly alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.weights import load_for_sampling
from models.masking import sample_orders
from models.sampling import SamplingConfig, embed_branches, uncover
from models.structmar import StructMAR, preset_config
from util.types import Layout, LayoutBatch, TextContext

NUM_TEXT = 14  # tokens of a caption


@dataclass(frozen=True)
class Case:
    """One row of the table. is_trained: the given weights. iterations: those of the schedule that run; None: all."""

    name: str
    is_trained: bool
    batch_size: int
    sampling: SamplingConfig
    iterations: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Row:
    """Seconds are medians. ratio: plain / ours. relative_mse: of the tokens."""

    name: str
    batch_size: int
    plain_seconds: float
    seconds: float
    ratio: float
    relative_mse: float


def cases() -> list[Case]:
    """Scales of 1 are one guidance branch, equal scales two, unequal ones three."""
    plain = SamplingConfig(num_iter=8, num_sampling_steps=25, t_max=950)
    guided = replace(plain, cfg_text=3.0, cfg_layout=3.0)
    sliced = replace(guided, num_iter=64)
    return [
        Case("trained, no guidance", True, 1, plain),
        Case("trained, guidance", True, 1, guided),
        Case("trained, two scales", True, 1, replace(plain, cfg_text=1.5, cfg_layout=3.0)),
        Case("trained, guidance", True, 8, guided),
        Case("mar_base slice, 25 steps", False, 1, sliced, (40,)),
        Case("mar_base slice, 1 step", False, 1, replace(sliced, num_sampling_steps=1), (40,)),
    ]


def random_model() -> StructMAR:
    model = StructMAR(preset_config("mar_base", num_categories=80, text_dim=512)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # zero gates and outputs would hide differences
                parameter.normal_(std=0.02, generator=generator)
    return model


def conditions(model: StructMAR, batch_size: int) -> tuple[TextContext, LayoutBatch]:
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(NUM_TEXT, model.config.text_dim, generator=generator) for _ in range(batch_size)]
    layout = Layout(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.55, 0.2, 0.95, 0.9]]), torch.tensor([1, 3]))
    return TextContext.collate(text), LayoutBatch.collate([layout] * batch_size, model.config.max_objects)


@torch.no_grad()
def measure(case: Case, model: StructMAR, plain_uncover: Callable[..., Tensor], repeats: int) -> Row:
    """Alternates the two samplers; the first run of each warms up and is not counted."""
    config, size = model.config, case.batch_size
    text, layout = conditions(model, size)
    orders = sample_orders(size, config.num_tokens, [torch.Generator().manual_seed(2)])

    def noise(iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        shape = (num_draws, size, num_tokens, config.token_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(iteration))

    def chosen(iterations: Iterable[int]) -> Iterable[int]:
        return iterations if case.iterations is None else case.iterations

    seconds: dict[Callable[..., Tensor], list[float]] = {plain_uncover: [], uncover: []}
    tokens = {}
    for _ in range(repeats + 1):
        for sampler, times in seconds.items():
            start = time.perf_counter()
            branches, sampling = embed_branches(model, case.sampling, size, text, layout, None)
            tokens[sampler] = sampler(model, branches, orders, noise, sampling, chosen)
            times.append(time.perf_counter() - start)
    plain, ours = (statistics.median(times[1:]) for times in seconds.values())
    expected = tokens[plain_uncover]
    error = float((tokens[uncover] - expected).square().mean() / expected.square().mean())
    return Row(case.name, size, plain, ours, plain / ours, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="an exported model or a training checkpoint")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each sampler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain_uncover = importlib.import_module(
        "tests.plain_sampler"
    ).plain_uncover  # a reference only: it lives with tests
    chosen = [case for case in cases() if args.only in case.name and (args.weights or not case.is_trained)]
    models = {True: load_for_sampling(args.weights).model} if args.weights else {}
    if not all(case.is_trained for case in chosen):
        models[False] = random_model()
    rows = []
    print(f"{'case':28} {'images':>6} {'plain':>9} {'ours':>9} {'ratio':>6} {'rel. MSE':>9}", flush=True)
    for case in chosen:
        row = measure(case, models[case.is_trained], plain_uncover, args.repeats)
        rows.append(row)
        times = f"{row.plain_seconds:8.3f}s {row.seconds:8.3f}s {row.ratio:6.2f}"
        print(f"{row.name:28} {row.batch_size:6} {times} {row.relative_mse:9.1e}", flush=True)
    if args.output:
        about = {"torch": torch.__version__, "threads": args.threads, "repeats": args.repeats}
        args.output.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
