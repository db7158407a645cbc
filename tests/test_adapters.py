"""The adapters of EAS against the golden data of the authors' code, against their own folded form, and bad fields."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import DATA, random_adapter
from torch import Tensor

from vte_compile.adapters import (
    PIA,
    PlainAdapter,
    Projection,
    Router,
    StaticRouter,
    apply_pia,
    apply_plain,
    fold,
    fold_into,
    pool,
    route,
)
from vte_compile.errors import InputError, PlanError


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """All arrays of eas_{name}.npz that are numbers, floats in float64."""
    data = np.load(DATA / f"eas_{name}.npz")
    tensors = {key: torch.from_numpy(data[key]) for key in data.files if data[key].dtype.kind in "fi"}
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def adapter_of(weights: dict[str, Tensor], path: str, **settings: Any) -> PIA | PlainAdapter:
    """The adapter whose modules have the authors' names behind `path`."""

    def projection(letter: str) -> Projection:
        return Projection(weights[f"{path}conv_{letter}.weight"].squeeze(-1), weights[f"{path}conv_{letter}.bias"])

    if f"{path}conv_D.weight" not in weights:  # METER: one expert, no router
        experts, router = [projection("B")] * 2, StaticRouter((1.0, 0.0))
    else:
        router = Router(
            weights[f"{path}expert_weights.weight"],
            weights.get(f"{path}expert_weights.bias"),
            settings.pop("temperature", 10.0),
        )
        experts = [projection("B"), projection("D")]
    if f"{path}conv_C.weight" in weights and f"{path}conv_A.weight" in weights:
        return PIA(projection("A"), projection("C"), *experts, router, **settings)
    return PlainAdapter(projection("A" if f"{path}conv_A.weight" in weights else "C"), *experts, router, **settings)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def apply(adapter: PIA | PlainAdapter, x: Tensor, w: Tensor, p: Tensor | None) -> Tensor:
    return apply_pia(adapter, x, w, p) if isinstance(adapter, PIA) else apply_plain(adapter, x, w)


# LLaVA-EAS


@pytest.mark.parametrize("name", ["attn", "ffn", "attn_s", "ffn_s"])
def test_golden_llava_adapter(name: str) -> None:
    data = golden("llava_adapters")
    _, groups, scale, temperature = data[f"{name}.hparams[hidden,groups,scale,t]"].tolist()
    adapter = adapter_of(data, f"{name}.w.", groups=int(groups), scale=scale, temperature=temperature)
    is_pia = isinstance(adapter, PIA)
    assert is_pia == name.startswith("attn")
    x = data["x_prefill"]

    w = route(adapter.router, x)
    p = pool(adapter, x) if is_pia else None
    close(w, data[f"{name}.weights.f64"])
    if is_pia:
        close(p, data[f"{name}.cache_x.f64"][..., 0])
    close(apply(adapter, x, w, p), data[f"{name}.prefill.f64"])
    for token, expected in zip(data["x_decode"], data[f"{name}.decode.f64"], strict=True):
        close(apply(adapter, token, w, p), expected)

    question = data["question_mask"] > 0
    w = route(adapter.router, x, question)
    p = pool(adapter, x, question) if is_pia else None
    close(w, data[f"{name}.train_weights.f64"])
    close(apply(adapter, x, w, p), data[f"{name}.train_nodrop.f64"])


@pytest.mark.parametrize("name", ["attn", "ffn", "attn_s", "ffn_s"])
def test_golden_llava_fold(name: str) -> None:
    data = golden("llava_adapters")
    _, groups, scale, temperature = data[f"{name}.hparams[hidden,groups,scale,t]"].tolist()
    adapter = adapter_of(data, f"{name}.w.", groups=int(groups), scale=scale, temperature=temperature)
    x = data["x_prefill"]
    w = route(adapter.router, x)
    p = pool(adapter, x) if isinstance(adapter, PIA) else None
    R, b = fold(adapter, w[0], None if p is None else p[0])
    close(R, data[f"{name}.rep_matrix_row0.f64"])
    close(b, data[f"{name}.rep_bias_row0.f64"])
    close(x[0] @ R.T + b, apply(adapter, x, w, p)[0])


