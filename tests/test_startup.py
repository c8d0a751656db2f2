"""A user who asks for help or mistypes waits for nothing: PyTorch and its kin are imported after the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.programs import PROGRAMS

MAX_CPU_S = 0.7  # with the interpreter itself
CODE = """
import json, resource, sys
import yaml
before = set(sys.modules)
import contextlib, importlib, io
module = sys.argv[1]
endings = []
for words in json.loads(sys.argv[2]):
    sys.argv = [module, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            said = end.code if isinstance(end.code, str) else err.getvalue()
            endings.append([end.code if isinstance(end.code, int) else 1, out.getvalue(), said])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([endings, sorted(set(sys.modules) - before), usage.ru_utime + usage.ru_stime]))
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_typos_import_nothing_slow(program: str) -> None:
    ways = [["--help"], ["--hepl"], ["--debug=3"]]
    finished = subprocess.run(
        [sys.executable, "-c", CODE, program, json.dumps(ways)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (asked, typo, value), modules, seconds = json.loads(finished.stdout)
    assert asked[0] in (0, None) and "--debug" in asked[1]
    assert (typo[0], value[0]) == (2, 2)
    assert "unrecognized arguments: --hepl; did you mean --help?" in typo[2] and typo[2].count("\n") == 1
    assert "--debug" in value[2] and value[2].count("\n") == 1
    ours = {"engine", "models", "scripts", "util", "main_mar", "main_rl"}
    names = {name.split(".")[0] for name in modules}
    assert names - ours - set(sys.stdlib_module_names) == set()
    assert seconds < MAX_CPU_S
