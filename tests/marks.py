"""Which cases only `make test-thorough` runs: what they show, others show on another model, plan or dtype."""

from __future__ import annotations

from typing import Any

import pytest


def thorough(*values: Any, id: str | None = None) -> Any:
    """A case of ``parametrize``."""
    return pytest.param(*values, marks=pytest.mark.thorough, id=id)