@pytest.mark.parametrize("kind", ["skipped", "kept"])
def test_golden_llava_fold_into(kind: str) -> None:
    data = golden("llava_model")
    layer = f"w.model.layers.{int(data[f'fold.{kind}.layer_index'])}."
    # The block stood alone: its input was the prompt's embeddings.
    x = rms_norm(data["inputs_embeds"], data[f"{layer}input_layernorm.weight"])
    adapter = adapter_of(data, layer + ("replaced_adapter." if kind == "skipped" else "adapter_attn."))
    w = route(adapter.router, x)[0]
    if kind == "skipped":
        gain, names = data[f"{layer}post_attention_layernorm.weight"], ["mlp.up_proj", "mlp.gate_proj"]
        R, b = fold(adapter, w, pool(adapter, x)[0])
        close(gain[:, None] * R, data["fold.skipped.rep_matrix.f64"])
        close(gain * b, data["fold.skipped.rep_bias.f64"])
    else:
        gain, names = None, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        R, b = fold(adapter, w)
        close(R, data["fold.kept.rep_matrix.f64"])
        close(b, data["fold.kept.rep_bias.f64"])
    for name in names:
        weight, bias = fold_into(data[f"{layer}{name}.weight"], R, b, gain)
        close(weight, data[f"fold.{kind}.{name.split('.')[1]}.weight.f64"])
        close(bias, data[f"fold.{kind}.{name.split('.')[1]}.bias_correct.f64"])


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# LaVIN-EAS and METER-EAS: the adapters' formulas


LAVIN_SKIPPED = {1: 0, 3: 1}  # layer: its place among the pooled vectors


def lavin_block(layer: int) -> tuple[PIA | PlainAdapter, Tensor, Tensor, Tensor | None]:
    """The adapter of a layer, and its input x [1, 15, C], w and p at prefill."""
    data = golden("lavin")
    h = data["h_prefill"] if layer == 0 else data["block_out_prefill.f64"][layer - 1]
    x = rms_norm(h, data[f"w.layers.{layer}.attention_norm.weight"])
    kind = "replaced_adapter" if layer in LAVIN_SKIPPED else "adapter_attn"
    adapter = adapter_of(data, f"w.layers.{layer}.{kind}.")
    prompt = torch.ones(1, 15, dtype=torch.bool)
    prompt[:, 0] = False  # the router's mean excludes the modality token, the pool's includes it
    return adapter, x, route(adapter.router, x, prompt), pool(adapter, x) if isinstance(adapter, PIA) else None


@pytest.mark.parametrize("layer", range(4))
def test_golden_lavin_adapter(layer: int) -> None:
    data = golden("lavin")
    adapter, x, w, p = lavin_block(layer)
    close(w, data["cache_weights.f64"][layer])
    if p is not None:
        close(p, data["cache_x_prefill.f64"][LAVIN_SKIPPED[layer]][..., 0])
        h = data["block_out_prefill.f64"][layer - 1]
        close(h + lavin_ffn(layer, apply_pia(adapter, x, w, p)), data["block_out_prefill.f64"][layer])


