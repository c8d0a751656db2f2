"""What loads and samples weights stands below what trains them."""

import subprocess
import sys

from tests.conftest import ROOT


def test_sampling_does_not_import_the_trainer() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in [ROOT / "engine/checkpoint/load.py", *sorted((ROOT / "engine" / "sample").glob("[!_]*.py"))]
    ]
    lines = [*(f"import {module}" for module in modules), "import sys"]
    lines += ["found = [name for name in sys.modules if name.startswith(('engine.train', 'engine.checkpoint.resume'))]"]
    lines += ["assert not found, found"]
    code = "\n".join(lines)
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
