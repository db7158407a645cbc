"""fold_linear against the reference formulas and golden data: folded with each expert, then weighed by the router."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_adapters import adapter_of, golden, rms_norm
from tiny_models import random_adapter
from torch import Tensor

from vte_compile.adapters import PIA, PlainAdapter, Projection, Router, StaticRouter, fold, fold_into, pool, route
from vte_compile.folding import AffineAdapter, FoldedLinear, LinearLayer, affine, fold_linear, rounding_error

C, OUT = 8, 5
DOUBLE = {"dtype": torch.float64}


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def router_of(name: str) -> Router | StaticRouter:
    if name == "static":
        return StaticRouter((0.3, 0.7))
    return Router(random(2, C, seed=4), None if name == "no bias" else random(2, seed=5), 2.0)


def adapter(kind, groups: int, router: Router | StaticRouter):
    """Six wide, of any number of groups."""
    downs = [Projection(random(6, C, seed=i), random(6, seed=i)) for i in range(2 if kind is PIA else 1)]
    ups = [Projection(random(C, 6 // groups, seed=10 + i), random(C, seed=10 + i)) for i in range(2)]
    return kind(*downs, *ups, router, scale=0.7, groups=groups)


def shares(parts: AffineAdapter, mean: Tensor) -> tuple[float, float]:
    """w0 and w1, from the mean of the prompt [C]."""
    first, second = parts.router
    if isinstance(first, float):
        return first, second
    w1 = float(torch.sigmoid(first @ mean + second))
    return 1 - w1, w1


def combined(folded: FoldedLinear, parts: AffineAdapter, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The one linear layer of a prompt, of two folded experts: its weight and its bias, the layer's own included."""
    w = shares(parts, mean)
    weight = w[0] * folded.base[0] + w[1] * folded.base[1]
    bias = w[0] * folded.const[0] + w[1] * folded.const[1]
    if parts.pool is not None:
        m = parts.pool[0] @ mean + parts.pool[1]
        bias = bias + w[0] * folded.factor[0] @ m + w[1] * folded.factor[1] @ m
    return weight, bias


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["", "own bias"])
@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("router", ["bias", "no bias", "static"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [PIA, PlainAdapter])
def test_two_folded_experts_are_the_folded_adapter(kind, groups, router, gain, bias):
    made = adapter(kind, groups, router_of(router))
    x, weight = random(1, 4, C, seed=6), random(OUT, C, seed=7)
    own, g = (random(OUT, seed=8) if bias else None), (random(C, seed=9) if gain else None)
    parts = affine(made)
    folded = fold_linear(parts, LinearLayer(weight, own), g)

    w = route(made.router, x)[0]
    R, b = fold(made, w, pool(made, x)[0] if kind is PIA else None)
    want, want_bias = fold_into(weight, R, b, g)
    got, got_bias = combined(folded, parts, x[0].mean(0))
    close(got, want)
    close(got_bias, want_bias if own is None else want_bias + own)
    close(torch.tensor(shares(parts, x[0].mean(0)), **DOUBLE), w)


@pytest.mark.parametrize("kind", [PIA, PlainAdapter])
def test_low_rank_path_is_the_blended_weight(kind):
    """base_0 x + w1 (factor_1 - factor_0)(M1 x) = (w0 base_0 + w1 base_1) x, whatever w1."""
    parts = affine(adapter(kind, 2, router_of("bias")))
    folded, x = fold_linear(parts, LinearLayer(random(OUT, C), None), random(C)), random(C, seed=1)
    for w1 in (0.0, 0.4, 1.0):
        side = w1 * (folded.factor[1] - folded.factor[0]) @ (parts.down @ x)
        close(folded.base[0] @ x + side, ((1 - w1) * folded.base[0] + w1 * folded.base[1]) @ x)


@pytest.mark.parametrize("kind", ["skipped", "kept"])
def test_golden(kind):
    data = golden("llava_model")
    layer = f"w.model.layers.{int(data[f'fold.{kind}.layer_index'])}."
    # The block stood alone: its input was the prompt's embeddings.
    x = rms_norm(data["inputs_embeds"], data[f"{layer}input_layernorm.weight"])
    skipped = kind == "skipped"
    parts = affine(adapter_of(data, layer + ("replaced_adapter." if skipped else "adapter_attn.")))
    gain = data[f"{layer}post_attention_layernorm.weight"] if skipped else None
    names = ["mlp.up_proj", "mlp.gate_proj"] if skipped else [f"self_attn.{n}_proj" for n in "qkv"]
    for name in names:
        folded = fold_linear(parts, LinearLayer(data[f"{layer}{name}.weight"], None), gain)
        weight, bias = combined(folded, parts, x[0].mean(0))
        close(weight, data[f"fold.{kind}.{name.split('.')[1]}.weight.f64"], 1e-10)
        close(bias, data[f"fold.{kind}.{name.split('.')[1]}.bias_correct.f64"], 1e-10)


def test_affine_parts():
    """Of a PIA the pool gives m = (A mean + bA + bC) / 2; a plain adapter's m is in its offsets."""
    pia, plain = (adapter(kind, 2, router_of("static")) for kind in (PIA, PlainAdapter))
    mean = random(C, seed=2)
    parts = affine(pia)
    weight, bias = parts.pool
    close(weight @ mean + bias, 0.5 * (pool(pia, mean[None, None])[0] + pia.down.bias))
    close(parts.down, 0.5 * pia.down.weight)
    assert parts.router == (0.3, 0.7)
    parts = affine(plain)
    assert parts.pool is None
    for up, offset, own in zip(parts.up, parts.offset, (plain.up0, plain.up1), strict=True):
        close(up[:4, :3], 0.7 * own.weight[:4])
        close(up[4:, 3:], 0.7 * own.weight[4:])
        assert not up[:4, 3:].any()
        assert not up[4:, :3].any()
        close(offset, 0.7 * own.bias + up @ plain.down.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folds_in_float64_whatever_comes_in(dtype):
    """Weights and adapters of low precision are exact numbers: only casting what comes out may round."""
    made, exact = (random_adapter(PIA, hidden_size=C, dtype=dtype) for _ in range(2))
    weight, gain = random(OUT, C).to(dtype), random(C).to(dtype)
    folded = fold_linear(affine(made), LinearLayer(weight, None), gain)
    assert {t.dtype for pair in (folded.base, folded.factor, folded.const) for t in pair} == {torch.float64}
    up = torch.block_diag(*exact.up0.weight.double().chunk(2)) * exact.scale
    down = 0.5 * exact.down.weight.double()
    close(folded.base[0], (weight.double() * gain.double()) @ (torch.eye(C, **DOUBLE) + up @ down))


def test_own_weights_are_not_changed():
    weight, own, g = random(OUT, C), random(OUT), random(C)
    before = [t.clone() for t in (weight, own, g)]
    fold_linear(affine(adapter(PIA, 2, router_of("bias"))), LinearLayer(weight, own), g)
    assert all(torch.equal(a, b) for a, b in zip((weight, own, g), before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float64, 0, 0), (torch.float32, 1e-9, 1e-7), (torch.float16, 1e-5, 5e-4), (torch.bfloat16, 1e-4, 4e-3)],
)
def test_rounding_error(dtype, low, high):
    exact = [random(20, 30), 1e4 * random(7)]
    assert low <= rounding_error(exact, dtype) <= high


def test_rounding_error_is_of_the_worst():
    fine, rough = torch.ones(4, **DOUBLE), torch.full((2,), 1 + 2**-9, **DOUBLE)
    assert rounding_error([fine], torch.bfloat16) == 0
    assert rounding_error([fine, rough, fine], torch.bfloat16) == pytest.approx(2**-9, rel=1e-2)
    assert rounding_error([torch.zeros(3, **DOUBLE)], torch.bfloat16) == 0
    assert rounding_error([], torch.bfloat16) == 0
    assert np.isinf(rounding_error([torch.full((1,), 1e6, **DOUBLE)], torch.float16))
