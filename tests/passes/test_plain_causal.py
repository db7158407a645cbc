"""plain_causal: proved on the masks of transformers, and refused, with the reason, on every mask that is another."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from helpers import (
    LAYERS,
    assert_close,
    captured,
    embeddings,
    nodes_of,
    plan,
    positions,
    random_kv,
    run_graph,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from vte_compile.passes import PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.plain_causal import _element, _Unknown, plain_causal

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SETTINGS = PassSettings(plan())
MASK_OPS = (aten.le.Tensor, aten.ge.Tensor, aten.arange.default, aten.arange.start_step, aten.bitwise_and.Tensor)


def apply(graph):
    return run_passes([annotate_layers, plain_causal], graph, SETTINGS)[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_proved_on_the_masks_of_transformers(family):
    options = {} if family == "llama" else {"num_hidden_layers": 2}
    graph = captured(family=family, **options)
    layers = graph.spec.num_layers
    args = {n: (embeddings(n), positions(n)) for n in (2, 7)}
    before = {n: run_graph(graph, *a) for n, a in args.items()}
    assert len(nodes_of(graph, aten.arange.default)) >= 2
    assert all(n.args[3] is not None for n in nodes_of(graph, SDPA))
    result = apply(graph)
    assert (result.applied, result.refusals) == (layers, [])
    for attention in nodes_of(graph, SDPA):
        assert attention.args[3:] == (None, 0.0, True)
        assert attention.kwargs.keys() <= {"scale", "enable_gqa"}
        assert attention.kwargs["scale"] == 8**-0.5
    cleanup(graph, SETTINGS)
    assert nodes_of(graph, *MASK_OPS) == []
    assert len(nodes_of(graph, SDPA)) == layers
    for n, a in args.items():
        assert_close(run_graph(graph, *a), before[n])
    assert apply(graph).applied == 0  # nothing is left to do


# ---------------------------------------------------------------- masks built by hand


class Builder:
    """Adds nodes with fake values in front of the first attention of a captured prefill."""

    def __init__(self, graph):
        self.graph = graph
        self.embeds = graph.placeholder("inputs_embeds")
        self.mode = self.embeds.meta["val"].fake_mode
        self.attention = nodes_of(graph, SDPA)
        self.old = self.attention[0].args[3]
        with graph.graph.inserting_before(nodes_of(graph, aten.unsqueeze.default)[0]):
            self.length = self(aten.sym_size.int, self.embeds, 1)
            self.k = self(aten.arange.default, self.length, device=torch.device("cpu"), pin_memory=False)
            self.q = self(aten.unsqueeze.default, self.k, 1)

    def __call__(self, target, *args, **kwargs):
        node = self.graph.graph.call_function(target, args, kwargs)
        with self.mode, torch.no_grad():
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def use(self, build):
        """Give all attentions the mask that ``build(self)`` makes."""
        with self.graph.graph.inserting_before(self.attention[0]):
            mask = build(self)
        for attention in self.attention:
            attention.args = (*attention.args[:3], mask)
        return mask


def padding_mask(b):
    with b.graph.graph.inserting_after(b.graph.placeholder("position_ids")):
        padding = b.graph.graph.placeholder("padding")
    padding.meta["val"] = b.graph.placeholder("position_ids").meta["val"].to(torch.bool)
    return b(aten.bitwise_and.Tensor, b.old, b(aten.unsqueeze.default, b(aten.unsqueeze.default, padding, 1), 1))


def causal(b):
    return b(aten.le.Tensor, b.k, b.q)


def sliding_window(b):
    return b(aten.bitwise_and.Tensor, causal(b), b(aten.gt.Tensor, b.k, b(aten.sub.Tensor, b.q, 4)))


REFUSED = {
    "padding": (padding_mask, r"the mask depends on padding: a placeholder"),
    "sliding window": (sliding_window, r"an element of bitwise_and\S* is .*k > q - 4.*, not k <= q"),
    "additive": (
        lambda b: b(aten.mul.Tensor, b(aten.to.dtype, b(aten.lt.Tensor, b.q, b.k), torch.float32), -1e9),
        r"mul\S* is an additive mask \(torch.float32\)",
    ),
    "tril(1) by comparison": (
        lambda b: b(aten.le.Tensor, b.k, b(aten.add.Tensor, b.q, 1)),
        r"an element of le\S* is k <= q \+ 1, not k <= q",
    ),
    "tril(1) by tril": (
        lambda b: b(aten.tril.default, b(aten.ones.default, [b.length, b.length], dtype=torch.bool), 1),
        r"the mask depends on tril\S*: call_function aten.tril.default",
    ),
    "all true": (
        lambda b: b(aten.ones.default, [b.length, b.length], dtype=torch.bool),
        r"an element of ones\S* is 1, not k <= q",
    ),
    "all true by comparison": (lambda b: b(aten.ge.Scalar, b(aten.add.Tensor, b.k, b.q), 0), "is True, not k <= q"),
    "strict": (lambda b: b(aten.lt.Tensor, b.k, b.q), r"an element of lt\S* is k < q, not k <= q"),
    "transposed": (lambda b: b(aten.ge.Tensor, b.k, b.q), r"an element of ge\S* is k >= q, not k <= q"),
    "every second": (
        lambda b: b(aten.le.Tensor, b(aten.add.Tensor, b.k, b.k), b.q),
        r"an element of le\S* is 2\*k <= q, not k <= q",
    ),
    "shifted by a slice": (
        lambda b: b(
            aten.le.Tensor, b(aten.slice.Tensor, b(aten.arange.default, b(torch.sym_sum, [b.length, 1])), 0, 1), b.q
        ),
        r"is k \+ 1 <= q, not k <= q",
    ),
    "columns only": (
        lambda b: b(aten.le.Tensor, b(aten.unsqueeze.default, b.k, 0), b(aten.arange.default, 1)),
        r"an element of le\S* is k <= 0, not k <= q",
    ),
    "scaled difference": (
        lambda b: b(aten.le.Scalar, b(aten.sub.Tensor, b.k, b.q, alpha=2), 0),
        r"the mask depends on sub\S*: alpha",
    ),
    "truth as a number": (
        lambda b: b(aten.le.Tensor, b.k, b(aten.add.Tensor, b.q, b(aten.to.dtype, causal(b), torch.int64))),
        r"the mask depends on to_dtype\S*: a cast between bool and number",
    ),
    # 257 is 256 in bfloat16: behind position 256, tokens would see one that follows.
    "positions in bfloat16": (
        lambda b: b(aten.le.Tensor, b(aten.to.dtype, b.k, torch.bfloat16), b(aten.to.dtype, b.q, torch.bfloat16)),
        r"the mask depends on to_dtype\S*: torch.bfloat16, which may round or overflow",
    ),
    "positions in int8": (
        lambda b: b(aten.le.Tensor, b(aten.to.dtype, b.k, torch.int8), b(aten.to.dtype, b.q, torch.int8)),
        r"torch.int8, which may round or overflow",
    ),
    "bits of positions": (
        lambda b: b(aten.le.Tensor, b(aten.bitwise_and.Tensor, b.k, b(aten.ones.default, [1], dtype=torch.int64)), b.q),
        r"the mask depends on bitwise_and\S*: a logical operation on numbers",
    ),
    "a row of data": (
        lambda b: b(aten.le.Tensor, b.k, b(aten.unsqueeze.default, b(aten.select.int, b.positions, 0, 0), 1)),
        r"the mask depends on select\S*: call_function aten.select.int",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    build, reason = REFUSED[case]
    graph = captured()
    builder = Builder(graph)
    builder.positions = graph.placeholder("position_ids")
    mask = builder.use(build)
    inputs = [embeddings(6), positions(6)]
    if case == "padding":
        inputs.append(torch.tensor([[False, True, True, True, True, True]]))
    before = run_graph(graph, *inputs)
    count = len(graph.graph.nodes)
    result = apply(graph)
    assert result.applied == 0
    assert [r.layer for r in result.refusals] == list(range(LAYERS))
    for refusal in result.refusals:
        assert_matches(refusal.reason, reason)
        assert refusal.node in {n.name for n in graph.graph.nodes}
    assert all(n.args[3] is mask for n in nodes_of(graph, SDPA))
    assert len(graph.graph.nodes) == count
    for got, want in zip(run_graph(graph, *inputs), before, strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def assert_matches(text, pattern):
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


PROVED = {
    "q >= k": lambda b: b(aten.ge.Tensor, b.q, b.k),
    "four dims": lambda b: b(aten.unsqueeze.default, b(aten.unsqueeze.default, causal(b), 0), 1),
    "and all true": lambda b: b(
        aten.bitwise_and.Tensor, causal(b), b(aten.new_ones.default, causal(b), [1, 1], dtype=torch.bool)
    ),
    "or all false": lambda b: b(
        aten.logical_or.default, causal(b), b(aten.full.default, [b.length, b.length], False, dtype=torch.bool)
    ),
    "int32": lambda b: b(aten.le.Tensor, b(aten.to.dtype, b.k, torch.int32), b.q),
}


@pytest.mark.parametrize("case", PROVED)
def test_proves_the_same_mask_said_otherwise(case):
    graph = captured()
    args = embeddings(6), positions(6)
    want = run_graph(graph, *args)
    Builder(graph).use(PROVED[case])
    assert_close(run_graph(graph, *args), want)  # it is that mask
    result = apply(graph)
    assert (result.applied, result.refusals) == (LAYERS, [])
    assert_close(run_graph(graph, *args), want)


def test_only_the_attention_that_differs_is_refused():
    graph = captured()
    builder = Builder(graph)
    with graph.graph.inserting_before(builder.attention[0]):
        window = sliding_window(builder)
    middle = builder.attention[1]
    middle.args = (*middle.args[:3], window)
    before = run_graph(graph, embeddings(9), positions(9))
    result = apply(graph)
    assert result.applied == LAYERS - 1
    assert [(r.layer, r.node) for r in result.refusals] == [(1, window.name)]
    assert_close(run_graph(graph, embeddings(9), positions(9)), before)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_queries_and_keys_of_different_lengths(phase):
    graph = captured(phase)
    result = apply(graph)
    assert result.applied == 0
    reasons = [r.reason for r in result.refusals]
    assert len(reasons) == (LAYERS if phase == "extend" else 0)  # decode has no mask to drop
    for reason in reasons:
        assert_matches(reason, r"scaled_dot\S* has s\d+ queries for s\d+ \+ s\d+ keys: causal from which end\?")
    tokens = 4 if phase == "extend" else 1
    args = embeddings(tokens), positions(tokens, 9), *random_kv((9, 5, 2))
    assert_close(run_graph(graph, *args), run_graph(captured(phase), *args))


@pytest.mark.parametrize(("dropout", "is_causal"), [(0.1, False), (0.0, True)])
def test_refuses_what_is_more_than_a_mask(dropout, is_causal):
    graph = captured()
    first = nodes_of(graph, SDPA)[0]
    first.args = (*first.args[:4], dropout, is_causal)
    result = apply(graph)
    assert result.applied == LAYERS - 1
    assert [(r.layer, r.node, r.reason) for r in result.refusals] == [
        (0, first.name, f"{first.name} has dropout, or is_causal besides a mask.")
    ]


# ---------------------------------------------------------------- the evaluation itself

S = 5  # of the random masks: [S, S]


class Evaluated:
    """A graph whose nodes carry what they really give."""

    def __init__(self):
        self.graph = fx.Graph()

    def __call__(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node


@st.composite
def positions_along(draw, make, axis):
    """Numbers that vary along one axis of [S, S], or not at all."""
    offset = draw(st.integers(0, 2))
    step = draw(st.integers(1, 2))
    node = draw(
        st.sampled_from(
            [
                lambda: make(aten.arange.default, S),
                lambda: make(aten.arange.start, offset, S + offset),
                lambda: make(aten.arange.start_step, offset, offset + step * S, step),
                lambda: make(aten.slice.Tensor, make(aten.arange.default, S + offset), 0, offset),
                lambda: make(aten.slice.Tensor, make(aten.arange.default, step * S), 0, 0, 2**62, step),
                lambda: make(aten.full.default, [S], offset),
                lambda: make(aten.ones_like.default, make(aten.arange.default, S)),
            ]
        )
    )()
    shape = [1, S] if axis else [S, 1]
    node = draw(
        st.sampled_from(
            [
                lambda: make(aten.unsqueeze.default, node, -2 if axis else -1),
                lambda: make(aten.unsqueeze.default, node, 0 if axis else 1),
                lambda: make(aten.view.default, node, shape),
                lambda: make(aten.expand.default, make(aten.reshape.default, node, shape), [S, S]),
            ]
        )
    )()
    return draw(
        st.sampled_from(
            [
                lambda: node,
                lambda: make(aten.add.Tensor, node, draw(st.integers(-2, 2))),
                lambda: make(aten.sub.Tensor, node, draw(st.integers(-2, 2))),
                lambda: make(aten.to.dtype, node, torch.int32),
                lambda: make(aten.clone.default, node),
            ]
        )
    )()


@st.composite
def masks(draw, make, depth=2):
    if depth and draw(st.booleans()):
        target = draw(
            st.sampled_from(
                [aten.bitwise_and.Tensor, aten.logical_and.default, aten.bitwise_or.Tensor, aten.logical_or.default]
            )
        )
        return make(target, draw(masks(make, depth - 1)), draw(masks(make, depth - 1)))
    if draw(st.integers(0, 5)) == 0:
        shape = draw(st.sampled_from([[S, S], [1, S], [1, 1]]))
        return make(aten.full.default, shape, draw(st.booleans()), dtype=torch.bool)
    compare = draw(st.sampled_from([aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor]))
    return make(compare, draw(positions_along(make, draw(st.booleans()))), draw(positions_along(make, True)))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_symbolic_and_real_evaluation_agree(data):
    make = Evaluated()
    mask = make(aten.expand.default, data.draw(masks(make)), [2, S, S])
    b, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bqk")
    element = sympy.sympify(_element(mask, (b, q, k)))
    real = mask.meta["val"]
    for i, j in itertools.product(range(S), range(S)):
        assert bool(element.subs({q: i, k: j})) == bool(real[0, i, j]), (element, i, j)
    if element in (sympy.Le(k, q), sympy.Ge(q, k)):
        assert torch.equal(real[0], torch.ones(S, S, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("target", "args", "why"),
    [
        (aten.slice.Tensor, (0, -3), "a slice from -3"),
        (aten.view.default, ([S // 2, 2],), "a reshape that mixes dims"),
        (aten.flip.default, ([0],), "call_function aten.flip.default"),
        (aten.add.Tensor, (0.5,), "torch.float32, which may round or overflow"),
    ],
)
def test_what_the_evaluation_does_not_know(target, args, why):
    make = Evaluated()
    node = make(target, make(aten.arange.default, 4), *args)
    with pytest.raises(_Unknown) as unknown:
        _element(node, tuple(sympy.Symbol(name) for name in "qk"[: node.meta["val"].ndim]))
    assert str(unknown.value) == f"{node.name}: {why}"
    assert unknown.value.node is node
