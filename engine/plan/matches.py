"""Do proposed layouts hold what the real ones hold? Classes and their numbers alone, wherever the boxes are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from util.types import Layout


def class_matches(proposed: Layout, real: Layout) -> int:
    """Boxes that have a partner of their class."""
    shared = Counter(proposed.categories.tolist()) & Counter(real.categories.tolist())
    return shared.total()


def class_f1(proposed: Sequence[Layout], real: Sequence[Layout]) -> float:
    """2 M / (P + R): matches, proposed and real boxes of all images together; NaN where there is no box."""
    pairs = list(zip(proposed, real, strict=True))
    boxes = sum(len(mine) + len(other) for mine, other in pairs)
    return 2 * sum(class_matches(mine, other) for mine, other in pairs) / boxes if boxes else math.nan
