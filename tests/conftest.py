"""Settings of all tests: no network, and tests that need a GPU are skipped, with the reason, where there is none."""

import os
from pathlib import Path

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
