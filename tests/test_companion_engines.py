"""Engines of plans with a companion token (LaVIN-EAS) give the oracle's numbers, in all forms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import load_fake
from helpers import ALWAYS, gate, shared
from marks import thorough
from onnx_single import SingleGraph
from test_adapters_optimized import inputs_of, kept, lossless, skip, unfreed
from test_companion import planned
from tiny_models import one_thread  # noqa: F401

from vte_compile import Oracle, Plan, StaticExit, export, load_engine
from vte_compile.errors import InputError
from vte_compile.export.engine import Engine
from vte_compile.export.engine_programs import Loaded, _program
from vte_compile.export.staged import stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OURS: dict[str, Any] = dict(max_new_tokens=4, eos_token_ids=[])
TURNS = [("..tvvtt", "vvttttt", "..tttt.", "......t"), ("tvt", "ttt", ".tt", "vvt")]
"""Of rows of unequal lengths, one of which is a single token; the second turn has images of its own."""
PLANS = {
    # A gate that fires in some rows; what is skipped below it, and above it, pools another mean.
    "gates": (planned(skip(0), kept(1), skip(2), exits=(gate(0), gate(1, ALWAYS))), True),
    # No adapter is folded; the last attention is kept, and cut to the last token.
    "unfolded": (planned(kept(0), skip(1), exits=(gate(0), StaticExit(1))), False),
}


def close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-4)


def last(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits[torch.arange(len(mask)), mask.shape[1] - 1 - mask.long().flip(1).argmax(1)]


def assert_same(engine: Any, plan: Plan) -> None:
    """Prompts of a batch, which leave behind different layers, two further turns, a decode step; and greedy tokens."""
    oracle, seen = Oracle(shared(), plan), set()
    for seed in range(2):
        known = ours = None
        for turn, layouts in enumerate((*TURNS, ["t"] * 4)):
            given = inputs_of(*layouts, seed=3 * seed + turn)
            want = oracle.forward(**given, cache=known)
            got = engine.prefill(**given, cache=ours)
            close(got.logits, last(want.logits, given["attention_mask"]))
            assert got.exit_layer.tolist() == want.exit_layer.tolist()
            known, ours = want.cache, got.cache
            seen.update(got.exit_layer.tolist())
        given = inputs_of(*TURNS[0], seed=3 * seed)
        answer = engine.generate(**given, **OURS)
        assert answer.tokens.tolist() == oracle.generate(**given, max_new_tokens=4).tokens
    assert len(seen) > 1


FEW = planned(skip(1), exits=(gate(0),))
"""Few pieces to convert."""


@pytest.fixture(scope="module", params=["gates", thorough("unfolded")])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan, and its ONNX engine."""
    plan, fold = PLANS[request.param]
    fast = unfreed(lossless(), plan, fold)
    return plan, export(fast, tmp_path_factory.mktemp("e") / "engine", target="onnxruntime")


@pytest.mark.parametrize("form", ["staged", "single"])
def test_onnx(made: tuple[Plan, Path], form: str) -> None:
    plan, folder = made
    engine: Any = load_engine(folder, threads=1, form=form)
    assert engine.manifest.model.companion
    assert_same(engine, plan)


def test_single_graph_for_other_runners(made: tuple[Plan, Path]) -> None:
    """The graph puts the token there: whoever runs it leaves a place behind each prompt, whatever stands in it."""
    plan, folder = made
    graph, oracle = SingleGraph(folder, behind=1), Oracle(shared(), plan)
    given = inputs_of(*TURNS[0])
    want, got = oracle.forward(**given), graph.run(*given.values())
    close(got["logits"][:, 0], last(want.logits, given["attention_mask"]))
    given = inputs_of(*["t"] * 4, seed=1)
    close(graph.run(*given.values())["logits"], oracle.forward(**given, cache=want.cache).logits)


@pytest.mark.thorough
def test_tensorrt(tmp_path: Path) -> None:
    sizes = {"batch": (1, 2, 4), "prompt": (1, 4, 8), "visual": (1, 2, 4), "columns": (1, 32, 32)}
    export(unfreed(lossless(), FEW), tmp_path / "engine", target="tensorrt", build=False, profiles=sizes)
    engine = load_fake(tmp_path / "engine")[0]
    assert_same(engine, FEW)
    with pytest.raises(InputError, match="a row has 8 new tokens, and the engine takes 7"):
        engine.prefill(**inputs_of("tttttttt"))


def test_steps_of_aoti() -> None:
    """Its pieces uncompiled: what is staged, and who runs it."""
    plan, fold = PLANS["gates"]
    staged: Any = stage(unfreed(lossless(), plan, fold))
    modules = {piece.name: piece.module for piece in staged.pieces}
    pieces = {name: lambda values, run=module: run(*values) for name, module in modules.items()}
    programs = {name: _program(phase, staged.weights, pieces) for name, phase in staged.phases.items()}
    assert set(programs) == {"prefill", "extend", "decode"}
    # With the token, a prompt is two tokens long at least: pieces of it alone are not tried at less.
    shortest = {piece.name: piece.shortest for piece in staged.pieces}
    later = {
        step.piece for name in ("extend", "decode") for step in staged.phases[name].steps if hasattr(step, "piece")
    }
    assert {name for name, length in shortest.items() if length == 1} == later
    assert_same(Engine(Loaded(SimpleNamespace(**vars(staged)), staged.weights, programs, None), Path()), plan)  # type: ignore[arg-type]
