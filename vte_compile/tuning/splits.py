"""Divides samples into parts by their pictures: each is in one part only, the same whatever other samples there are."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator

from vte_compile.tuning.samples import Sample

_TEXT = frozenset("input_ids attention_mask position_ids token_type_ids mm_token_type_ids".split())

PARTS = {"train": 0.5, "selection": 0.2, "certification": 0.3}
"""The parts and their shares: gates are trained on the first, layers and thresholds chosen on the second, and the
guarantee tested on the third (docs/guarantee.md)."""


def part_of(key: str, seed: int) -> str:
    """The part of what has this key; another seed divides otherwise."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    place, end = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for part, share in PARTS.items():
        end += share
        if place < end:
            return part
    return part  # the shares' sum may be a rounding error below 1


class Divided(Iterator[Sample]):
    """The samples that are used, one by one, each in a part; only those for training keep the answers they came with.

    All questions about a picture are in the same part: what gates learned of a picture is not tested on it. Where a
    prompt comes again it is used for training only, since the other parts need independent ones.

    `parts`: of the samples so far. `repeated`: how many were left out. `pictures`: the keys of those of each part.
    """

    def __init__(self, samples: Iterator[Sample], seed: int) -> None:
        self._samples, self._seed, self._seen = samples, seed, set[str]()
        self.parts: list[str] = []
        self.repeated = 0
        self.pictures: dict[str, set[str]] = {part: set() for part in PARTS}

    def __next__(self) -> Sample:
        for sample in self._samples:
            question = Sample.of(sample.inputs, None, sample.name)
            picture = Sample.of({name: value for name, value in sample.inputs.items() if name not in _TEXT}, None).key
            part = part_of(picture, self._seed)
            if part != "train" and question.key in self._seen:
                self.repeated += 1
                continue
            self._seen.add(question.key)
            self.pictures[part].add(picture)
            self.parts.append(part)
            return sample if part == "train" else question
        raise StopIteration

    def __length_hint__(self) -> int:
        return operator.length_hint(self._samples)


def samples_for(certified: int) -> int:
    """Of how many samples about so many are in the certification part."""
    return math.ceil(certified / PARTS["certification"])
