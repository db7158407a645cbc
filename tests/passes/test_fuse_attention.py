"""fuse_attention: attentions with rotations, caches and all, become one op, with the same numbers; or none does."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from helpers import (
    LAYERS,
    C,
    assert_close,
    captured,
    embeddings,
    gate,
    layout,
    nodes_of,
    plan,
    positions,
    run_graph,
)
from torch._subclasses.fake_tensor import FakeTensor

from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.fused_attention import rotary_append_attention, rotary_packed_attention
from vte_compile.kernels.packed_attention import packed_attention
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.fuse_attention import fuse_attention
from vte_compile.passes.lower_piecewise import AttendPoint, Piece, lower_piecewise
from vte_compile.passes.rotations import rotation
from vte_compile.plan import Plan, SkippedAttention, StaticExit
from vte_compile.runtime.program import Program
from vte_compile.runtime.visual_tokens import PackedRows, VisualTokens

aten = torch.ops.aten
FUSED = {"packed": rotary_packed_attention._opoverload, "decode": rotary_append_attention._opoverload}
OWN = {"packed": packed_attention._opoverload, "decode": append_attention._opoverload}
OPTIONS = {"head_dim": 64}
ROWS = ["ttvvvvtt", "vvttt", "tttt", "tvtvvttvtt", "t"]


def rewritten(phase, plan, fuse=True, last=True, **options):
    traced = captured("decode" if phase == "decode" else "prefill", phase == "decode", **OPTIONS | options)
    graph = replace(traced, phase=phase)
    results = run_passes(PASSES, graph, PassSettings(plan, last_token_logits=last, fuse_attention=fuse))
    return graph, next(result for result in results if result.name == "fuse_attention")


def kv(lengths, batch, heads=2, size=64):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, heads, n, size, generator=generator) for n in lengths for _ in "kv"]


def prompt():
    rows = [embeddings(len(cells), seed=i) for i, cells in enumerate(ROWS)]
    ends = torch.tensor([0, *accumulate(map(len, ROWS))], dtype=torch.int32)
    visual = torch.cat(list(map(layout, ROWS)), 1)
    return [torch.cat(rows, 1), torch.cat([positions(len(cells)) for cells in ROWS], 1), visual, ends]


@pytest.mark.parametrize(
    ("last", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"family": "gemma"}),  # one key/value head
        (True, {"num_key_value_heads": 4}),  # as many as query heads
        (True, {"family": "gemma2"}),  # windows and caps
        (False, {"family": "gemma2"}),
        (True, {"family": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_packed(last, options):
    """Behind exits, with queries of all tokens or of last ones alone."""
    exits = plan(gate(0, 0.0, seed=3), StaticExit(1))
    before, nothing = rewritten("packed", exits, False, last, **options)
    graph, result = rewritten("packed", exits, True, last, **options)
    assert (nothing.applied, nothing.refusals) == (0, [])
    assert (result.applied, result.refusals) == (LAYERS, [])
    assert len(nodes_of(before, OWN["packed"])) == len(nodes_of(graph, FUSED["packed"])) == LAYERS
    assert len(nodes_of(before, aten.neg.default)) == 2 * LAYERS
    assert not nodes_of(graph, OWN["packed"], aten.neg.default, aten.expand.default)
    inputs = prompt()
    for ours, theirs in zip(run_graph(graph, *inputs), run_graph(before, *inputs), strict=True):
        if ours.dtype == torch.bool:
            assert torch.equal(ours, theirs)
        else:
            assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_decode(family):
    before, _ = rewritten("decode", plan(), False, family=family)
    graph, result = rewritten("decode", plan(), True, family=family)
    assert (result.applied, result.refusals) == (LAYERS, [])
    assert len(nodes_of(graph, FUSED["decode"])) == LAYERS
    assert not nodes_of(graph, OWN["decode"], aten.neg.default)
    starts = [torch.tensor([0, 2, 5])] * LAYERS
    inputs = [embeddings(1, 3), torch.tensor([[9], [4], [17]]), *kv([7, 9, 6], 3), *starts]
    for ours, theirs in zip(run_graph(graph, *inputs), run_graph(before, *inputs), strict=True):
        assert_close(ours, theirs)


def test_pieces_stand_between_attentions_and_make_caches():
    both = Plan(exits=[StaticExit(0)], skips=[SkippedAttention(1)])
    graph, result = rewritten("packed", both)
    assert result.applied == LAYERS - 1
    lowered = lower_piecewise(graph)
    kinds = [getattr(step, "kind", type(step).__name__) for step in lowered.steps]
    # The skipped layer stays a piece of its own, and the exit stands behind the rest of its layer.
    assert kinds == ["Piece", "rotary_packed", "Piece", "ExitPoint", "Piece", "Piece", "rotary_packed", "Piece"]
    for piece in (step for step in lowered.steps if isinstance(step, Piece)):
        assert not nodes_of(piece.module.graph, *FUSED.values())
    embeds, at, visual, ends = prompt()
    state = PackedRows(list(map(len, ROWS)), [VisualTokens.find(layout(cells)[0]) for cells in ROWS])
    program = Program(lowered, [], None)
    assert program.makes_caches
    with torch.no_grad():
        got = program.run([embeds, at, ends], state)
    logits, *rest = run_graph(graph, embeds, at, visual, ends)
    assert_close(got.logits, logits)
    assert got.kv[1] is None
    for layer, place in ((0, 0), (2, 2)):
        lengths = list(map(len, ROWS)) if layer == 0 else state.lengths
        for cache, packed in zip(got.kv[layer], rest[place : place + 2], strict=True):
            assert cache.shape[2] > max(lengths)  # room to decode
            for row, tokens in zip(cache, packed[0].split(lengths, 1), strict=True):
                assert_close(row[:, max(lengths) - tokens.shape[1] : max(lengths)], tokens)
    assert state.exit_layers == [0, 0, -1, 0, -1]


def test_decode_pieces():
    lowered = lower_piecewise(rewritten("decode", plan())[0])
    points = [step for step in lowered.steps if isinstance(step, AttendPoint)]
    assert [point.kind for point in points] == ["rotary_append"] * LAYERS
    assert [len(point.inputs) for point in points] == [8] * LAYERS  # with where rows start
    assert {(point.window, point.softcap) for point in points} == {(0, 0.0)}


@pytest.mark.parametrize("phase", ["packed", "decode"])
def test_pieces_know_windows_and_caps(phase):
    lowered = lower_piecewise(rewritten(phase, plan(), family="gemma2")[0])
    points = [step for step in lowered.steps if isinstance(step, AttendPoint)]
    assert [(point.scale, point.window, point.softcap) for point in points] == [(8**-0.5, w, 2.0) for w in (3, 0, 3)]


@pytest.mark.parametrize("phase", ["packed", "decode"])
def test_cpus_keep_torchs_attention(phase):
    graph, result = rewritten(phase, plan(), None)
    assert (result.applied, result.refusals) == (0, [])
    assert len(nodes_of(graph, OWN[phase])) == LAYERS


@pytest.mark.parametrize("installed", [True, False])
def test_the_device_decides(installed, monkeypatch):
    """A graph on a GPU, which need not be there: its inputs' metadata says where it is."""
    graph = captured("decode", True, **OPTIONS)
    settings = PassSettings(plan())
    run_passes(PASSES[: PASSES.index(fuse_attention)], graph, settings)
    embeds = graph.placeholder("inputs_embeds")
    mode = embeds.meta["val"].fake_mode
    embeds.meta["val"] = FakeTensor(mode, torch.empty(5, 1, C, device="meta"), torch.device("cuda"))
    if not installed:
        # (as an attribute of its package, the module's name is the pass)
        monkeypatch.setattr(sys.modules[fuse_attention.__module__], "find_spec", lambda name: None)
    result = fuse_attention(graph, settings)
    assert result.applied == (LAYERS if installed else 0)
    assert [r.reason for r in result.refusals] == (
        [] if installed else ["Triton, which has the fused kernels, is not installed."]
    )


