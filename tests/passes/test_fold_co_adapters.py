"""Pass fold_co_adapters: numbers against the oracle, which weights change, rounding, and what cannot be folded into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_bridgetower import captured, cross_layer, layer_inputs, random_part, run_graph, run_layer
from torch import nn

from vte_compile import CoAttention
from vte_compile.capture.co_attention import capture_co_attention
from vte_compile.oracle.co_attention import OracleLayer
from vte_compile.passes.fold_co_adapters import fold_co_adapters

FULL = random_part("text", 3, dtype=torch.float64)
FOLDED = {
    "self_adapter": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "cross_adapter": ("crossattention.self.query",),
    "ffn_adapter": ("intermediate.dense",),
}


def part_with(*names: str) -> CoAttention:
    return CoAttention("text", 3, **{name: getattr(FULL, name) for name in names})


@pytest.mark.parametrize("names", [("self_adapter",), ("cross_adapter",), ("ffn_adapter",), tuple(FOLDED)])
def test_numbers_count_and_folded_weights(names: tuple[str, ...]) -> None:
    layer, graph = captured()
    before = {path: weight.clone() for path, weight in layer.named_parameters()}
    nodes = str(graph.graph)
    result = fold_co_adapters(graph, part_with(*names))
    assert (result.name, result.applied, result.refusals) == ("fold_co_adapters", len(names), [])
    assert str(graph.graph) == nodes  # an adapter costs nothing any more
    changed = {f"{path}.{kind}" for name in names for path in FOLDED[name] for kind in ("weight", "bias")}
    assert set(result.rounding) == changed
    parameters = dict(layer.named_parameters())
    assert {path for path, weight in graph.weights.items() if weight is not parameters[path]} == changed
    assert all(torch.equal(parameters[path], weight) for path, weight in before.items())
    given = layer_inputs("text", dtype=torch.float64)
    expected = run_layer(OracleLayer(layer, part_with(*names)), given)
    torch.testing.assert_close(run_graph(graph, given), expected, rtol=1e-11, atol=1e-11)


def test_bias_comes_from_the_original_weight() -> None:
    layer, graph = captured()
    fold_co_adapters(graph, part_with("ffn_adapter"))
    adapter = FULL.ffn_adapter
    assert adapter is not None
    zero = torch.zeros(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        # AD(0) = s * (GB bA + bB), and not the folded weight's image of it.
        z = adapter.down.bias.view(2, 3)
        up = adapter.up0.weight.view(2, 16, 3)
        at_zero = adapter.scale * (torch.einsum("gi,goi->go", z, up).flatten() + adapter.up0.bias)
        expected = layer.intermediate.dense(zero + at_zero)[0, 0]
    torch.testing.assert_close(graph.weights["intermediate.dense.bias"], expected)


@pytest.mark.parametrize(
    ("dtype", "smallest", "largest"), [(torch.float32, 0, 2**-24), (torch.bfloat16, 2**-12, 2**-8)]
)
def test_rounding_is_reported_in_the_models_dtype(dtype: torch.dtype, smallest: float, largest: float) -> None:
    layer, graph = captured(dtype)
    result = fold_co_adapters(graph, FULL)
    assert {graph.weights[path].dtype for path in result.rounding} == {dtype}
    assert all(smallest < share <= largest for share in result.rounding.values())
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


@pytest.mark.parametrize("skips", [(True, False), (False, True)])
def test_adapters_of_skipped_attentions_are_left_alone(skips: tuple[bool, bool]) -> None:
    _, graph = captured()
    result = fold_co_adapters(graph, random_part("image", 0, *skips))
    assert result.applied == 2
    assert not any(path.startswith(("attention.", "crossattention.")[skips.index(True)]) for path in result.rounding)


def test_nothing_to_fold() -> None:
    _, graph = captured()
    result = fold_co_adapters(graph, random_part("image", 0, True, True, adapters=False))
    assert (result.applied, result.rounding, result.refusals) == (0, {}, [])


# Layers of another form


class Scaled(nn.Module):
    """A linear whose weight is computed."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.linear(x, 2 * self.own.weight, self.own.bias)


def changed_layer(change: str) -> Any:
    layer: Any = cross_layer()
    attention = layer.attention.self
    if change == "no bias":
        attention.query.bias = None
    elif change == "computed":
        attention.key = Scaled(attention.key)
    elif change == "tied":
        attention.value.weight = attention.key.weight
    elif change == "no linear":
        attention.value = nn.Identity()
    elif change == "two linears":
        attention.query = nn.Sequential(nn.Linear(32, 32), attention.query)
    else:  # "gated": a second linear reads the FFN's input
        layer.intermediate.dense = Gated(layer.intermediate.dense)
    return layer


class Gated(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own, self.gate = own, nn.Linear(32, 48)

    def forward(self, x: Any) -> Any:
        return self.own(x) * self.gate(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no bias", "this linear has no bias"),
        ("computed", "this linear's weights are computed, or used elsewhere too"),
        ("tied", "this linear's weights are computed, or used elsewhere too"),
        ("no linear", "no linear makes the attention's v"),
        ("two linears", "this linear reads linear, expected hidden_states"),
        ("gated", "2 linears read the FFN's input, expected 1"),
    ],
)
def test_what_cannot_be_folded_into_is_refused(change: str, reason: str) -> None:
    graph = capture_co_attention(changed_layer(change))
    before = dict(graph.weights)
    result = fold_co_adapters(graph, FULL)
    assert result.applied == 0
    assert reason in result.refusals[0].reason
    assert all(graph.weights[path] is weight for path, weight in before.items())
