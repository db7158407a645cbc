"""Settings of all tests: no network, and tests that need a GPU are skipped, with the reason, where there is none."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else is

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run on CPU tensors, interpreted; read when triton is imported. (Where they are compiled
    # ahead of time, it is in processes without it.)
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is False"))
