"""The house rules that a program can check: who imports whom, what may stand where, what is never written.

Each rule is a function from a source tree to the violations in it, tried on the repository and on planted mistakes.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.source_files import LAYERS, imported_modules, source_files

ROOMS = ("data", "train", "checkpoint", "plan", "sample", "eval", "rl", "page", "cli")
"""Of engine: each stands on those before it."""
MAX_LINES = 400
CLI = ("arguments", "arguments_rl", "arguments_scores", "validate", "sampling", "build", "build_train", "build_rl",
       "build_rl_parts", "build_reference", "build_reward_gradient", "arguments_edit", "build_sample", "build_page",
       "build_class", "sizes", "arguments_planner", "build_planner", "build_layout_scores", "build_evaluation",
       "build_cache", "build_scores", "build_distill", "build_few_step",
       "arguments_mars_sample", "build_mars_sample", "arguments_mars", "validate_mars", "build_mars")  # fmt: skip
NAMESPACE_READERS = {f"engine/cli/{name}.py" for name in CLI}
NAMESPACE_HANDLERS = {"util/config.py", "util/checkpoint.py", "engine/cli/main.py"}  # make, find and pass them on
TOP_LEVEL = {"main_mar.py", "main_rl.py", "models", "engine", "util", "configs", "scripts", "tests", "requirements.txt"}
TOP_LEVEL |= {"README.md"}
TOP_LEVEL_MAY = {"LICENSE", "pretrained_models"}
NOT_TRACKED = {"data", "output", "__pycache__"}
NUMPY_RANDOM = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox"}
MINI = re.compile(r"(?<![a-z])mini(?![a-z])", re.IGNORECASE)

Rule = Callable[[Path], list[str]]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def layering(root: Path) -> list[str]:
    found = []
    for name, path in source_files(root):
        module = name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        own = module.split(".")[0]
        anchor = module + ".__init__" if path.name == "__init__.py" else module
        for line, target in imported_modules(parsed(path), anchor):
            other = target.split(".")[0]
            if other == "tests":
                found.append(f"{name}:{line} imports {target}")
            if other not in LAYERS:
                continue
            is_one_package = anchor.count(".") > 1 and anchor.split(".")[:2] == target.split(".")[:2]
            is_same_lower_layer = own == other and LAYERS[own] < LAYERS["scripts"]
            if not (LAYERS[other] < LAYERS[own] or is_same_lower_layer or is_one_package):
                found.append(f"{name}:{line} imports {target}")
    return found


def rooms(root: Path) -> list[str]:
    """Every file of engine lies in a room, and imports only from its own and from those before it."""
    found = []
    for name, path in source_files(root):
        if not name.startswith("engine/") or name == "engine/__init__.py":
            continue
        room = name.split("/")[1]
        if room not in ROOMS:
            found.append(f"{name} lies in no room: {', '.join(ROOMS)}")
            continue
        for line, target in imported_modules(parsed(path), name.removesuffix(".py").replace("/", ".")):
            package, other, *_ = [*target.split("."), ""]
            if package == "engine" and other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
                found.append(f"{name}:{line} imports {target}")
    return found


def mini_world_stays_in_its_folder(root: Path) -> list[str]:
    """`mar_mini`, `maskgil_mini` and `fasterrcnn_mini` are names of model sizes, which are no secret."""
    found = []
    for name, path in source_files(root):
        if name.startswith("scripts/mini/"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MINI.search(re.sub("(mar|maskgil|fasterrcnn)_mini", "", line)):
                found.append(f"{name}:{number} {line.strip()}")
    return found


def namespace_stops_at_build(root: Path) -> list[str]:
    """Neither the type nor, whatever its annotation says, an attribute of something called `args`."""
    found = []
    for name, path in source_files(root):
        if LAYERS[name.split("/")[0].removesuffix(".py")] == 3 or name in NAMESPACE_READERS | NAMESPACE_HANDLERS:
            continue
        for node in ast.walk(parsed(path)):
            is_type = isinstance(node, ast.Attribute) and node.attr == "Namespace"
            is_imported = isinstance(node, ast.ImportFrom) and any(alias.name == "Namespace" for alias in node.names)
            is_read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
            if is_type or is_imported or is_read:
                found.append(f"{name}:{getattr(node, 'lineno', 0)} {ast.unparse(node)}")
    return found


def never_written(root: Path) -> list[str]:
    found = []
    for name, path in source_files(root):
        for node in ast.walk(parsed(path)):
            reason = _forbidden(node)
            if reason:
                found.append(f"{name}:{getattr(node, 'lineno', 0)} {reason}")
    return found


def _forbidden(node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        if text.startswith("torch.set_default_"):
            return text
        if re.fullmatch(r"(np|numpy)\.random\.\w+", text) and node.attr not in NUMPY_RANDOM:
            return f"{text}: numpy's global generator"
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "cuda":
            return ".cuda(): the device is an argument"
        if ast.unparse(function) == "getattr" and ast.unparse(node.args[0]).split(".")[-1] == "args":
            return "getattr(args, ...): the parser holds the default"
    return None


def short_files(root: Path) -> list[str]:
    found = []
    files = [
        *source_files(root),
        *((path.relative_to(root).as_posix(), path) for path in sorted((root / "tests").rglob("*.py"))),
    ]
    for name, path in files:
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length >= MAX_LINES:
            found.append(f"{name} has {length} lines, files stay under {MAX_LINES}")
    return found


def top_level(root: Path) -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        entries = {line.split("/")[0] for line in listing.stdout.splitlines()}
    else:  # an unpacked archive
        entries = {path.name for path in root.iterdir()} - NOT_TRACKED
    visible = {entry for entry in entries if not entry.startswith(".")}
    extra, missing = sorted(visible - TOP_LEVEL - TOP_LEVEL_MAY), sorted(TOP_LEVEL - visible)
    return [f"{name} does not belong there" for name in extra] + [f"{name} is missing" for name in missing]


RULES: list[Rule] = [
    layering,
    rooms,
    mini_world_stays_in_its_folder,
    namespace_stops_at_build,
    never_written,
    short_files,
    top_level,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def test_there_is_something_to_check() -> None:
    names = {name for name, _ in source_files(ROOT)}
    assert {"util/types.py", "models/__init__.py", "engine/__init__.py"} <= names


GOOD = {
    "util/boxes.py": "import util.types\nfrom util import rng\nfrom . import types\n",
    "util/draws.py": "import numpy as np\nr = np.random.default_rng(0)\n",
    "models/structmar.py": "from util.types import Layout\nfrom .blocks import Block\nNAME = 'mar_mini'  # minimum\n",
    "engine/cli/build.py": "import argparse\ndef f(args: argparse.Namespace) -> int:\n    return args.seed\n",
    "engine/train/loop.py": "import torch\nfrom models.structmar import StructMAR\nx = torch.cuda.is_available()\n",
    "scripts/sample.py": "from engine.sample.generate import Scene\n",
    "scripts/mini/draw.py": "from scripts.mini import scenes\nfrom engine.data.coco import Batch\n",
    "main_mar.py": "from engine import build\nimport argparse\nx: argparse.Namespace\n",
    "main_rl.py": "",
    "configs/a.yaml": "",
    "tests/test_a.py": "import scripts.mini.draw\n",
    "requirements.txt": "",
    "README.md": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_good_tree_passes(tree: Path) -> None:
    assert [problem for rule in RULES for problem in rule(tree)] == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (layering, "util/a.py", "from models import structmar"),
        (layering, "util/a.py", "def f():\n    import engine.train.loop"),
        (layering, "util/a.py", "from tests import conftest"),
        (layering, "models/a.py", "import engine"),
        (layering, "models/a.py", "from ..engine import train"),
        (layering, "models/__init__.py", "from scripts.sample import main"),
        (layering, "engine/a.py", "import main_mar"),
        (layering, "engine/a.py", "from scripts import sample"),
        (layering, "scripts/a.py", "from scripts.sample import main"),
        (layering, "scripts/a.py", "from . import sample"),
        (layering, "scripts/a.py", "import scripts.mini.draw"),
        (layering, "scripts/mini/b.py", "import scripts.other.draw"),
        (layering, "scripts/a.py", "from main_mar import main"),
        (layering, "scripts/mini/a.py", "from scripts import sample"),
        (rooms, "engine/data/a.py", "from engine.train.loop import train"),
        (rooms, "engine/sample/a.py", "def f():\n    import engine.eval.run"),
        (rooms, "engine/rl/a.py", "from ..cli import build"),
        (rooms, "engine/a.py", ""),
        (layering, "main_rl.py", "import main_mar"),
        (layering, "main_rl.py", "from scripts.sample import main"),
        (mini_world_stays_in_its_folder, "engine/a.py", "ROOT = 'data/mini_coco'"),
        (mini_world_stays_in_its_folder, "scripts/a.py", "# the Mini world"),
        (namespace_stops_at_build, "engine/a.py", "import argparse\ndef f(x: argparse.Namespace): ..."),
        (namespace_stops_at_build, "models/a.py", "from argparse import Namespace"),
        (namespace_stops_at_build, "util/a.py", "def f(args):\n    return args.seed"),
        (never_written, "models/a.py", "x = x.cuda()"),
        (never_written, "engine/cli/build.py", "x = getattr(args, 'seed', 0)"),
        (never_written, "engine/a.py", "x = getattr(self.args, 'seed')"),
        (never_written, "main_mar.py", "import torch\ntorch.set_default_dtype(torch.float64)"),
        (never_written, "util/a.py", "import numpy as np\nx = np.random.rand(3)"),
        (never_written, "util/a.py", "try:\n    x\nexcept:\n    pass"),
        (short_files, "engine/a.py", "\n" * MAX_LINES),
        (short_files, "tests/test_b.py", "\n" * MAX_LINES),
        (top_level, "train.py", ""),
        (top_level, "docs/index.md", ""),
    ],
)
def test_planted_mistakes_are_found(tree: Path, rule: Rule, name: str, text: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)
    problems = rule(tree)
    assert len(problems) == 1 and problems[0].startswith(name.split("/")[0] if rule is top_level else name)


def test_a_missing_part_is_found(tree: Path) -> None:
    (tree / "README.md").unlink()
    assert top_level(tree) == ["README.md is missing"]
