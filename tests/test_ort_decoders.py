"""ONNX engines of decoders that are more than causal, in both forms: sliding windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import thorough
from test_windows import WINDOWS
from tiny_models import (
    chunk,
    gate,
    one_thread,  # noqa: F401
    plan,
    tiny,
)

import vte_compile
from vte_compile import Oracle, StaticExit, load_engine, optimize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FORMS = ("staged", "single")
OURS = dict(max_new_tokens=6, eos_token_ids=[])


def close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def last(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each row's last token."""
    columns = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return logits[torch.arange(len(mask)), columns]


@pytest.mark.parametrize("name", ["mistral", thorough("qwen2")])
def test_windows(name: str, tmp_path: Path) -> None:
    """Rows that exit and one of text, padded; a further turn with an image, decode steps: all beyond the window."""
    model, exits = tiny(name, **WINDOWS[name]), plan(gate(0), StaticExit(1))
    oracle = Oracle(model, exits)
    vte_compile.export(optimize(model, exits, compile=False), tmp_path / "engine", target="onnxruntime")
    seen = set()
    for form in FORMS:
        engine: Any = load_engine(tmp_path / "engine", threads=1, form=form)
        for seed in range(3):
            known, ours = None, None
            for turn, layouts in enumerate((("ttvvvvttt", "..ttttttt", "vvvttvvtt"), ("tvvtt", "ttttt", "..ttt"))):
                embeds, visual, real = chunk(*layouts, seed=10 * seed + turn)
                given = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": real}
                want = oracle.forward(**given, cache=known)
                got = engine.prefill(**given, cache=ours)
                close(got.logits, last(want.logits, real))
                assert got.exit_layer.tolist() == want.exit_layer.tolist()
                known, ours = want.cache, got.cache
                seen.update(got.exit_layer.tolist())
            answer = engine.generate(**given, **OURS)
            assert answer.tokens.tolist() == oracle.generate(**given, max_new_tokens=6).tokens
    assert seen == {-1, 0, 1}
