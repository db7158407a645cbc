"""Pictures and videos as processors of our own model classes are given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vte_compile.errors import InputError

_SOURCES = ("image", "image_url", "url", "path")


def listed(images: Any) -> list[Any]:
    """One picture, a list of them, or lists of each text's own, as one list."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for one in images for image in (one if isinstance(one, list | tuple) else [one])]


def films(videos: Any) -> list[list[Any]]:
    """One video, or a list of them, as lists of frames.

    Raises:
        InputError: A video is no list of frames.
    """
    if not videos:
        return []
    found = list(videos) if isinstance(videos, list | tuple) and isinstance(videos[0], list | tuple) else [videos]
    for film in found:
        if not isinstance(film, list | tuple) or not film:
            raise InputError(
                f"videos: expected a list of frames (images) for each, got {film!r}: read the frames first."
            )
    return [list(film) for film in found]


def collect(part: Mapping[str, Any], images: list[Any], videos: list[Any]) -> str:
    """Add what a part of a message shows to `images` or `videos`, if it names any.

    Returns:
        The part's type: text, image or video.

    Raises:
        InputError: It is of another type.
    """
    kind = part.get("type")
    if kind == "image":
        images += [part[name] for name in _SOURCES if part.get(name) is not None][:1]
    elif kind == "video":
        videos += [part["video"]] if part.get("video") is not None else []
    elif kind != "text":
        raise InputError(f"content: expected parts of type text, image or video, got {kind!r}.")
    return str(kind)
