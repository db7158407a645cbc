"""The oracle of co-attention layers against the authors' numbers and against transformers' own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_bridgetower import (
    cross_layer,
    golden,
    golden_inputs,
    golden_layer,
    golden_part,
    inputs,
    layer_inputs,
    random_part,
    run_layer,
    shared,
)
from tiny_models import tiny

from vte_compile import CoAttention, Plan
from vte_compile.errors import UnsupportedModelError
from vte_compile.oracle.co_attention import OracleLayer, co_attention_oracle


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("skip_cross", [False, True])
@pytest.mark.parametrize("skip_self", [False, True])
def test_golden_meter(skip_self: bool, skip_cross: bool, side: str) -> None:
    layer = OracleLayer(golden_layer(side), golden_part(side, skip_self, skip_cross))
    expected = golden()[f"self{int(skip_self)}_cross{int(skip_cross)}.{side}0.f64"]
    torch.testing.assert_close(run_layer(layer, golden_inputs(side)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["text", "image"])
def test_without_a_part_it_is_the_layer_itself(side: Any, masked: bool) -> None:
    layer, given = cross_layer().double(), layer_inputs(side, masked=masked, dtype=torch.float64)
    torch.testing.assert_close(run_layer(OracleLayer(layer, CoAttention(side, 0)), given), run_layer(layer, given))


def test_training_free_skips_leave_norms_and_ffn() -> None:
    layer, given = cross_layer().double(), layer_inputs("text", dtype=torch.float64)
    with torch.no_grad():
        a = layer.attention.output.LayerNorm(given["hidden_states"])
        expected = layer.feed_forward_chunk(layer.crossattention.output.LayerNorm(a))
    torch.testing.assert_close(run_layer(OracleLayer(layer, CoAttention("text", 0, True, True)), given), expected)


def test_whole_model() -> None:
    model, given = shared(), inputs(padded=2)
    names = list(model.state_dict())
    with torch.no_grad():
        expected, same = model(**given), co_attention_oracle(model, Plan())(**given)
        skipped = co_attention_oracle(model, Plan(co_attention=[random_part("image", 1, skip_self=True)]))(**given)
    torch.testing.assert_close(same.pooler_output, expected.pooler_output)
    torch.testing.assert_close(skipped.text_features, expected.text_features)
    assert float((skipped.image_features - expected.image_features).abs().max()) > 0.01
    assert list(model.state_dict()) == names


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM has no co-attention layers"):
        co_attention_oracle(tiny(), Plan())
