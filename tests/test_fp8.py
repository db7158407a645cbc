"""float8 linear layers of TensorRT's graphs: the ranges of their inputs, and their numbers, in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import load_fake
from marks import thorough
from tiny_families import family_inputs, tiny_family
from tiny_models import image_prompt, one_thread, plan, random_adapter, tiny_llava  # noqa: F401
from torch import nn

import vte_compile
from vte_compile import SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA, StaticRouter
from vte_compile.errors import InputError
from vte_compile.export import tensorrt_target
from vte_compile.export.fp8 import calibrate
from vte_compile.export.fp8_numbers import LARGEST, Fp8, fp8_weight
from vte_compile.export.ort_target import trace_decoder
from vte_compile.export.tensorrt_coverage import coverage
from vte_compile.export.tensorrt_ops import TENSORRT_FP8
from vte_compile.export.tensorrt_target import in_precision

SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 64), "visual": (1, 8, 32), "columns": (1, 32, 128)}


def samples(count: int = 4):
    found = []
    for seed in range(count):
        ids, pixels, mask = image_prompt("tittt", seed=seed)
        found.append({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask})
    return found


def linear_layers(model) -> dict[str, nn.Linear]:
    found = {name: m for name, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    return {name: m for name, m in found.items() if name.startswith("layers.")}


def inputs_of(model, prompts) -> dict[str, float]:
    """The largest number each linear layer of the model itself reads."""
    largest: dict[str, float] = {}

    def note(name):
        def hook(module, given):
            largest[f"{name}.weight"] = max(largest.get(f"{name}.weight", 0.0), float(given[0].abs().max()))

        return hook

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in linear_layers(model).items()]
    with torch.no_grad():
        for prompt in prompts:
            model(**prompt)
    for hook in hooks:
        hook.remove()
    return largest


def in_float8(model, ranges: Fp8):
    """The model, its linear layers of float8 numbers, in eager PyTorch."""

    def rounded(name):
        scale = ranges.scale(f"{name}.weight")

        def hook(module, given):
            return ((given[0] / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale,)

        return hook

    for name, module in linear_layers(model).items():
        numbers, scale = fp8_weight(module.weight.detach().numpy())
        module.weight.data = torch.from_numpy(numbers.astype(np.float32) * scale)
        module.register_forward_pre_hook(rounded(name))
    return model


def ranges_of(fast, prompts) -> Fp8:
    return calibrate(fast, trace_decoder(fast, TENSORRT_FP8), prompts)


def test_ranges_are_those_of_the_model() -> None:
    """Of the layers' linear layers, all of them, and no others. (The last layer's upper half sees the last token.)"""
    model, prompts = tiny_llava(), samples()
    found = ranges_of(optimize(model, plan(), compile=False), prompts).ranges
    expected = inputs_of(model, prompts)
    assert found.keys() == expected.keys()
    for name, largest in expected.items():
        if ".3." in name and "_proj" in name and name.split(".")[-2] not in ("q_proj", "k_proj", "v_proj"):
            assert found[name] <= largest * 1.0001
        else:
            assert found[name] == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3_vl", thorough("gemma3"), thorough("paligemma")])
def test_ranges_where_decoders_take_more_of_each_token(name: str) -> None:
    """Features behind layers, blocks of tokens: without them the layers would read something else."""
    model, prompts = tiny_family(name), [family_inputs(name, [2], seed=seed) for seed in range(3)]
    found, expected = ranges_of(optimize(model, plan(), compile=False), prompts).ranges, inputs_of(model, prompts)
    assert found.keys() == expected.keys()
    for layer, largest in expected.items():
        if ".3." not in layer:  # of the last layer's upper half, the last token alone is computed
            assert found[layer] == pytest.approx(largest, rel=1e-4)


def test_what_left_is_not_in_the_ranges() -> None:
    """Behind a static exit only text is seen: as if the layers above it had it alone."""
    model, prompts = tiny_llava(), samples()
    all_, left = (ranges_of(optimize(model, p, compile=False), prompts).ranges for p in (plan(), plan(StaticExit(0))))
    below, above = (f"layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1))
    assert left[below] == all_[below]
    assert left[above] != all_[above]


def test_folded_adapters_are_wide_and_their_additions_are_not() -> None:
    """A constant fold is FFN weights of its own; a routed one keeps the FFN's, with narrow products beside them."""
    static = random_adapter(PIA, router=StaticRouter((0.3, 0.7)))
    skip = plan(SkippedAttention(1, static), SkippedAttention(2, random_adapter(PIA)))
    found = ranges_of(optimize(tiny_llava(), skip, compile=False), samples()).ranges
    assert not [name for name in found if "self_attn" in name and name.startswith(("layers.1.", "layers.2."))]
    assert {name for name in found if not name.startswith("layers.")}
    assert {f"layers.2.mlp.{part}_proj.weight" for part in ("gate", "up", "down")} <= found.keys()
    assert not [name for name in found if "folded_2" in name]


def test_graphs_compute_in_float8(tmp_path: Path, monkeypatch) -> None:
    """As the model does whose linear layers are rounded likewise.

    Around them in float32 here: rounded again, half precision would end at another float8 number now and then.
    """
    monkeypatch.setattr(tensorrt_target, "in_precision", lambda fast, _: fast)
    prompts, fast = samples(), optimize(tiny_llava(), plan(), compile=False)
    options = {"build": False, "profiles": SIZES, "precision": "fp8", "calibration": prompts}
    vte_compile.export(fast, tmp_path / "engine", target="tensorrt", **options)
    engine, _ = load_fake(tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["model"]["dtype"], manifest["opset"]) == ("fp8", "float32", 19)
    onnx.checker.check_model(str(tmp_path / "engine" / "stage_0.onnx"), full_check=True)
    rounded = in_float8(tiny_llava(), ranges_of(fast, prompts))
    for seed in (7, 8):
        ids, pixels, mask = image_prompt("titt", seed=seed)
        with torch.no_grad():
            want = rounded(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits[:, -1]
            full = fast(input_ids=ids, pixel_values=pixels, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        got = torch.as_tensor(engine.prefill(ids, pixel_values=pixels).logits)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(got, full, atol=1e-2)


def test_half_precision_is_around_float8() -> None:
    fast = optimize(tiny_llava(), plan(), compile=False)
    assert in_precision(fast, "fp8").dtype == torch.float16
    assert in_precision(optimize(tiny_llava().bfloat16(), plan(), compile=False), "fp8").dtype == torch.bfloat16


@pytest.mark.thorough
def test_every_node_has_a_place() -> None:
    found = coverage(optimize(tiny_llava(), plan(StaticExit(1)), compile=False), profiles=SIZES, precision="fp8",
                     calibration=samples(1))  # fmt: skip
    assert found.precision == "fp8"
    assert found.decoder_placed == found.decoder_nodes
    layers = 4 * 7
    assert sum(engine.operators.get("DequantizeLinear", 0) for engine in found.engines) >= layers


def test_numbers_without_a_scale_are_an_error() -> None:
    [prompt] = samples(1)
    prompt["pixel_values"] = prompt["pixel_values"] * float("nan")
    with pytest.raises(InputError, match=r"samples\[0\].*no scale for float8"):
        ranges_of(optimize(tiny_llava(), plan(), compile=False), [prompt])
