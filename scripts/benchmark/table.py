"""One table for everything that is timed: a row per contender of a case, with what it did and how far off the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from torch import Tensor

from scripts.benchmark.counting import Counts, count
from scripts.benchmark.timing import Ceilings, Times, interleave
from scripts.benchmark.world import World

PUBLIC, PLAIN, OURS = "public code", "plain path", "ours"


@dataclass(frozen=True)
class Contender:
    """Who runs a case, and how. run: what is timed. output: what is compared, if that is not what the first `run`
    returns."""

    who: str
    precision: str
    run: Callable[[], Tensor]
    output: Callable[[], Tensor] | None = None


class Case(Protocol):
    """model: a name of `available_models`. images: of a batch, group_size of each prompt."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def images(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def contenders(self, world: World, public: ModuleType | None) -> list[Contender]:
        """public: the module of `load_baseline`; None leaves its rows out."""


@dataclass(frozen=True)
class Row:
    """ratios: how many times faster than others of the case, by their name. relative_mse: of the output, against the
    case's first contender. matmul_share, copy_share: of the measured ceilings (above 1: caches held the weights)."""

    case: str
    images: int
    who: str
    precision: str
    times: Times
    ratios: Mapping[str, float]
    relative_mse: float
    counts: Counts
    matmul_share: float
    copy_share: float


def measure(case: str, images: int, contenders: Sequence[Contender], repeats: int, ceilings: Ceilings) -> list[Row]:
    """Every contender runs once to warm up, count and compare; then they take turns, `repeats` times."""
    outputs = [None if contender.output is None else contender.output() for contender in contenders]
    counts = []
    for index, contender in enumerate(contenders):
        first, counted = count(contender.run)
        counts.append(counted)
        outputs[index] = first if outputs[index] is None else outputs[index]
    times = interleave({index: contender.run for index, contender in enumerate(contenders)}, repeats)
    medians = {f"{other.who} {other.precision}": times[index].median for index, other in enumerate(contenders)}
    rows = []
    for index, contender in enumerate(contenders):
        seconds = times[index].median
        rows.append(
            Row(
                case=case,
                images=images,
                who=contender.who,
                precision=contender.precision,
                times=times[index],
                ratios={name: median / seconds for name, median in medians.items()},
                relative_mse=relative_mse(outputs[index], outputs[0]),
                counts=counts[index],
                matmul_share=counts[index].flops / seconds / ceilings.matmul[contender.precision],
                copy_share=counts[index].product_bytes / seconds / ceilings.copy,
            )
        )
    return rows


def relative_mse(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None and found.shape == expected.shape
    difference = (found.double() - expected.double()).square().mean()
    return float(difference / expected.double().square().mean())


def label(case: Case) -> str:
    return f"{case.name}, batch {case.images}"


HEADER = (
    "case", "batch", "who", "seconds", "fastest", "x first", "x public bf16", "x plain", "rel. MSE", "GFLOP",
    "of matmul", "of copy",
)  # fmt: skip


def line(values: Sequence[str]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(values)} |"


def cells(row: Row) -> list[str]:
    """See `Row`; "x first": how many times faster than the case's first contender, to which the output is compared."""

    def ratio(name: str) -> str:
        return f"{row.ratios[name]:.2f}" if name in row.ratios else ""

    return [
        row.case,
        str(row.images),
        f"{row.who}, {row.precision}",
        f"{row.times.median:.3f}",
        f"{row.times.fastest:.3f}",
        f"{next(iter(row.ratios.values())):.2f}",
        ratio(f"{PUBLIC} bf16"),
        ratio(f"{PLAIN} fp32"),
        f"{row.relative_mse:.0e}",
        f"{row.counts.flops / 1e9:.4g}",
        f"{row.matmul_share:.0%}",
        f"{row.copy_share:.0%}",
    ]
