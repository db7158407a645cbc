"""The cache of rows as a DynamicCache of transformers, which generate() hands around."""

from __future__ import annotations

from typing import ClassVar

from transformers.cache_utils import DynamicCache, DynamicLayer

from vte_compile.runtime.cache import RowsCache
from vte_compile.runtime.growing import GrowingLayer


class ExitLayer(GrowingLayer, DynamicLayer):
    """A layer, as transformers knows them."""


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
