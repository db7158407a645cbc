"""Divides samples into parts by their keys: the same sample is in the same part, whatever other samples there are."""

from __future__ import annotations

import hashlib
import math

PARTS = {"train": 0.5, "selection": 0.2, "certification": 0.3}
"""The parts and their shares: gates are trained on the first, layers and thresholds chosen on the second, and the
guarantee tested on the third (docs/guarantee.md)."""


def part_of(key: str, seed: int) -> str:
    """The part of a sample, by its key alone; another seed divides otherwise."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    place, end = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for part, share in PARTS.items():
        end += share
        if place < end:
            return part
    return part  # the shares' sum may be a rounding error below 1


def samples_for(certified: int) -> int:
    """Of how many samples about so many are in the certification part."""
    return math.ceil(certified / PARTS["certification"])
