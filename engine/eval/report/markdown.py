"""Tables in Markdown that are also readable in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; the first column is text, aligned left, the others are numbers."""
    rows = [[one_line(cell) for cell in line] for line in (header, *body)]
    widths = [max(len(line[index]) for line in rows) for index in range(len(header))]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    lines = [_line(line, widths) for line in rows]
    return [lines[0], rule, *lines[1:]]


def one_line(text: str) -> str:
    """The text as a cell: on one line, without a bar."""
    return " ".join(text.split()).replace("|", "\\|")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *others]) + " |"