def lavin_ffn(layer: int, normed: Tensor) -> Tensor:
    """The feed-forward network of what is normed already, but for the norm's weight."""
    data = golden("lavin")
    w1, w2, w3 = (data[f"w.layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    x = normed * data[f"w.layers.{layer}.ffn_norm.weight"]
    return (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


@pytest.mark.parametrize("layer", range(4))
def test_golden_lavin_fold(layer: int) -> None:
    data = golden("lavin")
    adapter, _, w, p = lavin_block(layer)
    R, b = fold(adapter, w[0], None if p is None else p[0])
    gain = data[f"w.layers.{layer}.ffn_norm.weight"] if p is not None else None
    scale = 1.0 if gain is None else gain
    close((torch.eye(64).double() * scale) @ R, data[f"rep.layer{layer}.rep_matrix.f64"])
    close(scale * b, data[f"rep.layer{layer}.rep_bias.f64"])
    names = ["attention.wq", "attention.wk", "attention.wv"] if gain is None else ["feed_forward.w1", "feed_forward.w3"]
    for name in names:
        weight, bias = fold_into(data[f"w.layers.{layer}.{name}.weight"], R, b, gain)
        close(weight, data[f"rep.layer{layer}.{name}.weight.f64"])
        close(bias, data[f"rep.layer{layer}.{name}.bias_correct.f64"])


def test_golden_meter_adapters() -> None:
    data = golden("meter")
    text, image, w = data["x_text"], data["y_image"], torch.tensor([[1.0, 0.0]] * 2).double()
    for name, other in (("self", text), ("cross", image)):
        pia = adapter_of(data, f"w.text0.adapter_{name}_attn.")
        # METER's PIA has no residual of its own.
        close(apply_pia(pia, text, w, pool(pia, other)) - text, data[f"pia_{name}.text0.f64"])
    adapter = adapter_of(data, "w.text0.attention.adapter.")  # whatever the golden array is called
    assert isinstance(adapter.router, StaticRouter)
    close(apply_plain(adapter, text, route(adapter.router, text)), data["ffn_adapter.text0.f64"])


# Rows and padding


def test_rows_do_not_see_each_other_nor_their_padding() -> None:
    pia = random_adapter(PIA, hidden_size=8, dtype=torch.float64)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 0], [1] * 7]).bool()
    x[~mask] = float("nan")
    w, p = route(pia.router, x, mask), pool(pia, x, mask)
    for row in range(3):
        solo = x[row : row + 1, mask[row]]
        close(w[row : row + 1], route(pia.router, solo))
        close(p[row : row + 1], pool(pia, solo))
    empty = torch.tensor([[False] * 7, [True] * 7, [True] * 7])
    assert route(pia.router, x, empty).isnan().any(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    pia = random_adapter(PIA, hidden_size=8, dtype=dtype)
    x = torch.randn(2, 5, 8).to(dtype)
    w, p = route(pia.router, x), pool(pia, x)
    assert (w.dtype, p.dtype, apply_pia(pia, x, w, p).dtype) == (torch.float32, torch.float32, dtype)
    exact = apply_pia(pia, x.double(), route(pia.router, x.double()), pool(pia, x.double()))
    torch.testing.assert_close(apply_pia(pia, x, w, p), exact.to(dtype), rtol=2e-2, atol=1e-4)


def test_static_router_weighs_every_row_the_same() -> None:
    w = route(StaticRouter((0.25, 0.75)), torch.randn(3, 2, 8))
    assert w.tolist() == [[0.25, 0.75]] * 3


def test_fold_needs_the_pooled_vector_of_a_pia_only() -> None:
    w = torch.tensor([0.5, 0.5])
    with pytest.raises(InputError, match="a PIA needs the pooled vector"):
        fold(random_adapter(PIA, hidden_size=8, dtype=torch.float64), w)
    with pytest.raises(InputError, match="a PlainAdapter has no pooled vector"):
        fold(random_adapter(PlainAdapter, hidden_size=8, dtype=torch.float64), w, torch.ones(6))


# Bad fields


ONES, B8, B6 = torch.ones(6, 8), torch.ones(8), torch.ones(6)
DOWN, UP, ROUTER = Projection(ONES, B6), Projection(torch.ones(8, 3), B8), Router(torch.ones(2, 8))
NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Projection(ONES.numpy(), B6), "weight: expected a torch.Tensor, got ndarray"),
        (lambda: Projection(ONES.int(), B6), "weight: expected float16, .* got torch.int32"),
        (lambda: Projection(ONES[None], B6), r"weight: expected 2 dimensions, got shape \[1, 6, 8\]"),
        (lambda: Projection(ONES[:0], B6[:0]), r"weight: expected shape \[out, in\], got \[0, 8\]"),
        (lambda: Projection(ONES, None), "bias: expected a torch.Tensor, got NoneType"),
        (lambda: Projection(ONES, B6[None]), r"bias: expected 1 dimension, got shape \[1, 6\]"),
        (lambda: Projection(ONES, B8), r"bias: expected shape \[6\] to go with weight, got \[8\]"),
        (lambda: Projection(ONES, B6.half()), "bias: torch.float16 on cpu does not go with weight: torch.float32"),
        (lambda: Projection(ONES * NAN, B6), "weight: holds NaN"),
        (lambda: Projection(ONES, B6 * NAN), "bias: holds NaN"),
        (lambda: Router(torch.ones(3, 8)), r"weight: expected shape \[2, C\], got \[3, 8\]"),
        (lambda: Router(torch.ones(2, 8), B6), r"bias: expected shape \[2\] to go with weight, got \[6\]"),
        (lambda: Router(torch.ones(2, 8) * NAN), "weight: holds NaN"),
        (lambda: Router(torch.ones(2, 8), torch.ones(2) * NAN), "bias: holds NaN"),
        (lambda: Router(torch.ones(2, 8), None, 0), "temperature: must be positive, got 0"),
        (lambda: Router(torch.ones(2, 8), None, NAN), "temperature: must be finite, got nan"),
        (lambda: Router(torch.ones(2, 8), None, "1"), "temperature: expected a number, got str"),
        (lambda: StaticRouter(0.5), "weights: expected two numbers, got 0.5"),
        (lambda: StaticRouter("ab"), "weights: expected two numbers, got 'ab'"),
        (lambda: StaticRouter((1.0,)), r"weights: expected two numbers, got \(1.0,\)"),
        (lambda: StaticRouter((1.0, True)), r"weights\[1\]: expected a number, got bool"),
        (lambda: StaticRouter((NAN, 1.0)), r"weights\[0\]: must be finite"),
        (lambda: StaticRouter((0.5, 0.6)), r"weights: must sum to 1, got 0.5 \+ 0.6"),
        (lambda: PIA(ONES, DOWN, UP, UP, ROUTER), "pool: expected a Projection, got Tensor"),
        (lambda: PIA(UP, DOWN, UP, UP, ROUTER), r"pool.weight: expected shape \[6, 8\] like down, got \[8, 3\]"),
        (
            lambda: PIA(DOWN, DOWN, UP, DOWN, ROUTER),
            r"up1.weight: expected shape \[8, 3\] to go with down and 2 groups",
        ),
        (lambda: PlainAdapter(DOWN, DOWN, UP, ROUTER), r"up0.weight: expected shape \[8, 3\] .*, got \[6, 8\]"),
        (lambda: PlainAdapter(DOWN, UP, UP, None), "router: expected a Router or StaticRouter, got NoneType"),
        (lambda: PlainAdapter(DOWN, UP, UP, Router(torch.ones(2, 6))), r"router.weight: expected shape \[2, 8\] to go"),
        (lambda: PlainAdapter(DOWN, UP, UP, ROUTER, NAN), "scale: must be finite, got nan"),
        (lambda: PlainAdapter(DOWN, UP, UP, ROUTER, 1.0, 4), r"groups: 4 does not divide both sizes of .* \[6, 8\]"),
        (lambda: PlainAdapter(DOWN, UP, UP, ROUTER, 1.0, 0), "groups: must be 1 or more, got 0"),
        (lambda: PlainAdapter(DOWN, UP, UP, ROUTER, 1.0, True), "groups: expected an integer, got bool"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_field_is_named(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        make()


def test_adapters_show_themselves() -> None:
    assert repr(PIA(DOWN, DOWN, UP, UP, ROUTER)) == "PIA(width=6, router=Router(temperature=10), scale=1, groups=2)"
    assert repr(PlainAdapter(DOWN, UP, UP, StaticRouter((0, 1)), np.float32(0.5))) == (
        "PlainAdapter(width=6, router=StaticRouter(weights=(0.0, 1.0)), scale=0.5, groups=2)"
    )
    assert repr(DOWN) == "Projection(weight=[6, 8], bias=[6])"
