"""What a run depends on outside this package: versions, processor, compiler, commit. For reports and bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from vte_compile.version import __version__

# Shown name -> distributions that provide it, in order of preference.
_PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "numpy": ("numpy",),
}


def environment() -> dict[str, Any]:
    """The environment as plain data; None where something is missing.

    ``versions`` by package, ``cpu`` (name, cores this process may use), ``threads`` (of torch), ``gpus`` (name, memory
    in bytes, compute capability), ``compiler`` (Inductor's for the CPU), ``commit`` (of the checkout this runs from).
    """
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"vte_compile": __version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": _usable_cores()},
        "threads": torch.get_num_threads(),
        "gpus": [
            {"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus
        ],
        "compiler": _compiler(),
        "commit": commit(),
    }


def _versions() -> dict[str, str | None]:
    return {name: _version(distributions) for name, distributions in _PACKAGES.items()}


def _version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception:  # whatever Inductor raises, it found none
        return None


def commit() -> str | None:
    """The commit of the checkout this runs from, with ``-dirty`` if it was changed; None if it was installed."""
    package = Path(__file__).resolve().parent
    root = _git(package, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != package.parent:  # a virtual environment inside some other repository
        return None
    head = _git(package, "rev-parse", "HEAD")
    return f"{head}-dirty" if head and _git(package, "status", "--porcelain", "--untracked-files=no") else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
