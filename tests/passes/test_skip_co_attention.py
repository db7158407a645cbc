"""Pass skip_co_attention: numbers against the oracle, what is left of a layer, and layers of another form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_bridgetower import captured, cross_layer, layer_inputs, random_part, run_graph, run_layer
from torch import nn

from vte_compile import CoAttention
from vte_compile.capture.co_attention import CoAttentionGraph, capture_co_attention
from vte_compile.oracle.co_attention import OracleLayer
from vte_compile.passes.residual import SDPA
from vte_compile.passes.skip_co_attention import skip_co_attention

aten = torch.ops.aten


def only_skips(side: Any, skip_self: bool, skip_cross: bool, adapters: bool) -> CoAttention:
    """Without plain adapters, which are another pass's."""
    part = random_part(side, 3, skip_self, skip_cross, adapters, dtype=torch.float64)
    pias = (part.self_adapter if skip_self else None, part.cross_adapter if skip_cross else None)
    return CoAttention(side, 3, skip_self, skip_cross, *pias)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("skips", [(True, False), (False, True), (True, True)])
def test_numbers_and_count(skips: tuple[bool, bool], side: str, adapters: bool) -> None:
    layer, graph = captured()
    part = only_skips(side, *skips, adapters)
    result = skip_co_attention(graph, part)
    assert (result.name, result.applied, result.refusals) == ("skip_co_attention", sum(skips), [])
    given = layer_inputs(side, dtype=torch.float64)
    torch.testing.assert_close(
        run_graph(graph, given), run_layer(OracleLayer(layer, part), given), rtol=1e-12, atol=1e-12
    )


def inputs_of(graph: CoAttentionGraph) -> set[str]:
    """Inputs other than weights."""
    return {n.name for n in graph.graph.nodes if n.op == "placeholder" and graph.path_of(n) is None}


def paths_of(layer: nn.Module, *without: str) -> set[str]:
    return {path for path, _ in layer.named_parameters() if not path.startswith(without)}


SELF = ("attention.self.", "attention.output.dense.")
CROSS = ("crossattention.self.", "crossattention.output.dense.")


@pytest.mark.parametrize(
    ("skips", "gone", "inputs", "linears"),
    [
        ((True, False), SELF, {"hidden_states", "encoder_hidden_states", "encoder_attention_mask"}, 6),
        ((False, True), CROSS, {"hidden_states", "attention_mask"}, 6),
        ((True, True), SELF + CROSS, {"hidden_states"}, 2),
    ],
)
def test_what_only_the_attention_used_is_gone(
    skips: tuple[bool, bool], gone: tuple[str, ...], inputs: set[str], linears: int
) -> None:
    layer, graph = captured()
    assert len([n for n in graph.graph.nodes if n.target is aten.linear.default]) == 10
    skip_co_attention(graph, only_skips("text", *skips, adapters=False))
    assert set(graph.weights) == paths_of(layer, *gone)
    assert inputs_of(graph) == inputs
    targets = [n.target for n in graph.graph.nodes]
    assert targets.count(SDPA) == 2 - sum(skips)
    assert targets.count(aten.linear.default) == linears
    assert all(n.users for n in graph.graph.nodes if n.op != "output")


def test_pia_is_a_low_rank_op_with_weights_of_its_own() -> None:
    layer, graph = captured()
    skip_co_attention(graph, only_skips("text", True, True, adapters=True))
    own = {
        f"{path}.pia.{name}": shape
        for path in ("attention", "crossattention")
        for name, shape in {
            "pool.weight": (6, 32),
            "pool.bias": (6,),
            "down.weight": (6, 32),
            "up.weight": (32, 6),
            "up.bias": (32,),
        }.items()
    }
    assert set(graph.weights) == paths_of(layer, *SELF, *CROSS) | set(own)
    assert {path: tuple(graph.weights[path].shape) for path in own} == own
    assert inputs_of(graph) == {"hidden_states", "encoder_hidden_states"}
    assert [n.target for n in graph.graph.nodes].count(SDPA) == 0


def test_nothing_to_skip_changes_nothing() -> None:
    _, graph = captured()
    before = str(graph.graph)
    result = skip_co_attention(graph, random_part("text", 0))
    assert (result.applied, result.refusals, str(graph.graph)) == (0, [], before)


# Layers of another form


class Output(nn.Module):
    """An attention's output module that does something else about the residual."""

    def __init__(self, own: Any, kind: str) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.kind = own.dense, own.LayerNorm, kind

    def forward(self, hidden_states: Any, input_tensor: Any) -> Any:
        hidden_states = self.dense(hidden_states)
        if self.kind == "scaled residual":
            return self.LayerNorm(hidden_states + 2 * input_tensor)
        if self.kind == "alpha":
            return self.LayerNorm(torch.add(hidden_states, input_tensor, alpha=2))
        if self.kind == "gate":
            return self.LayerNorm(hidden_states * input_tensor)
        if self.kind == "no norm":
            return torch.tanh(hidden_states + input_tensor)
        if self.kind == "sum used twice":
            return self.LayerNorm(hidden_states + input_tensor) + (hidden_states + input_tensor)
        return self.LayerNorm(hidden_states + input_tensor) + hidden_states  # "attention used twice"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scaled residual", "what comes before the residual addition is used more than once"),
        ("alpha", "something else than a plain sum"),
        ("gate", "something else than a plain sum"),
        ("no norm", "elsewhere than into one layer norm"),
        ("sum used twice", "what comes before the residual addition is used more than once"),
        ("attention used twice", "what comes before the residual addition is used more than once"),
    ],
)
def test_other_residuals_are_refused(kind: str, reason: str) -> None:
    layer: Any = cross_layer()
    layer.attention.output = Output(layer.attention.output, kind)
    graph = capture_co_attention(layer)
    before = str(graph.graph)
    result = skip_co_attention(graph, CoAttention("text", 3, skip_cross=True))
    assert (result.applied, str(graph.graph)) == (0, before)
    assert reason in result.refusals[0].reason
    assert result.refusals[0].layer == 3
    assert result.refusals[0].node in {n.name for n in graph.graph.nodes}


class NoAttention(nn.Module):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        return hidden_states.cumsum(1), None


def test_other_numbers_of_attentions_are_refused() -> None:
    layer: Any = cross_layer()
    layer.crossattention.self = NoAttention()
    (refusal,) = skip_co_attention(capture_co_attention(layer), CoAttention("text", 0, skip_self=True)).refusals
    assert refusal.reason == "1 attentions in this layer, expected self and cross attention."


class ChangedOutput(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden_states: Any, input_tensor: Any) -> Any:
        return 2 * self.own(hidden_states, input_tensor)


def test_more_behind_the_ffn_is_refused() -> None:
    layer: Any = cross_layer()
    layer.output = ChangedOutput(layer.output)
    (refusal,) = skip_co_attention(capture_co_attention(layer), CoAttention("text", 0, skip_self=True)).refusals
    assert refusal.reason == "the layer's output is not the norm behind the FFN."
