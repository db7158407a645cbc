"""The adapters of EAS against the golden data of the authors' code, against their own folded form, and bad fields."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import DATA, random_adapter
from torch import Tensor
from torch.nn import functional as F

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


# LaVIN-EAS: pre-norm blocks with one more token, the "modality" token at index 0


LAVIN_SKIPPED = {1: 0, 3: 1}  # layer: its place among the pooled vectors


def lavin_weight(layer: int, name: str) -> Tensor:
    return golden("lavin")[f"w.layers.{layer}.{name}.weight"]


def lavin_input(layer: int, phase: str) -> Tensor:
    """What enters a layer: [1, 15, C] at prefill, [4 steps, 1, 1, C] at decode."""
    data = golden("lavin")
    return data[f"h_{phase}"] if layer == 0 else data[f"block_out_{phase}.f64"][layer - 1]


def lavin_statistics(layer: int) -> tuple[PIA | PlainAdapter, Tensor, Tensor | None]:
    """The layer's adapter, and the prompt's w and p."""
    kind = "replaced_adapter" if layer in LAVIN_SKIPPED else "adapter_attn"
    adapter = adapter_of(golden("lavin"), f"w.layers.{layer}.{kind}.")
    x = rms_norm(lavin_input(layer, "prefill"), lavin_weight(layer, "attention_norm"))
    prompt = torch.ones(1, 15, dtype=torch.bool)
    prompt[:, 0] = False  # the router's mean excludes the modality token, the pool's includes it
    return adapter, route(adapter.router, x, prompt), pool(adapter, x) if isinstance(adapter, PIA) else None


def lavin_ffn(layer: int, x: Tensor) -> Tensor:
    w1, w2, w3 = (lavin_weight(layer, f"feed_forward.w{i}") for i in (1, 2, 3))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def lavin_qkv(layer: int, x: Tensor, first_position: int) -> list[Tensor]:
    """q, k, v [B, 4 heads, T, 16]; rotary on interleaved pairs."""
    angles = torch.arange(first_position, first_position + x.shape[1])[:, None] * 1e4 ** (-torch.arange(8).double() / 8)
    qkv = [(x @ lavin_weight(layer, f"attention.w{n}").T).unflatten(-1, (4, 16)).transpose(1, 2) for n in "qkv"]
    for i in (0, 1):
        even, odd = qkv[i][..., 0::2], qkv[i][..., 1::2]
        rotated = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
        qkv[i] = torch.stack(rotated, -1).flatten(-2)
    return qkv


@pytest.mark.parametrize("layer", LAVIN_SKIPPED)
def test_golden_lavin_skipped_block(layer: int) -> None:
    data = golden("lavin")
    pia, w, p = lavin_statistics(layer)
    assert isinstance(pia, PIA)
    assert p is not None
    close(w, data["cache_weights.f64"][layer])
    close(p, data["cache_x_prefill.f64"][LAVIN_SKIPPED[layer]][..., 0])

    def block(h: Tensor) -> Tensor:
        x = rms_norm(h, lavin_weight(layer, "attention_norm"))
        return h + lavin_ffn(layer, lavin_weight(layer, "ffn_norm") * apply_pia(pia, x, w, p))

    close(block(lavin_input(layer, "prefill")), data["block_out_prefill.f64"][layer])
    for token, expected in zip(
        lavin_input(layer, "decode"), data[f"rep.layer{layer}.fixed_decode_out.f64"], strict=True
    ):
        close(block(token), expected)


@pytest.mark.parametrize("layer", [0, 2])
def test_golden_lavin_kept_block(layer: int) -> None:
    data = golden("lavin")
    adapter, w, _ = lavin_statistics(layer)
    assert isinstance(adapter, PlainAdapter)
    close(w, data["cache_weights.f64"][layer])
    keys = values = torch.zeros(1, 4, 0, 16).double()

    def block(h: Tensor, position: int) -> Tensor:
        nonlocal keys, values
        x = apply_plain(adapter, rms_norm(h, lavin_weight(layer, "attention_norm")), w)
        q, k, v = lavin_qkv(layer, x, position)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        attended = F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1)
        h = h + attended.transpose(1, 2).flatten(-2) @ lavin_weight(layer, "attention.wo").T
        return h + lavin_ffn(layer, rms_norm(h, lavin_weight(layer, "ffn_norm")))

    # Nobody else attends to the modality token, which takes position 0; decode goes on at 14, as if it did not.
    out = block(lavin_input(layer, "prefill")[:, 1:], 1)
    close(out, data["block_out_prefill.f64"][layer][:, 1:])
    for step, token in enumerate(lavin_input(layer, "decode")):
        out = block(token, 14 + step)
        close(out, data["block_out_decode.f64"][layer][step])
        close(out, data[f"rep.layer{layer}.fixed_decode_out.f64"][step])


@pytest.mark.parametrize("layer", range(4))
def test_golden_lavin_fold(layer: int) -> None:
    data = golden("lavin")
    adapter, w, p = lavin_statistics(layer)
    R, b = fold(adapter, w[0], None if p is None else p[0])
    gain = None if p is None else lavin_weight(layer, "ffn_norm")
    close(R if gain is None else gain[:, None] * R, data[f"rep.layer{layer}.rep_matrix.f64"])
    close(b if gain is None else gain * b, data[f"rep.layer{layer}.rep_bias.f64"])
    names = ["attention.wq", "attention.wk", "attention.wv"] if gain is None else ["feed_forward.w1", "feed_forward.w3"]
    for name in names:
        weight, bias = fold_into(lavin_weight(layer, name), R, b, gain)
        close(weight, data[f"rep.layer{layer}.{name}.weight.f64"])
        close(bias, data[f"rep.layer{layer}.{name}.bias_correct.f64"])


# METER-EAS: post-norm blocks, adapters with one expert and no router


METER_W = torch.tensor([[1.0, 0.0]] * 2).double()


def meter_linear(path: str, x: Tensor) -> Tensor:
    return F.linear(x, golden("meter")[f"w.{path}.weight"], golden("meter")[f"w.{path}.bias"])


def meter_norm(path: str, x: Tensor) -> Tensor:
    weight, bias = (golden("meter")[f"w.{path}.output.LayerNorm.{name}"] for name in ("weight", "bias"))
    return F.layer_norm(x, (64,), weight, bias, 1e-12)


def meter_attention(path: str, query: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (
        meter_linear(f"{path}.self.{name}", x).unflatten(-1, (4, 16)).transpose(1, 2)
        for name, x in (("query", query), ("key", other), ("value", other))
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return meter_linear(f"{path}.output.dense", attended.transpose(1, 2).flatten(-2))


def meter_adapter(path: str, x: Tensor) -> Tensor:
    """AD(x)."""
    adapter = adapter_of(golden("meter"), f"w.{path}.adapter.")
    assert isinstance(adapter, PlainAdapter)
    close(route(adapter.router, x), METER_W)
    R, b = fold(adapter, METER_W[0])
    close(x @ R.T + b, apply_plain(adapter, x, METER_W))
    return apply_plain(adapter, x, METER_W)


def meter_pia(path: str, x: Tensor, other: Tensor) -> Tensor:
    """PIA(x, other), which has no residual of its own; its mean does not mind the mask."""
    pia = adapter_of(golden("meter"), f"w.{path}.")
    assert isinstance(pia, PIA)
    return apply_pia(pia, x, METER_W, pool(pia, other)) - x


def test_golden_meter_adapters() -> None:
    data = golden("meter")
    text, image = data["x_text"], data["y_image"]
    close(meter_pia("text0.adapter_self_attn", text, text), data["pia_self.text0.f64"])
    close(meter_pia("text0.adapter_cross_attn", text, image), data["pia_cross.text0.f64"])
    # Whatever the golden array is called: it is of the adapter in front of the self-attention.
    close(meter_adapter("text0.attention", text), data["ffn_adapter.text0.f64"])


@pytest.mark.parametrize("side", ["text0", "image0"])
@pytest.mark.parametrize("skip_cross", [0, 1])
@pytest.mark.parametrize("skip_self", [0, 1])
def test_golden_meter_block(skip_self: int, skip_cross: int, side: str) -> None:
    data = golden("meter")
    text_mask = ((1 - data["text_mask"]) * -10000)[:, None, None]
    h, other, mask, other_mask = data["x_text"], data["y_image"], text_mask, None
    if side == "image0":
        h, other, mask, other_mask = other, h, other_mask, mask
    if skip_self:
        mixed = meter_pia(f"{side}.adapter_self_attn", h, h)
    else:
        adapted = meter_adapter(f"{side}.attention", h)
        mixed = meter_attention(f"{side}.attention", adapted, adapted, mask)
    a = meter_norm(f"{side}.attention", h + mixed)
    if skip_cross:
        mixed = meter_pia(f"{side}.adapter_cross_attn", h, other)
    else:
        adapted = meter_adapter(f"{side}.crossattention", a)
        mixed = meter_attention(f"{side}.crossattention", adapted, other, other_mask)
    c = meter_norm(f"{side}.crossattention", a + mixed)
    inner = F.gelu(meter_linear(f"{side}.intermediate.dense", meter_adapter(f"{side}.intermediate", c)))
    out = meter_norm(side, meter_linear(f"{side}.output.dense", inner) + c)
    close(out, data[f"self{skip_self}_cross{skip_cross}.{side}.f64"])


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
