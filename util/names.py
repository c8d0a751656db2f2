"""Names of files that programs write and others look for. Nothing slow is imported here: command lines name them."""

from __future__ import annotations

LAST_NAME = "checkpoint-last.pth"
BEST_NAME = "checkpoint-best.safetensors"
METRICS_NAME = "metrics.jsonl"

MARS_ENTRY = "mars"  # of files of MARS weights, which are of no StructMAR: what they were made for

BEST_BY = ("eval/AP", "eval/AP50", "eval/mIoU", "eval/SR50", "eval/extra_rate")  # scores while training
LOWER_IS_BETTER = ("eval/extra_rate",)
