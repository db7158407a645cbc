"""Where the files of a checkpoint are: in a folder, or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vte_compile.errors import InputError


def local_folder(name: Any, **hub: Any) -> Path:
    """The folder of a checkpoint, downloaded if `name` is no folder.

    Raises:
        InputError: There is no such folder, and no such repository on the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(f"{name}: no such folder, and no such model on the hub: {error}") from error
