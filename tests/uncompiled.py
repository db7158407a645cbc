"""Engines of AOTInductor without its compiler: export and loading are the real ones, pieces run as they were traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vte_compile
from vte_compile.export import aoti


def uncompiled_engine(fast: Any, folder: Path) -> Any:
    """The engine of a model, written into a folder and loaded from it."""
    pieces: dict[str, Any] = {}

    def keep(module: Any, key: str, examples: Any, file: Path, *_: Any) -> None:
        pieces[file.name] = module
        file.touch()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(aoti, "compile_piece", keep)
        patched.setattr(aoti, "load_piece", lambda file: lambda values: pieces[file.name](*values))
        vte_compile.export(fast, folder, target="aoti")
        return vte_compile.load_engine(folder)
