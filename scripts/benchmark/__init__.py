"""python -m scripts.benchmark (see `scripts/benchmark/cli.py`)."""

from scripts.benchmark.cli import main

__all__ = ["main"]
