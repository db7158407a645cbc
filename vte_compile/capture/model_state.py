"""States that a model is put into for a while, and out of again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def attention_implementation(config: Any, implementation: str) -> Iterator[None]:
    """Let the modules of a config attend through another function of AttentionInterface, and then as before."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def traceable_experts(config: Any) -> Iterator[None]:
    """Let the experts of a mixture run as grouped products, and then as before.

    The loop over those that some token chose (``eager``) depends on data, so it cannot be traced. How the model
    computes its experts else is left to it.
    """
    before = getattr(config, "_experts_implementation", None)
    if before == "eager":
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        if before == "eager":
            config._experts_implementation = before


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all below it into eval mode, and back each as it was."""
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, training in before:
            m.training = training
