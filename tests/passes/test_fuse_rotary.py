"""fuse_rotary: each rotation becomes one op, with the same numbers; what is no such rotation is left, with a reason."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYERS, assert_close, captured, chunk_inputs, nodes_of, plan, run_graph

from vte_compile.kernels.cached_attention import rotary
from vte_compile.passes import PassSettings
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.fuse_rotary import fuse_rotary

aten = torch.ops.aten
ROTARY = rotary._opoverload


def annotated(phase="chunk", family="llama"):
    graph = captured(phase, family=family)
    annotate_layers(graph, PassSettings(plan()))
    return graph


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize(("lengths", "past"), [([5, 3], [0, 0]), ([1, 1], [4, 7]), ([2], [9])])
def test_same_numbers(family, lengths, past) -> None:
    graph = annotated(family=family)
    heads = 1 if family == "gemma" else 2
    inputs = chunk_inputs(lengths, past)
    inputs[4:] = [kv[:, :heads] for kv in inputs[4:]]
    logits, *caches = run_graph(graph, *inputs)
    assert nodes_of(graph, aten.neg.default)
    result = fuse_rotary(graph, PassSettings(plan()))
    assert (result.applied, result.refusals) == (2 * LAYERS, [])
    cleanup(graph, PassSettings(plan()))
    assert len(nodes_of(graph, ROTARY)) == 2 * LAYERS
    assert not nodes_of(graph, aten.neg.default, aten.cat.default)[1:]  # but for the tables' own concatenation
    fused, *others = run_graph(graph, *inputs)
    for b, count in enumerate(lengths):
        assert_close(fused[b, :count], logits[b, :count])
        for ours, theirs in zip(others, caches, strict=True):
            assert_close(ours[b, :, : past[b] + count], theirs[b, :, : past[b] + count])


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_only_in_chunks(phase) -> None:
    graph = annotated(phase)
    result = fuse_rotary(graph, PassSettings(plan()))
    assert (result.applied, result.refusals) == (0, [])
    assert not nodes_of(graph, ROTARY)


def test_tables_whose_halves_differ_are_refused() -> None:
    graph = annotated()
    cos = nodes_of(graph, aten.cos.default)[0]
    with graph.graph.inserting_after(cos):
        skewed = graph.graph.call_function(aten.flip.default, (cos, [-1]))
    skewed.meta["val"] = cos.meta["val"]
    graph.layer_of[skewed] = graph.layer_of[cos]
    with graph.graph.inserting_after(skewed):
        sliced = graph.graph.call_function(aten.cumsum.default, (skewed, -1))
    sliced.meta["val"] = cos.meta["val"]
    graph.layer_of[sliced] = graph.layer_of[cos]
    cos.replace_all_uses_with(sliced, delete_user_cb=lambda user: user is not skewed)
    result = fuse_rotary(graph, PassSettings(plan()))
    assert result.applied == 0
    assert len(result.refusals) == 2 * LAYERS
    assert "not proven equal" in result.refusals[0].reason
    assert result.refusals[0].layer == 0


def test_another_rotation_is_refused() -> None:
    """(first half, second half) instead of (-second half, first half)."""
    graph = annotated()
    for negated in nodes_of(graph, aten.neg.default):
        negated.replace_all_uses_with(negated.args[0])
    result = fuse_rotary(graph, PassSettings(plan()))
    assert result.applied == 0
    assert {refusal.layer for refusal in result.refusals} == set(range(LAYERS))
    assert "no rotation" in result.refusals[0].reason
