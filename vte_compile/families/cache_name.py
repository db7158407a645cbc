"""What transformers calls a decoder's cache: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on.

Both names are taken from users; to transformers, and to models that keep the older name, theirs is given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from vte_compile.errors import InputError

CACHE_NAMES = ("cache", "past_key_values")
"""Newest first."""
CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
"""The name in the transformers that is installed."""


def cache_name(forward: Callable[..., Any]) -> str:
    """The name of the cache among a forward's parameters; if it names none, the one of transformers."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE)


def given_cache(arguments: Any) -> Any:
    """The cache among arguments by name, whichever its name; None without one.

    Raises:
        InputError: There are two.
    """
    given = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise InputError(f"Pass the cache once, as {CACHE}: {' and '.join(CACHE_NAMES)} are names of the same.")
    return given[0] if given else None


def cache_of(output: Any) -> Any:
    """The cache in what a model's forward returned."""
    return getattr(output, CACHE)
