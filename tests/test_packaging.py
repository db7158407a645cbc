"""What `import vte_compile` gives: its public names, how little it loads, where subpackages are found, its version."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vte_compile

ROOT = Path(__file__).resolve().parent.parent

# The public interface: a change here is a change for users.
PUBLIC_NAMES = [
    "CoAttention",
    "GateExit",
    "KeptAdapter",
    "Oracle",
    "Plan",
    "SkippedAttention",
    "StaticExit",
    "__version__",
    "calibrate",
    "export",
    "load_engine",
    "optimize",
    "search_skips",
]

# Tools for one door or for the command line, which a user of another door may not have, or should not wait for.
# (Not accelerate: transformers itself imports it where it is installed.)
HEAVY = {"datasets", "matplotlib", "onnx", "onnxruntime", "onnxscript", "tensorrt", "torch_tensorrt", "typer"}


def modules_after(code: str, cwd: Path) -> set[str]:
    """Modules a fresh interpreter has loaded after `code`, with the checkout on its path."""
    process = subprocess.run(
        [sys.executable, "-c", f"import sys, json\n{code}\nprint(json.dumps(list(sys.modules)))"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def test_public_names_are_pinned() -> None:
    assert sorted(vte_compile.__all__) == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(vte_compile))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name: str) -> None:
    assert getattr(vte_compile, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = vte_compile.nothing_of_that_name


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = modules_after("import vte_compile", tmp_path)
    assert sorted(loaded & {"torch", "numpy", "transformers", "huggingface_hub", *HEAVY}) == []


def test_plan_needs_no_transformers(tmp_path: Path) -> None:
    loaded = modules_after(
        "from vte_compile import GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit", tmp_path
    )
    assert sorted(loaded & {"transformers", "huggingface_hub", *HEAVY}) == []


def test_no_public_name_loads_a_door_it_may_not_need(tmp_path: Path) -> None:
    loaded = modules_after("from vte_compile import *", tmp_path)
    assert sorted(loaded & HEAVY) == []
    assert not [name for name in loaded if name.startswith("vte_compile.export.")]
    assert not [name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name]


@pytest.mark.parametrize("name", ["passes", "kernels", "export"])
def test_top_level_folders_are_subpackages(name: str, tmp_path: Path) -> None:
    loaded = modules_after(f"import vte_compile.{name}", tmp_path)
    assert f"vte_compile.{name}" in loaded
    assert name not in loaded


@pytest.mark.parametrize("folder", ["vte_compile", "passes", "kernels", "export"])
def test_no_module_is_left_out_of_an_install(folder: str) -> None:
    # setup.py finds packages by their __init__.py.
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert [path for path in folders if not (path / "__init__.py").is_file()] == []


def test_installed_version_is_the_version() -> None:
    try:
        installed = importlib.metadata.version("vte-compile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vte-compile runs from the checkout here, it is not installed")
    assert installed == vte_compile.__version__
