"""The cache of rows as a DynamicCache of transformers, which generate() hands around."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from vte_compile.errors import InputError
from vte_compile.runtime.cache import RowsCache
from vte_compile.runtime.growing import GrowingLayer


class ExitLayer(GrowingLayer, DynamicLayer):  # type: ignore[misc]  # DynamicLayer's keys may also be None
    """A layer, as transformers knows them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: only the optimized model knows where the rows of each layer end.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "past_key_values was filled by an optimized model: pass it to that model alone, and another model a cache "
            "of its own."
        )


class ExitCache(RowsCache, DynamicCache):
    """A DynamicCache whose layers, and whose rows, may differ in length."""

    layer_class: ClassVar[type[GrowingLayer]] = ExitLayer

    @classmethod
    def adopt(cls, cache: DynamicCache) -> ExitCache:
        """Turn an empty DynamicCache into an ExitCache in place, so that whoever holds it sees it filled."""
        if not isinstance(cache, ExitCache):
            cache.__class__ = cls
            cache.reset()
        assert isinstance(cache, ExitCache)
        return cache
