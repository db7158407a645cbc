"""Graphs of co-attention layers: what is traced, masks that are not given, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_bridgetower import captured, cross_layer, layer_inputs, run_graph, run_layer
from torch import nn

from vte_compile.capture.co_attention import INPUTS, built_alike, capture_co_attention
from vte_compile.errors import CaptureError
from vte_compile.passes.residual import SDPA


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("sizes", [(1, 7, 5), (2, 1, 3), (4, 6, 1), (2, 9, 9)])
def test_graph_is_the_layer(sizes: tuple[int, int, int], side: str, masked: bool) -> None:
    layer, graph = captured()
    given = layer_inputs(side, *sizes, masked=masked, dtype=torch.float64)
    torch.testing.assert_close(run_graph(graph, given), run_layer(layer, given), rtol=1e-12, atol=1e-12)


def test_both_masks_at_once() -> None:
    layer, graph = captured()
    given = {
        **layer_inputs("image", 2, 5, 7, dtype=torch.float64),
        **layer_inputs("text", 2, 5, 7, dtype=torch.float64),
    }
    assert set(given) == set(INPUTS)
    torch.testing.assert_close(run_graph(graph, given), run_layer(layer, given), rtol=1e-12, atol=1e-12)


def test_graph_refers_to_the_layers_own_weights_and_leaves_it_as_it_was() -> None:
    layer = cross_layer()
    layer.train()
    graph = capture_co_attention(layer)
    assert layer.training
    assert layer.attention.self.config._attn_implementation == "eager"
    parameters = dict(layer.named_parameters())
    assert all(graph.weights[path] is parameter for path, parameter in parameters.items())
    assert len(graph.weights) == len(parameters)
    assert len([n for n in graph.graph.nodes if n.target is SDPA]) == 2


def test_clone_takes_the_weights_of_another_layer() -> None:
    layer, other = cross_layer(), cross_layer(seed=1)
    graph = capture_co_attention(layer).clone(other)
    given = layer_inputs("text")
    torch.testing.assert_close(run_graph(graph, given), run_layer(other, given), rtol=1e-5, atol=1e-5)


def test_layers_built_alike() -> None:
    layers = [*(cross_layer() for _ in range(6)), cross_layer(attention_probs_dropout_prob=0.2)]
    layers[2].output.LayerNorm.eps = 1e-3
    layers[3].half()
    layers[4].intermediate.intermediate_act_fn = nn.ReLU()
    layers[5].register_forward_hook(lambda *args: None)
    assert [built_alike(layers[0], other) for other in layers[1:]] == [True, False, False, False, False, False]


class DataDependent(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


def test_layer_that_cannot_be_traced_is_refused() -> None:
    layer = cross_layer()
    layer.intermediate.intermediate_act_fn = DataDependent()
    with pytest.raises(CaptureError, match=r"^torch\.export could not trace BridgeTowerBertCrossLayer"):
        capture_co_attention(layer)


class OwnAttention(nn.Module):
    """Attends without asking for the implementation of the config."""

    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        scores = hidden_states @ hidden_states.transpose(1, 2) + attention_mask[:, 0]
        return scores.softmax(-1) @ hidden_states, None


def test_layer_with_an_attention_of_its_own_is_refused() -> None:
    layer = cross_layer()
    layer.attention.self = OwnAttention()
    with pytest.raises(CaptureError, match="uses attention_mask, which only scaled_dot_product_attention should"):
        capture_co_attention(layer)
