"""optimize() of BridgeTower: numbers against the oracle and METER's, what is shared, freed, exported and refused."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from tiny_bridgetower import (
    IMAGE_TOKENS,
    LEVELS,
    C,
    bridgetower,
    captured,
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
from torch.export import Dim, ExportedProgram
from transformers import (
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

import vte_compile
from vte_compile import CoAttention, Oracle, Plan, StaticExit
from vte_compile.capture.co_attention import CoAttentionGraph, capture_co_attention
from vte_compile.errors import InputError, PlanMismatchError, UnsupportedModelError, VTEError
from vte_compile.oracle.co_attention import OracleLayer, co_attention_oracle
from vte_compile.passes import CO_ATTENTION_PASSES, PassResult, Refusal, run_passes
from vte_compile.runtime.co_attention import RewrittenCoAttentionLayer

KINDS = [
    BridgeTowerModel,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForMaskedLM,
]


def mixed(hidden_size: int = C) -> Plan:
    """A plan with all kinds of layers; image level 1 is left as it is."""
    return Plan(
        co_attention=[
            random_part("text", 0, skip_self=True, hidden_size=hidden_size),
            random_part("text", 1, skip_self=True, skip_cross=True, adapters=False),
            random_part("image", 0, skip_cross=True, hidden_size=hidden_size),
        ]
    )


MIXED = mixed()


def optimize(model: Any, plan: Plan = MIXED, compile: bool = False) -> Any:
    return vte_compile.optimize(model, plan, compile=compile)


@functools.cache
def shared_fast() -> Any:
    """`shared()` with the mixed plan, which compiles on demand, for tests that do not change it."""
    return optimize(shared(), compile=True)


def run(model: Any, **given: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output."""
    with torch.no_grad():
        return {name: value for name, value in model(**given).items() if isinstance(value, torch.Tensor)}


def tower(model: Any) -> Any:
    return getattr(model, "bridgetower", model)


# Numbers


@functools.cache
def golden_graph() -> CoAttentionGraph:
    return capture_co_attention(golden_layer("text"))


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("skip_cross", [False, True])
@pytest.mark.parametrize("skip_self", [False, True])
def test_golden_meter(skip_self: bool, skip_cross: bool, side: str) -> None:
    graph = golden_graph().clone(golden_layer(side))
    results = run_passes(CO_ATTENTION_PASSES, graph, golden_part(side, skip_self, skip_cross))
    assert [result.applied for result in results] == [3 - skip_self - skip_cross, skip_self + skip_cross]
    out = run_layer(RewrittenCoAttentionLayer(graph, results, None), golden_inputs(side))
    expected = golden()[f"self{int(skip_self)}_cross{int(skip_cross)}.{side}0.f64"]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given_by(
    side=st.sampled_from(["text", "image"]),
    flags=st.tuples(*[st.booleans()] * 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
)
def test_layers_give_the_oracles_numbers(side: str, flags: tuple[bool, ...], sizes: tuple[int, int, int]) -> None:
    skip_self, skip_cross, adapters, masked = flags
    part = random_part(side, 1, skip_self, skip_cross, adapters, dtype=torch.float64)
    layer, graph = captured()
    rewritten = RewrittenCoAttentionLayer(graph, run_passes(CO_ATTENTION_PASSES, graph, part), None)
    given = layer_inputs(side, *sizes, masked=masked, dtype=torch.float64)
    expected = run_layer(OracleLayer(layer, part), given)
    torch.testing.assert_close(run_layer(rewritten, given), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.shows("images", "bridgetower")
@pytest.mark.shows("skips", "bridgetower")
def test_models_give_the_oracles_numbers(kind: Any) -> None:
    hidden_size = 64 if kind is BridgeTowerForContrastiveLearning else C  # its heads need that of the vision tower
    model, plan = shared(kind, hidden_size), mixed(hidden_size)
    fast = optimize(model, plan)
    assert (type(fast).__name__, fast.plan) == (kind.__name__, plan)
    assert isinstance(fast, kind)
    for given in (inputs(padded=3), inputs(batch=1, tokens=5), inputs(batch=3, tokens=9, padded=1)):
        expected, got = run(co_attention_oracle(model, plan), **given), run(fast, **given)
        assert expected.keys() == got.keys() != set()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_empty_plan_is_lossless() -> None:
    model, given = shared(), inputs(padded=2)
    fast = optimize(model, Plan())
    for name, value in run(model, **given).items():
        torch.testing.assert_close(run(fast, **given)[name], value, rtol=1e-5, atol=1e-5)
    theirs = dict(fast.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in model.named_parameters())
    assert len(theirs) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = bridgetower().to(dtype)
    given = inputs(padded=2)
    expected, got = run(co_attention_oracle(model, MIXED), **given), run(optimize(model), **given)
    tolerance = 1e-10 if dtype == torch.float64 else 0.1
    # In float64 but for what the model's other parts and the plan's float32 adapters are.
    torch.testing.assert_close(got["pooler_output"], expected["pooler_output"], rtol=tolerance, atol=tolerance)


def test_autocast() -> None:
    given = inputs(padded=2)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = run(co_attention_oracle(shared(), MIXED), **given), run(shared_fast(), **given)
    assert got["text_features"].dtype == expected["text_features"].dtype
    torch.testing.assert_close(got["pooler_output"], expected["pooler_output"], rtol=0.1, atol=0.1)


# What is shared, and what is gone


def test_model_is_not_modified_and_the_rest_is_shared() -> None:
    model = bridgetower(BridgeTowerForImageAndTextRetrieval)
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    fast = optimize(model)
    run(fast, **inputs())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is value and torch.equal(value, copied) for name, (value, copied) in before.items())
    assert all(modules[name] is module for name, module in model.named_modules())
    assert type(tower(model).cross_modal_text_layers[0]).__name__ == "BridgeTowerBertCrossLayer"
    assert fast.itm_score is model.itm_score
    assert fast.bridgetower.vision_model is model.bridgetower.vision_model
    mine, theirs = tower(fast).cross_modal_image_layers[1], tower(model).cross_modal_image_layers[1]
    assert mine.attention.self.query.weight is theirs.attention.self.query.weight


def test_deleted_and_folded_weights_are_gone() -> None:
    model = bridgetower()
    fast = optimize(model)
    names = set(model.state_dict())
    gone = names - set(fast.state_dict())
    text0, text1, image0 = (f"cross_modal_{side}_layers.{i}." for side, i in (("text", 0), ("text", 1), ("image", 0)))
    linears = [f"self.{name}.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")]
    linears += ["output.dense.weight", "output.dense.bias"]
    deleted = [(text0, "attention"), (text1, "attention"), (text1, "crossattention"), (image0, "crossattention")]
    assert gone == {f"{layer}{name}.{linear}" for layer, name in deleted for linear in linears}
    added = set(fast.state_dict()) - names
    assert added == {
        f"{layer}.pia.{name}"
        for layer in (f"{text0}attention", f"{image0}crossattention")
        for name in ("pool.weight", "pool.bias", "down.weight", "up.weight", "up.bias")
    }
    assert set(dict(fast.named_parameters())) == set(fast.state_dict()) - {n for n, _ in model.named_buffers()}