def test_one_prompt_alone_keeps_torchs_attention():
    graph = captured(**OPTIONS)
    assert fuse_attention(graph, PassSettings(plan(), fuse_attention=True)).applied == 0


def test_refuses_head_sizes():
    graph, result = rewritten("packed", plan(), head_dim=8)
    assert result.applied == 0
    assert [r.layer for r in result.refusals] == list(range(LAYERS))
    assert result.refusals[0].reason == "head size 8: expected one of 64, 80, 96, 128, 256."
    assert len(nodes_of(graph, OWN["packed"])) == LAYERS


def spoiled(how):
    """What is refused in a graph that was changed before the pass sees it, at its last attention."""
    graph = captured("decode", True, **OPTIONS)
    settings = PassSettings(plan(), fuse_attention=True)
    run_passes(PASSES[: PASSES.index(fuse_attention)], graph, settings)
    node = nodes_of(graph, OWN["decode"])[-1]
    how(graph, node)
    result = fuse_attention(graph, settings)
    assert result.applied == 0  # nor in the layers that could be
    assert not nodes_of(graph, FUSED["decode"])
    return [(r.layer, r.reason) for r in result.refusals]


def _without_rotation(graph, node):
    node.update_arg(1, node.args[1].all_input_nodes[0].args[0])


def _unequal_halves(graph, node):
    """The table by which all layers rotate, with another second half."""
    _, (cos, _) = rotation(node.args[0])
    with graph.graph.inserting_after(cos):
        other = graph.graph.call_function(aten.cumsum.default, (cos, -1))
    other.meta["val"], graph.layer_of[other] = cos.meta["val"], graph.layer_of[cos]
    cos.replace_all_uses_with(other, lambda user: user is not other)


def test_refuses_what_is_no_rotation():
    assert spoiled(_without_rotation) == [(LAYERS - 1, "its input is no rotation.")]


def test_refuses_tables_of_other_halves():
    [*refused] = spoiled(_unequal_halves)
    assert [layer for layer, _ in refused] == list(range(LAYERS))
    assert all("are not proven equal" in reason for _, reason in refused)


def test_refuses_a_dtype():
    def widen(graph, node):
        query = node.args[0]
        query.meta["val"] = query.meta["val"].double()

    assert spoiled(widen) == [(LAYERS - 1, "torch.float64: expected float16, bfloat16 or float32.")]
