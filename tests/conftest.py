"""Settings of all tests: no network, and tests that need a GPU are skipped, with the reason, where there is none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else is

import pytest
import torch
from families_table import FamiliesTable, mark_item

if not torch.cuda.is_available():
    # Triton's kernels then run on CPU tensors, interpreted; read when triton is imported. (Where they are compiled
    # ahead of time, it is in processes without it.)
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models-table", type=Path, metavar="FILE", help="write the results by family into this page")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--models-table")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FamiliesTable(file))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark_item(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True, scope="session")
def traced_once() -> Iterator[dict[str, Any]]:
    """Decoders that are built alike are traced once (traced_once.py). What it replaces, by name."""
    from traced_once import remembered

    from vte_compile.runtime import decoder_runner

    own = {name: getattr(decoder_runner, name) for name in ("capture", "capture_chunk")}
    with pytest.MonkeyPatch.context() as patched:
        for name, function in own.items():
            patched.setattr(decoder_runner, name, remembered(function))
        yield own


@pytest.fixture(autouse=True)
def traces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, traced_once: dict[str, Any]) -> None:
    """But not in tests that are marked so."""
    if request.node.get_closest_marker("traces") is not None:
        for name, function in traced_once.items():
            monkeypatch.setattr(f"vte_compile.runtime.decoder_runner.{name}", function)
