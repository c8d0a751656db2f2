"""What a run folder notes about where it ran: enough to repeat the run, nothing that names the machine or its user."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Plain values: python, torch, the packages of requirements.txt (version installed, None if absent), git commit and
    whether tracked files differ from it (None outside a repository), command line, device and thread counts."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "packages": {name: _installed_version(name) for name in _required_packages()},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": _is_dirty(),
        "command": shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]]),
        "device": _device_name(torch.device(device)),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def memory_gb(device: torch.device) -> float:
    """The most that tensors took on a GPU since the program began, or what this process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _required_packages() -> list[str]:
    """Names in requirements.txt (none where the code was installed without it)."""
    path = _ROOT / "requirements.txt"
    if not path.exists():
        return []
    return re.findall(r"^([A-Za-z0-9][\w.-]*)\s*==", path.read_text(encoding="utf-8"), re.MULTILINE)


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """git's answer about the folder of this code; None without git or outside a repository."""
    try:
        result = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _is_dirty() -> bool | None:
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()
