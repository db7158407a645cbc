"""The pass manager: order, results, and an error that names the pass and those already run."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import LAYERS, captured, plan

from vte_compile.errors import CaptureError
from vte_compile.passes import PASSES, PassResult, PassSettings, run_passes
from vte_compile.plan import StaticExit

SETTINGS = PassSettings(plan())


def recorder(name, calls):
    def run(graph, settings):
        calls.append((name, graph, settings))
        return PassResult(name, applied=len(calls))

    run.__name__ = name
    return run


def failing(graph, settings):
    raise KeyError("what went wrong")


def test_runs_in_order_on_the_same_graph():
    calls, graph = [], captured()
    results = run_passes([recorder(name, calls) for name in "abc"], graph, SETTINGS)
    assert [(r.name, r.applied, r.refusals) for r in results] == [("a", 1, []), ("b", 2, []), ("c", 3, [])]
    assert [name for name, *_ in calls] == ["a", "b", "c"]
    assert all(given is graph and settings is SETTINGS for _, given, settings in calls)


@pytest.mark.parametrize(("before", "named"), [(0, "none"), (1, "a"), (2, "a, b")])
def test_a_failing_pass_is_named_with_those_already_run(before, named):
    calls = []
    passes = [recorder(name, calls) for name in "abcd"]
    passes[before] = failing
    message = rf"^pass failing failed on the extend graph \(already run: {named}\): 'what went wrong'$"
    with pytest.raises(CaptureError, match=message) as raised:
        run_passes(passes, captured("extend"), SETTINGS)
    assert isinstance(raised.value.__cause__, KeyError)
    assert len(calls) == before  # none behind it ran


def test_a_real_pass_that_fails():
    graph = captured()
    next(n for n in graph.graph.nodes if n.name == "position_ids")._rename("renamed")
    with pytest.raises(
        CaptureError,
        match=r"insert_exits failed on the prefill .*fold_adapters, skip_attention, plain_causal, pack_rows\)",
    ):
        run_passes(PASSES, graph, PassSettings(plan(StaticExit(0))))


def test_the_order_of_the_passes():
    names = [run.__name__ for run in PASSES]
    assert names == [
        "annotate_layers",
        "fold_adapters",
        "skip_attention",
        "plain_causal",
        "pack_rows",
        "insert_exits",
        "last_layer_queries",
        "last_token_logits",
        "companion_token",
        "fuse_rotary",
        "fuse_attention",
        "attention_layout",
        "cleanup",
    ]
    results = run_passes(PASSES, captured(), PassSettings(plan(StaticExit(0))))
    assert [r.name for r in results] == names
    assert [r.applied for r in results][:8] == [LAYERS, 0, 0, LAYERS, 0, 1, 1, 1]


def test_settings_and_refusals_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.last_token_logits = False
