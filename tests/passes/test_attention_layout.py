"""attention_layout: reshapes and swaps that cancel go; others stay."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYERS, assert_close, captured, chunk_inputs, nodes_of, plan, run_graph

from vte_compile.passes import PassSettings
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.attention_layout import attention_layout
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.fuse_rotary import fuse_rotary

aten = torch.ops.aten
LAYOUT = (aten.transpose.int, aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def test_nothing_is_left_between_linear_layers_and_attention() -> None:
    graph, settings, inputs = captured("chunk"), PassSettings(plan()), chunk_inputs([5, 3], [2, 0])
    logits = run_graph(graph, *inputs)[0]
    annotate_layers(graph, settings)
    fuse_rotary(graph, settings)
    result = attention_layout(graph, settings)
    assert (result.applied, result.refusals) == (4 * LAYERS, [])  # query, key, value, and the attention's result
    cleanup(graph, settings)
    assert not [n for n in nodes_of(graph, *LAYOUT) if 0 <= graph.layer_of[n] < LAYERS]
    after = run_graph(graph, *inputs)[0]
    for b, count in enumerate((5, 3)):
        assert_close(after[b, :count], logits[b, :count])


def test_heads_that_are_rotated_stay_where_they_are() -> None:
    """Without fuse_rotary, queries and keys really change between the reshapes."""
    graph, settings = captured("chunk"), PassSettings(plan())
    annotate_layers(graph, settings)
    assert attention_layout(graph, settings).applied == 2 * LAYERS
    cleanup(graph, settings)
    assert len(nodes_of(graph, aten.transpose.int)) >= 4 * LAYERS


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_only_in_chunks(phase) -> None:
    graph, settings = captured(phase), PassSettings(plan())
    annotate_layers(graph, settings)
    assert attention_layout(graph, settings).applied == 0
