"""The split of samples: by pictures, the same whatever other samples there are, without repeated prompts."""

from __future__ import annotations

import itertools

import pytest
import torch

from vte_compile.tuning.samples import Sample
from vte_compile.tuning.splits import PARTS, Divided, part_of, samples_for


def samples(count: int, questions: int = 1):
    """With an answer each; so many questions about each picture."""
    for n in range(count):
        inputs = {
            "input_ids": torch.tensor([[5, 6, n % questions]]),
            "pixel_values": torch.full((1, 3), n // questions),
        }
        yield Sample.of(inputs, (7, 8), f"samples[{n}]")


def test_parts_depend_on_the_key_alone() -> None:
    parts = [part_of(f"sample {n}", 0) for n in range(4000)]
    for part, share in PARTS.items():
        assert parts.count(part) / 4000 == pytest.approx(share, abs=0.03)
    assert parts == [part_of(f"sample {n}", 0) for n in range(4000)]
    assert parts != [part_of(f"sample {n}", 1) for n in range(4000)]
    assert sum(PARTS.values()) == pytest.approx(1)
    assert samples_for(150) == 500


def test_given_answers_are_for_training_alone() -> None:
    divided = Divided(samples(60), 0)
    answers = [sample.answer for sample in divided]
    assert answers == [(7, 8) if part == "train" else None for part in divided.parts]
    assert set(divided.parts) == set(PARTS)


def test_all_questions_about_a_picture_are_in_one_part() -> None:
    divided = Divided(samples(90, questions=3), 0)
    assert len(list(divided)) == 90
    assert divided.parts == [part for part in divided.parts[::3] for _ in range(3)]
    assert sum(len(pictures) for pictures in divided.pictures.values()) == 30


def test_a_prompt_that_comes_again_is_for_training_alone() -> None:
    divided = Divided(itertools.chain(samples(60), samples(60)), 0)
    used = len(list(divided))
    assert divided.repeated == 60 - divided.parts[:60].count("train")
    assert used + divided.repeated == 120
    assert divided.parts[60:] == ["train"] * (used - 60)
