"""The trainings of MARS, by name. Nothing slow is imported here: command lines name them."""

from __future__ import annotations

JOINT, REFINE = "joint", "refine"
STAGES = (JOINT, REFINE)
"""Drawing and describing together; drawing alone, from the weights of the first."""
