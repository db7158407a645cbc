"""An engine's folder: written whole or not at all, and compared with its manifest before anything of it is used."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vte_compile.errors import EngineError
from vte_compile.export.manifest import MANIFEST, FileFacts, decode, is_manifest


def check_target_folder(path: Path) -> None:
    """Refuse to write over anything but an engine.

    Raises:
        EngineError: ``path`` is a file, or a folder with something else in it.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise EngineError(f"{path}: is no folder: choose a new path for the engine.")
    if path.is_dir() and any(path.iterdir()) and not is_manifest(path / MANIFEST):
        raise EngineError(f"{path}: holds something else than an engine: choose another folder, or empty it.")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write to, which takes its place at the end; an exception removes it.

    Raises:
        EngineError: See :func:`check_target_folder`.
    """
    check_target_folder(path)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        check_target_folder(path)  # writing took minutes
        if path.exists():
            path.rename(work / "old")
        new.rename(path)
    finally:
        if (work / "old").exists() and not path.exists():
            (work / "old").rename(path)
        shutil.rmtree(work)


def facts_of(folder: Path) -> dict[str, FileFacts]:
    """All files in a folder, by path with slashes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): FileFacts(file.stat().st_size, sha256_of(file)) for file in files}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest's fields, which its target's own class makes sense of.

    Raises:
        EngineError: There is none, or it is damaged or of another version.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise EngineError(
            f"{folder / MANIFEST}: {error.strerror or error}: pass a folder that vte_compile.export() wrote."
        ) from error
    return decode(content)


def check_files(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Compare all files with what the manifest says of them.

    Raises:
        EngineError: One is missing, truncated or altered, or lies outside the folder.
    """
    remedy = "copy the whole folder again, or export the model again"
    for name, facts in files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise EngineError(f"{MANIFEST}: files: {name!r} lies outside the engine: do not use it.")
        file = folder / name
        if not file.is_file():
            raise EngineError(f"{file}: is missing: {remedy}.")
        if (size := file.stat().st_size) != facts.bytes:
            raise EngineError(f"{file}: has {size} bytes instead of {facts.bytes}: {remedy}.")
        if sha256_of(file) != facts.sha256:
            raise EngineError(f"{file}: was altered, its SHA-256 is not the manifest's: {remedy}.")


def sha256_of(file: Path) -> str:
    """Of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
