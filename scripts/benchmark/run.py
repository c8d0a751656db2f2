"""What `python -m scripts.benchmark` does, once its command line is read: measure, print, write."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from scripts.benchmark import curves, operations, plot, table
from scripts.benchmark.baseline import load_baseline
from scripts.benchmark.curves import Curve
from scripts.benchmark.operations import LoopOperations
from scripts.benchmark.policy_update import UPDATE_CASES
from scripts.benchmark.sampling import ROLLOUT_CASES, SAMPLING_CASES
from scripts.benchmark.table import Case, Row, label, line, measure
from scripts.benchmark.timing import Ceilings, measure_ceilings
from scripts.benchmark.training import TRAINING_CASES
from scripts.benchmark.world import TRAINED, TRAINED_MAR, Models, available_models, build_world
from util.extras import import_extra
from util.images import save_png

CASES: dict[str, Sequence[Case]] = {
    "sampling": SAMPLING_CASES,
    "rollout": ROLLOUT_CASES,
    "training": TRAINING_CASES,
    "update": UPDATE_CASES,
}


def run(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError before anything is measured."""
    chosen = [case for part in args.parts for case in CASES.get(part, ()) if label(case).startswith(args.only)]
    if args.only and not chosen:
        names = "; ".join(label(case) for part in args.parts for case in CASES.get(part, ()))
        raise ValueError(f"no case begins with --only {args.only!r}, there are: {names}")
    torch.set_num_threads(args.threads)
    if args.output_dir is not None:
        import_extra("matplotlib", "plots")
    public = load_public(args.baseline)
    models = available_models(args.weights, args.mar_weights, args.mar_size)
    for name in {case.model for case in chosen if case.model in models} & {TRAINED, TRAINED_MAR}:
        models[name]()  # read once before anything is timed, so that bad files are named now
    ceilings = measure_ceilings()
    report = Report(about(args.threads, args.repeats), ceilings, args.output_dir)
    report.say(describe(args.threads, args.repeats, ceilings))
    time_cases(chosen, models, public, args.repeats, report)
    if "operations" in args.parts:
        count_loops(public, report)
    if "curves" in args.parts:
        measure_curves(report)
    report.say(f"\n{say_ceilings(report.ceilings)}")
    report.save()
    if args.output_dir is not None:
        print(f"\nwritten to {args.output_dir}")


class Report:
    """What is printed as it comes, and kept; `save` writes it, so that a run that is killed leaves what it has."""

    def __init__(self, about: dict[str, object], ceilings: Ceilings, output_dir: Path | None) -> None:
        self.about, self.ceilings, self.output_dir = about, ceilings, output_dir
        self.text = ""
        self.rows: list[Row] = []
        self.operations: list[LoopOperations] = []
        self.curves: list[Curve] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.text += text + "\n"

    def begin_table(self, header: Sequence[str]) -> None:
        self.say("\n" + line(header) + "\n" + line(["---"] * len(header)))

    def save(self) -> None:
        """benchmark.json, benchmark.md and, of what was timed, benchmark.png."""
        if self.output_dir is None:
            return
        content = {
            "about": self.about,
            "ceilings": asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
            "operations": [asdict(row) for row in self.operations],
            "curves": [asdict(curve) for curve in self.curves],
        }
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.output_dir / "benchmark.md").write_text(self.text, encoding="utf-8")
        if self.rows or self.curves:
            save_png(plot.plot(self.rows, self.curves), self.output_dir / "benchmark.png")


def load_public(path: Path | None) -> ModuleType | None:
    if path is None:
        print("no --baseline: the rows of the public code are left out")
        return None
    return load_baseline(path)


def about(threads: int, repeats: int) -> dict[str, object]:
    cores = len(os.sched_getaffinity(0))
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": cores,
        "threads": threads,
        "repeats": repeats,
    }


def describe(threads: int, repeats: int, ceilings: Ceilings) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in about(threads, repeats).items())
    return f"{facts}\n{say_ceilings(ceilings)}"


def say_ceilings(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.matmul.items())
    return f"ceilings: matmul {rates}; copy {ceilings.copy / 1e9:.1f} GB/s"


def time_cases(cases: Sequence[Case], models: Models, public: ModuleType | None, repeats: int, report: Report) -> None:
    """One model at a time is in memory. The ceilings are measured again before each case, and the best ones count."""
    if cases:
        report.begin_table(table.HEADER)
    for case in cases:
        if case.model not in models:
            missing = [case.name, str(case.images), f"left out: no weights of {case.model}"]
            report.say(line([*missing, *[""] * (len(table.HEADER) - len(missing))]))
            continue
        world = build_world(models[case.model](), case.images, case.group_size)
        report.ceilings = report.ceilings.best_of(measure_ceilings())
        for row in measure(case.name, case.images, case.contenders(world, public), repeats, report.ceilings):
            report.say(line(table.cells(row)))
            report.rows.append(row)
        report.save()


def count_loops(public: ModuleType | None, report: Report) -> None:
    report.begin_table(operations.HEADER)
    report.operations = operations.all_operations(public)
    for row in report.operations:
        report.say(line(operations.cells(row)))
    report.say(f"\nhead shapes in a schedule of 64 iterations and 256 tokens: {operations.head_shapes(256, 64)}")
    report.save()


def measure_curves(report: Report) -> None:
    report.begin_table(curves.HEADER)
    for name in curves.CURVES:
        if not curves.can_run(name):
            report.say(line([name, "left out: fewer cores than threads", ""]))
            continue
        report.curves.append(curves.measure_curve(name))
        report.say(line(curves.cells(report.curves[-1])))
        report.save()