def test_memory_is_freed_with_the_original() -> None:
    model = bridgetower(BridgeTowerForImageAndTextRetrieval)
    layers = tower(model).cross_modal_text_layers
    gone = [
        weakref.ref(layers[0].attention.self.query.weight),  # deleted
        weakref.ref(layers[0].crossattention.self.query.weight),  # folded
        weakref.ref(layers[1].crossattention.output.dense.weight),
    ]
    kept = weakref.ref(layers[0].crossattention.self.key.weight)
    fast = optimize(model)
    del model, layers
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    assert kept() is fast.bridgetower.cross_modal_text_layers[0].crossattention.self.key.weight


# Results


def test_passes_tell_what_they_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vte_compile"):
        fast = optimize(shared())
    assert {layer: [result.applied for result in results] for layer, results in fast.passes.items()} == {
        "text level 0": [2, 1],
        "text level 1": [0, 2],
        "image level 0": [2, 1],
        "image level 1": [0, 0],
    }
    assert "text level 0: rounding folded weights has a relative error of up to" in caplog.text


def test_copies_and_pickles() -> None:
    fast, given = shared_fast(), inputs(tokens=1)  # of one token, which runs uncompiled
    expected = run(fast, **given)["pooler_output"]
    copied = copy.deepcopy(fast)
    assert torch.equal(run(copied, **given)["pooler_output"], expected)
    compilers = {id(m._compiler) for m in copied.modules() if isinstance(m, RewrittenCoAttentionLayer)}
    assert len(compilers) == 1  # so that equal layers still compile once
    assert id(fast.cross_modal_text_layers[0]._compiler) not in compilers
    layer = pickle.loads(pickle.dumps(fast.cross_modal_image_layers[0]))
    given = layer_inputs("image", 2, 3, 1)
    assert torch.equal(run_layer(layer, given), run_layer(fast.cross_modal_image_layers[0], given))


def export(model: torch.nn.Module) -> ExportedProgram:
    dims = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO}}
    shapes = {**dims, "pixel_values": {0: Dim.AUTO}}
    with torch.no_grad():
        return torch.export.export(model, (), inputs(3, 7, padded=2), dynamic_shapes=shapes, strict=False)


