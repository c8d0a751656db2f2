"""Layout files of any format, written as ours or as GLIGEN's. Labels may be anything: no model is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.layout_formats import FileFormat, FoundEntry, gligen_entry, read_entries
from engine.data.scenes import KnownLabels, read_entry
from util.output import write_text_atomic

ANY_LABEL = KnownLabels((), max_objects=10_000, has_phrases=True)


@dataclass(frozen=True)
class Converted:
    """How many entries were written, and why the others were left out."""

    written: int
    left_out: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"{self.written} entries" + (
            f"; left out {len(self.left_out)}, the first: {self.left_out[0]}" if self.left_out else ""
        )


def convert_layout(
    source: str | Path, output: str | Path, is_gligen: bool, said: FileFormat, prompt: str | None, leaves_out: bool
) -> Converted:
    """Reads `source`, writes `output`. prompt: replaces the entries' own. leaves_out: an entry that is wrong is left out,
    not an error. Raises FileNotFoundError or ValueError before anything is written."""
    wrong: list[str] = []

    def note(error: ValueError) -> None:
        wrong.append(str(error))

    def write(found: FoundEntry) -> dict[str, Any]:
        entry = read_entry(found.content, found.where, ANY_LABEL, prompt).to_dict()
        return gligen_entry(entry, found.where) if is_gligen else entry

    entries: list[dict[str, Any]] = []
    found = read_entries(source, said, is_prompt_given=prompt is not None, on_bad=note if leaves_out else None)
    for each in found:
        try:
            entries.append(write(each))
        except ValueError as error:
            if not leaves_out:
                raise
            note(error)
    if not entries:
        raise ValueError(f"no entry of {source} is left; the first one that is wrong: {wrong[0]}")
    write_text_atomic(Path(output), json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    return Converted(len(entries), tuple(wrong))
