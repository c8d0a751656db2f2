"""Large numbers as people read them: FLOPs, durations, counts of things."""

from __future__ import annotations

FLOP_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def format_flops(flops: float) -> str:
    """With three significant digits in a fitting unit: "2.2e15" is "2.2 PFLOP"."""
    size, unit = next((pair for pair in FLOP_UNITS if flops >= pair[0]), FLOP_UNITS[-1])
    return f"{flops / size:.3g} {unit}" if flops < 1000 * size else f"{flops / size:,.0f} {unit}"


def format_duration(seconds: float) -> str:
    """In the largest unit that leaves at least one: "41 s", "12 minutes", "3.4 hours", "9.8 days"."""
    for size, unit, digits in ((86400, "days", 1), (3600, "hours", 1), (60, "minutes", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def format_count(number: int, noun: str, plural: str = "s") -> str:
    """ "1 image", "3,311,200 images"; plural: what the noun ends in then."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"
