"""Read what torch.save wrote, without running code of the file, or of a package that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vte_compile.errors import InputError


class Inert:
    """Stands in for an object of a class that a file names, other than torch's own."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_torch_file(path: Path, expected: str) -> Any:
    """The file's content, with tensors mapped from it, not copied, and an `Inert` for each object of other classes.

    Args:
        path: Of the file.
        expected: What it should be, for the error.

    Raises:
        InputError: There is no such file, or it cannot be read so.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file: expected {expected}")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the reader raises on a file that is something else
        raise InputError(f"{path}: torch.load(weights_only=True) cannot read it: {error}") from error
