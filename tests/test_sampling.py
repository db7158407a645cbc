"""Sampling and generation loops of ONNX engines, without a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vte_compile.errors import EngineError, InputError
from vte_compile.export.generation import GenerationDefaults, Stops, generate_tokens
from vte_compile.export.sampling import Sampler, Sampling, probabilities
from vte_compile.export.text_stream import TextStream


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.7), (5, 0.5), (1, None), (None, 1e-9)])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p) -> None:
    logits = np.random.default_rng(0).normal(size=20) * 3
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p)):
        scores = scores if value is None else warper(value)(None, scores)
    tokens, chances = probabilities(logits, Sampling(temperature, top_k, top_p))
    ours = np.zeros(20)
    ours[tokens] = chances
    np.testing.assert_allclose(ours, scores[0].softmax(-1).numpy(), atol=1e-12)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    sampler = Sampler(Sampling(seed=1), 4000)
    counts = np.bincount(sampler.pick(np.tile(logits, (4000, 1))), minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_seeds_and_rows() -> None:
    """The same seed, the same tokens; a row's do not depend on how many others there are."""
    logits = np.zeros((3, 1000), np.float32)

    def drawn(seed: int | None, batch: int) -> list[list[int]]:
        sampler = Sampler(Sampling(seed=seed), batch)
        return np.stack([sampler.pick(logits[:batch]) for _ in range(5)], 1).tolist()

    assert drawn(7, 3) == drawn(7, 3)
    assert drawn(7, 3)[:2] == drawn(7, 2)
    assert drawn(7, 3) != drawn(8, 3)
    assert drawn(None, 3) != drawn(None, 3)
    assert len({tuple(row) for row in drawn(7, 3)}) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number above 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k: expected a number of at least 1"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_impossible_numbers(values, message) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**values)


def test_defaults_of_generation_config(tmp_path: Path, caplog) -> None:
    file = tmp_path / "generation_config.json"
    assert GenerationDefaults.read(file) == GenerationDefaults(64, False, 1.0, None, None)
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.2, "top_k": 0, "top_p": 0.9, "max_new_tokens": 7}))
    defaults = GenerationDefaults.read(file)
    assert defaults == GenerationDefaults(7, True, 0.2, None, 0.9)
    nothing = (None, None, None, None, None)
    assert defaults.sampling(*nothing) == Sampling(0.2, None, 0.9)
    assert defaults.sampling(None, 0, None, None, 3) is None
    assert defaults.sampling(False, 0.7, None, None, 3) is None
    assert defaults.sampling(None, None, 4, None, 3) == Sampling(0.2, 4, 0.9, 3)
    greedy = GenerationDefaults()
    assert greedy.sampling(*nothing) is None
    assert greedy.sampling(None, 0.5, None, None, None) == Sampling(0.5)
    assert greedy.sampling(True, None, None, None, 1) == Sampling(seed=1)
    assert not caplog.records
    file.write_text(json.dumps({"repetition_penalty": 1.05, "num_beams": 1, "min_p": None}))
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.read(file)
    assert "does not follow repetition_penalty" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"top_k": "many"}', '{"max_new_tokens": 1.5}'])
def test_damaged_generation_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(EngineError, match=r"generation_config\.json: "):
        GenerationDefaults.read(tmp_path / "generation_config.json")


def loop(script: list[list[int]], stops: Stops, limit: int = 10):
    """Run with logits whose largest are the script's tokens; what it gave, and which rows ran at each step."""
    running = []
    seen: list[list[int]] = []

    def logits(step: int):
        return np.eye(9)[[row[min(step, len(row) - 1)] for row in script]]

    def step(tokens, active):
        running.append(active.tolist())
        return logits(len(running))

    sampler = Sampler(None, len(script))
    tokens, lengths = generate_tokens(
        logits(0), step, sampler, stops, limit, 0, lambda tokens: seen.append(tokens.tolist())
    )
    assert np.array(seen).T.tolist() == tokens.tolist()
    return tokens.tolist(), lengths.tolist(), running


def test_rows_end_by_themselves() -> None:
    tokens, lengths, running = loop([[5, 6, 2, 7], [5, 2], [3, 3, 3, 4]], Stops([2, 4], []))
    assert tokens == [[5, 6, 2, 0], [5, 2, 0, 0], [3, 3, 3, 4]]
    assert lengths == [3, 2, 4]
    assert running == [[True] * 3, [True, False, True], [False, False, True]]


def test_the_limit_and_no_end() -> None:
    assert loop([[5]], Stops([], []), limit=3) == ([[5, 5, 5]], [3], [[True]] * 2)
    assert loop([[5]], Stops([5], []), limit=1) == ([[5]], [1], [])


def words(tokens: list[int]) -> str:
    return " ".join("abcdefghi"[t] for t in tokens)


def test_stop_strings_end_rows() -> None:
    texts = [TextStream(words, ["f g"]) for _ in range(2)]
    tokens, lengths, _ = loop([[1, 5, 6, 7], [6, 5, 5, 7]], Stops([], texts), limit=4)
    assert tokens == [[1, 5, 6, 0], [6, 5, 5, 7]]
    assert lengths == [3, 4]
    assert [text.text for text in texts] == ["b ", "g f f h"]