def test_result_can_be_exported() -> None:
    try:
        export(shared())
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot export BridgeTower itself: {error}")
    given = inputs(2, 5, padded=1)
    with torch.no_grad():
        got = export(shared_fast()).module()(**given).pooler_output
    expected = run(co_attention_oracle(shared(), MIXED), **given)["pooler_output"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layer_can_be_exported_strictly() -> None:
    layer, given = shared_fast().cross_modal_text_layers[0], layer_inputs("text")
    with torch.no_grad():
        exported = torch.export.export(layer, (), given, strict=True)
    oracle = co_attention_oracle(shared(), MIXED).cross_modal_text_layers[0]
    torch.testing.assert_close(run_layer(exported.module(), given), run_layer(oracle, given), rtol=1e-4, atol=1e-5)


# Compiled


@pytest.mark.slow
def test_equal_layers_compile_once_for_all_batches_and_lengths() -> None:
    plan = Plan(
        co_attention=[
            CoAttention(side, level, True, True, random_part("text", level, True).self_adapter)
            for side in ("text", "image")
            for level in range(LEVELS)
        ]
    )
    model = shared()
    fast, oracle = optimize(model, plan, compile=True), co_attention_oracle(model, plan)
    compiler = fast.cross_modal_text_layers[0]._compiler
    compiled = []
    for given in (inputs(2, 7, padded=2), inputs(3, 5), inputs(4, 12, padded=1), inputs(1, 6), inputs(1, 9)):
        expected, got = run(oracle, **given), run(fast, **given)
        torch.testing.assert_close(got["text_features"], expected["text_features"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["image_features"], expected["image_features"], rtol=1e-4, atol=1e-5)
        compiled.append(compiler.compilations)
    assert compiled == [1, 1, 1, 2, 2]


@pytest.mark.slow
def test_compiled_layer_with_a_kept_attention() -> None:
    layer = shared_fast().cross_modal_text_layers[0]
    oracle = co_attention_oracle(shared(), MIXED).cross_modal_text_layers[0]
    for sizes in ((2, 7, 5), (3, 4, 4), (5, 2, 9), (2, 1, 3)):
        given = layer_inputs("text", *sizes)
        # With gradients enabled, too: the layer is for inference.
        torch.testing.assert_close(layer(**given)[0].detach(), run_layer(oracle, given), rtol=1e-4, atol=1e-5)
    assert layer._compiler.compilations == 1


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 5, C)}, r"hidden_states and encoder_hidden_states: .* \[2, 5, 32\]"),
        ({"hidden_states": torch.zeros(3, C)}, r"hidden_states and encoder_hidden_states: .* got \[3, 32\]"),
        ({"attention_mask": torch.zeros(3, 7)}, r"attention_mask: expected shape \[3, 1, 1, 7\], got \[3, 7\]"),
        ({"attention_mask": torch.zeros(3, 1, 7, 7)}, r"attention_mask: expected shape \[3, 1, 1, 7\]"),
        ({"encoder_attention_mask": torch.zeros(3, 1, 1, 7)}, r"encoder_attention_mask: expected .*\[3, 1, 1, 5\]"),
    ],
)
def test_misshaped_arguments(change: dict[str, Any], message: str) -> None:
    _, graph = captured(torch.float32)
    with pytest.raises(InputError, match=f"^{message}"):
        RewrittenCoAttentionLayer(graph, [], None)(**{**layer_inputs("text"), **change})


def test_refused_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(graph: Any, part: CoAttention) -> PassResult:
        return PassResult("refusing", 0, [Refusal("it is Friday", "add_1", part.level)])

    monkeypatch.setattr("vte_compile.co_attention_optimizer.CO_ATTENTION_PASSES", (refusing,))
    with pytest.raises(UnsupportedModelError, match="text level 0: refusing refused at add_1: it is Friday"):
        optimize(shared())


def test_layers_of_another_form_are_refused() -> None:
    model = bridgetower()
    model.cross_modal_image_layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"^image level 1: BridgeTowerBertCrossLayer has extra besides"):
        optimize(model)
    model = bridgetower()
    del model.cross_modal_text_layers[0].crossattention
    with pytest.raises(UnsupportedModelError, match=r"^text level 0: BridgeTowerBertCrossLayer has no crossattention"):
        optimize(model)


def test_wrong_plans_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"^exits\[0\]: is for the layers of a decoder"):
        optimize(shared(), Plan([StaticExit(0)]))
    with pytest.raises(VTEError):
        Oracle(shared(), Plan([StaticExit(0)]))


def test_unfolded_adapters_are_refused() -> None:
    with pytest.raises(InputError, match=r"^fold=False: adapters of co-attention layers are always folded"):
        vte_compile.optimize(shared(), MIXED, compile=False, fold=False)


def test_optimized_model_is_for_inference_and_not_for_saving(tmp_path: Path) -> None:
    fast = shared_fast()
    assert fast.eval() is fast
    with pytest.raises(InputError, match="is for inference"):
        fast.train()
    with pytest.raises(InputError, match="save the original model"):
        fast.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is optimized already"):
        optimize(fast)
    assert not fast(**inputs(tokens=1)).pooler_output.requires_grad


def test_plan_beside_the_checkpoint_is_found(tmp_path: Path) -> None:
    model = bridgetower()
    model.save_pretrained(tmp_path)
    MIXED.save_pretrained(tmp_path)
    fast = vte_compile.optimize(BridgeTowerModel.from_pretrained(tmp_path).eval(), compile=False)
    given = inputs(padded=1)
    expected = run(co_attention_oracle(model, MIXED), **given)["pooler_output"]
    torch.testing.assert_close(run(fast, **given)["pooler_output"], expected, rtol=1e-4, atol=1e-5)
    assert fast.cross_modal_text_layers[0](**layer_inputs("text", 2, 7, IMAGE_TOKENS))[1:] == (None, None)
