"""lower_piecewise: equal layers are one piece, and the pieces together are the whole graph, bit for bit."""

from __future__ import annotations

import functools
import weakref
from types import SimpleNamespace

import pytest
import sympy
import torch
from helpers import (
    ALWAYS,
    LAYERS,
    NEVER,
    assert_close,
    captured,
    embeddings,
    gate,
    layout,
    nodes_of,
    plan,
    positions,
    random_kv,
    run_graph,
    shared,
    tiny,
)
from torch import fx
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vte_compile.capture import capture
from vte_compile.errors import CaptureError
from vte_compile.families.decoder import describe
from vte_compile.kernels.exit_gate import exit_gate, static_exit
from vte_compile.kernels.token_exit import token_exit
from vte_compile.oracle import Oracle
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.lower_piecewise import AttendPoint, ExitPoint, Piece, lower_piecewise, structure_key
from vte_compile.plan import Plan, SkippedAttention, StaticExit
from vte_compile.runtime.program import Program
from vte_compile.runtime.visual_tokens import VisualTokens

EXITS = {
    "none": [],
    "static 0": [StaticExit(0)],
    "static 1": [StaticExit(1)],
    "static last": [StaticExit(LAYERS - 1)],
    "middle of three": [gate(0, NEVER), gate(1, ALWAYS), gate(2, ALWAYS)],
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "as the gates say": [gate(i, threshold, seed=3) for i, threshold in enumerate((1.0, 0.5, 0.0))],
}
LAYOUTS = ["ttvvvvttt", "vvttt", "tvtvvttvtt", "ttttt"]


@functools.cache
def rewritten(phase: str, name: str, last: bool = False, batched: bool = False):
    graph = captured(phase, batched)
    run_passes(PASSES, graph, PassSettings(plan(*EXITS[name]), last_token_logits=last))
    return graph


def pieces_of(lowered) -> list[Piece]:
    return [step for step in lowered.steps if isinstance(step, Piece)]


