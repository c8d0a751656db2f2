"""The source files of the repository and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS = {"util": 0, "models": 1, "engine": 2, "scripts": 3, "main_mar": 3, "main_rl": 3}


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(path from the root, path) of every source file, tests apart."""
    for layer in LAYERS:
        single = root / f"{layer}.py"
        for path in [single] if single.is_file() else sorted((root / layer).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def imported_modules(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
