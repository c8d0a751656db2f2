"""The trainings of MARS, by name. Nothing slow is imported here: command lines name them."""

from __future__ import annotations

JOINT, REFINE, UPSCALE = "joint", "refine", "upscale"
STAGES = (JOINT, REFINE, UPSCALE)
"""Drawing and describing together; drawing alone, from the weights of the first; drawing larger what was drawn small,
by a second set of experts and tables that starts from one of the others."""