def same(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize(
    ("phase", "name", "last"),
    [
        *(("prefill", name, name not in ("static last", "never")) for name in EXITS),
        ("extend", "static 1", True),
        ("extend", "static last", False),
        ("extend", "middle of three", True),
    ],
)
def test_bit_for_bit_the_whole_graph(phase, name, last):
    graph = rewritten(phase, name, last)
    program = Program(lower_piecewise(graph), [], None)
    for cells in LAYOUTS:
        past = [] if phase == "prefill" else random_kv((9, 5, 2))
        inputs = [embeddings(len(cells), seed=len(cells)), positions(len(cells), 9 if past else 0)]
        visual = layout(cells)
        with_mask = [*inputs, *([visual] if EXITS[name] else []), *past]
        logits, *rest = run_graph(graph, *with_mask)
        tokens = VisualTokens.find(visual[0])
        with torch.no_grad():
            got = program.run([*inputs, *past], tokens)
        exit_layer = -1 if tokens is None else tokens.exit_layer
        same([got.logits, *[t for pair in got.kv for t in pair]], [logits, *rest[: 2 * LAYERS]])
        fired = [planned.layer for planned, f in zip(EXITS[name], rest[2 * LAYERS :], strict=True) if f]
        assert exit_layer == (fired[0] if fired else -1)
        if phase == "prefill":
            assert exit_layer == int(Oracle(shared(), plan(*EXITS[name])).forward(inputs[0], visual).exit_layer)


@pytest.mark.parametrize("batched", [False, True])
def test_decode(batched):
    graph = rewritten("decode", "static 0", True, batched)
    lowered = lower_piecewise(graph)
    assert [type(step) for step in lowered.steps] == [*[Piece, AttendPoint] * LAYERS, Piece]
    # What depends on the length of the cache is in no piece.
    sizes = [size for p in pieces_of(lowered) for e in p.examples for size in e.shape]
    assert len({size.node.expr for size in sizes if isinstance(size, torch.SymInt)}) == batched
    batch = 3 if batched else 1
    starts = [torch.tensor([0, 2, 1]) + i for i in range(LAYERS)] if batched else []
    inputs = [
        embeddings(1, batch),
        positions(1, 20).expand(batch, 1).contiguous(),
        *random_kv((9, 5, 6), batch),
        *starts,
    ]
    kv = slice(2, 2 + 2 * LAYERS)
    # Inside of larger buffers, the last column free: a view is all that a step needs.
    roomy = [torch.full((*t.shape[:2], t.shape[2] + 7, t.shape[3]), torch.nan) for t in inputs[kv]]
    views = [buffer[:, :, : t.shape[2] + 1] for buffer, t in zip(roomy, inputs[kv], strict=True)]
    for view, t in zip(views, inputs[kv], strict=True):
        view[:, :, :-1] = t
    with torch.no_grad():
        got = Program(lowered, [], None).run([*inputs[:2], *views, *inputs[kv.stop :]])
    logits, *grown = run_graph(graph, *inputs)
    same([t for pair in got.kv for t in pair], grown)
    assert all(a is b for a, b in zip([t for pair in got.kv for t in pair], views, strict=True))
    assert_close(got.logits, logits)


def test_one_token_behind_an_exit_or_alone():
    """Lengths of 1, which export takes for another program, run the same pieces."""
    graph = rewritten("prefill", "static 1", True)
    program = Program(lower_piecewise(graph), [], None)
    for cells in ("vvt", "t"):
        inputs = [embeddings(len(cells)), positions(len(cells))]
        want = Oracle(shared(), plan(StaticExit(1))).forward(inputs[0], layout(cells))
        with torch.no_grad():
            got = program.run(inputs, VisualTokens.find(layout(cells)[0]))
        assert_close(got.logits[0, -1], want.logits[0, -1])
        assert [k.shape[2] for k, _ in got.kv] == want.cache.lengths()[0]


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("phase", ["prefill", "extend"])
@pytest.mark.parametrize("name", ["none", "static 1", "middle of three"])
def test_equal_layers_are_one_piece(phase, name):
    graph = rewritten(phase, name, True)
    before = str(graph.graph)
    lowered = lower_piecewise(graph)
    assert str(graph.graph) == before
    pieces = pieces_of(lowered)
    assert len(pieces) == LAYERS + 2
    keys = [p.key for p in pieces]
    exits = EXITS[name]
    # The last layer asks for one token alone, unless an exit behind it needs all.
    alone = not any(e.layer == LAYERS - 1 for e in exits)
    last = LAYERS if alone else 1
    assert [keys.index(key) for key in keys] == [0, *[1] * (LAYERS - 1), last, LAYERS + 1]
    assert len(set(keys)) == 3 + alone
    order = [step.layer if isinstance(step, ExitPoint) else "piece" for step in lowered.steps]
    want = ["piece"]
    for layer in range(LAYERS):
        want += ["piece", *[e.layer for e in exits if e.layer == layer]]
    assert order == [*want, "piece"]
    assert "visual_mask" not in lowered.inputs
    assert lowered.inputs[:2] == ["inputs_embeds", "position_ids"]
    assert len(lowered.outputs) == 1 + 2 * LAYERS


@functools.cache
def decode_of_six_layers():
    return capture(describe(tiny(num_hidden_layers=6)), "decode")


@pytest.mark.parametrize(
    ("skipped", "want"),
    [
        ((), "A|B|B|B|B|B|C"),
        ((2,), "A|B|CDE|B|B|F"),
        ((1, 2, 4), "A|BCCD|BCD|E"),
        ((0, 5), "ABC|D|D|D|EBF"),
        (range(6), "AAAAAAB"),
    ],
    ids=str,
)
def test_pieces_of_decode_lie_between_attentions(skipped, want):
    """Where an attention is skipped the layer is a piece of its own: no pattern of skips makes more kinds than six."""
    graph = decode_of_six_layers().clone()
    run_passes(PASSES, graph, PassSettings(Plan(skips=[SkippedAttention(layer) for layer in skipped])))
    steps = lower_piecewise(graph).steps
    kinds = list(dict.fromkeys(step.key for step in steps if isinstance(step, Piece)))
    found = [chr(ord("A") + kinds.index(step.key)) if isinstance(step, Piece) else "|" for step in steps]
    assert "".join(found) == want


def test_keys_are_the_same_in_another_plan_and_model():
    """So what is compiled for one plan serves the next."""
    keys = {
        p.key
        for name in ("none", "static 0", "static 1")
        for p in pieces_of(lower_piecewise(rewritten("prefill", name, True)))
    }
    assert len(keys) == 4
    other = capture(describe(tiny(num_hidden_layers=2)), "prefill")
    run_passes(PASSES, other, PassSettings(plan()))
    assert {p.key for p in pieces_of(lower_piecewise(other))} == keys
    assert len(keys | {p.key for p in pieces_of(lower_piecewise(rewritten("extend", "none", True)))}) > 4


def lowered_prefill(model):
    graph = capture(describe(model), "prefill")
    run_passes(PASSES, graph, PassSettings(plan()))
    return lower_piecewise(graph)


def test_one_different_layer_is_one_piece_more():
    model = tiny()
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5
    lowered = lowered_prefill(model)
    keys = [p.key for p in pieces_of(lowered)]
    assert [keys.index(key) for key in keys] == [0, 1, 2, 3, 4]
    assert len({p.key for p in pieces_of(lowered_prefill(tiny()))} | set(keys)) == 5
    with torch.no_grad():
        got = Program(lowered, [], None).run([embeddings(5), positions(5)]).logits
        assert_close(got, model(inputs_embeds=embeddings(5)).logits[:, -1:])


def test_pieces_have_no_state_and_examples_fit():
    model = shared()
    lowered = lower_piecewise(rewritten("prefill", "static 1", True))
    values = {"inputs_embeds", "position_ids"}
    read = set()
    for step in lowered.steps:
        assert set(step.inputs) <= values
        values |= set(step.outputs)
        if isinstance(step, ExitPoint):
            continue
        assert not step.module.state_dict()
        placeholders = step.module.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(step.inputs) + len(step.parameters) == len(step.examples)
        assert not step.module.graph.find_nodes(op="get_attr")
        called = nodes_of(step.module.graph, *(op._opoverload for op in (token_exit, exit_gate, static_exit)))
        assert called == []
        for example, parameter in zip(step.examples[len(step.inputs) :], step.parameters, strict=True):
            assert example.shape == parameter().shape
            assert all(type(size) is int for size in example.shape)
            read.add(id(parameter()))
        if step is not lowered.steps[-1]:  # behind the last layer is one token
            assert any(isinstance(size, torch.SymInt) for size in step.examples[0].shape)
    unused = {id(model.get_input_embeddings().weight)}
    assert read >= {id(p) for p in model.parameters()} - unused
    assert set(lowered.outputs) <= values


def test_exit_points():
    lowered = lower_piecewise(rewritten("prefill", "middle of three", True))
    points = [step for step in lowered.steps if isinstance(step, ExitPoint)]
    assert [p.layer for p in points] == [0, 1, 2]
    for point, planned in zip(points, EXITS["middle of three"], strict=True):
        w1, w2, threshold = point.gate
        assert torch.equal(w1(), planned.w1)
        assert torch.equal(w2(), planned.w2)
        assert threshold == planned.threshold
        assert point.stream in point.inputs
        assert len(point.inputs) == len(point.outputs) == len(point.dims)
        assert point.dims == [[1]] * (3 if point.layer < 2 else 1)  # cos and sin while layers follow, and the stream
    (static,) = (s for s in lower_piecewise(rewritten("prefill", "static 1", True)).steps if isinstance(s, ExitPoint))
    assert static.gate is None


def test_weights_are_read_when_run():
    model = tiny(num_hidden_layers=1)
    program = Program(lowered_prefill(model), [], None)
    inputs = [embeddings(5), positions(5)]
    with torch.no_grad():
        program.run(inputs)
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
        assert_close(program.run(inputs).logits, model(inputs_embeds=inputs[0]).logits[:, -1:])


def test_values_are_freed_after_their_last_use():
    """While layer i runs, the stream of layer i - 2 is gone, and so are the rotary tables in the end."""
    program = Program(lower_piecewise(rewritten("prefill", "static 1", True)), [], None)
    alive: list[weakref.ref] = []
    counts = []

    def watch(step):
        function = step.function

        def run(*args):
            counts.append(sum(ref() is not None for ref in alive))
            results = function(*args)
            alive.extend(weakref.ref(t) for t in results)
            return results

        step.function = run

    for step in program._steps:
        if hasattr(step, "function"):
            watch(step)
    visual = VisualTokens.find(layout("tvvvttt")[0])
    with torch.no_grad():
        output = program.run([embeddings(7), positions(7)], visual)
    # In front of each piece: cos and sin, then the keys and values so far with the latest stream. The exit behind layer
    # 1 makes new tables and a new stream, which are not watched.
    assert counts == [0, 2, 2 + 3, 4, 6 + 1]
    assert sum(ref() is not None for ref in alive) == 2 * LAYERS + 1
    assert (len(output.kv), visual.exit_layer) == (LAYERS, 1)


# ---------------------------------------------------------------- keys and refusals


def test_keys_number_symbols_all_at_once():
    """A symbol's new name may be another's old one: two lengths must not become one."""
    environment = ShapeEnv()

    def size(expression):
        return torch.SymInt(SymNode(sympy.sympify(expression), environment, int, 7))

    def key(*expressions):
        graph = fx.Graph()
        graph.output(tuple(graph.placeholder(name) for name in "ab"))
        shapes = [(size(expression), 4) for expression in expressions]
        return structure_key(
            graph,
            [
                SimpleNamespace(dtype=torch.float32, device="cpu", shape=shape, stride=lambda: (4, 1))
                for shape in shapes
            ],
        )

    assert key("s1", "s0") == key("s0", "s1") == key("s7", "s8")
    assert key("s1", "s1") == key("s0", "s0")
    assert key("s1", "s0") != key("s1", "s1")
    assert key("s1", "s1 + s0") == key("s3", "s4 + s3") != key("s1", "2*s1")


def test_refuses_a_size_that_no_input_has():
    graph = captured()
    run_passes(PASSES, graph, PassSettings(plan()))
    aten = torch.ops.aten
    size = nodes_of(graph, aten.sym_size.int)[0]
    view = next(n for n in nodes_of(graph, aten.view.default) if graph.layer_of[n] == 1)
    with graph.graph.inserting_after(size):
        odd = graph.graph.call_function(aten.sym_numel.default, (graph.placeholder("inputs_embeds"),))
    odd.meta["val"] = graph.placeholder("inputs_embeds").meta["val"].numel()
    graph.layer_of[odd] = -1
    view.args = (view.args[0], [1, odd, -1, 8])
    with pytest.raises(CaptureError, match=rf"{odd.name}: the size 32\*s\d+ cannot be read from the piece's inputs"):
        lower_piecewise(graph)
