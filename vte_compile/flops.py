"""FLOPs and bytes of a decoder, from its config: what a plan saves, before anything is run.

What is counted:

- Linear layers, 2 m n k each: q, k, v, o and the three matrices of a gated MLP, per token and layer.
- Attention scores and values, 4 * heads * head size per (query, key) pair, for the pairs that causal attention admits:
  S(S+1)/2 in prefill, not S^2. Flash kernels skip what the mask hides, and counting it would credit an exit with
  savings that such kernels never spent. (torch.utils.flop_counter counts S^2.) In layers with a sliding window those
  in the window. What tokens of a block attend to behind them (PaliGemma, Gemma3) is not in the config and not counted.
- lm_head for one token: generation needs no other logits.
- The gates that are asked: those up to the exit.
- Layers as wholes: that optimize() spares the last layer most of its work where only the last token's logits are
  wanted is no saving of a plan.
- A skipped attention: nothing, neither its four matrices nor its pairs nor its keys and values.
- Adapters, unfolded: `down`, `up0` and `up1` per token, as grouped as they are (optimize() multiplies by dense ones).
  Folded: nothing per token. That is the `constant` and the `blended` form of vte_compile/adapter_costs.py, which the
  rows of one prompt get; `low_rank`, which rows of several prompts may get, is not counted.
- Adapters, once per prompt: the router and a PIA's `pool`, each of the prompt's mean. A folded PIA also moves the
  biases of gate and up: [2 F, D] by [D] for each expert (once for both where the router is static).

Not counted: norms, rotations, activations, softmax, means, adding biases, blending the weights of two folded experts,
the token embedding, a companion token (no matrix products, or under a percent), and everything before the decoder,
which no plan changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vte_compile.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from vte_compile.adapters import Adapter
    from vte_compile.plan import Plan

# Decoders whose MLP or attention has other matrices than those counted here.
_UNCOUNTED_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")
_UNGATED_TYPES = frozenset("gpt_neox nemotron persimmon phi starcoder2".split())


@dataclass(frozen=True)
class _Sizes:
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    intermediate: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Of each layer, how many tokens one of them attends to at most."""

    @classmethod
    def of(cls, config: Any, plan: Plan | None) -> _Sizes:
        text = config.get_text_config(decoder=True)
        for field in _UNCOUNTED_FIELDS:
            if getattr(text, field, None):
                raise UnsupportedModelError(f"{text.model_type}: FLOPs of a decoder with {field} are not known.")
        if text.model_type in _UNGATED_TYPES:
            raise UnsupportedModelError(f"{text.model_type}: FLOPs of a decoder without a gated MLP are not known.")
        parts = [*plan.exits, *plan.skips, *plan.adapters] if plan is not None else []
        if too_high := [part.layer for part in parts if part.layer >= text.num_hidden_layers]:
            raise InputError(f"plan: has layer {max(too_high)}, but the decoder only {text.num_hidden_layers} layers.")
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            windows=_windows(text),
        )

    @property
    def attention(self) -> int:
        """Weights of q, k, v and o of a layer."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size

    @property
    def mlp(self) -> int:
        """Weights of gate, up and down of a layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def pair(self) -> int:
        """FLOPs per (query, key) pair and layer."""
        return 4 * self.heads * self.head_size

    @property
    def lm_head(self) -> int:
        """Weights of it."""
        return self.hidden * self.vocabulary

    def lengths(self, seq: int, visual: int, exit_layer: int) -> list[int]:
        """How many prompt tokens each layer sees."""
        if not 0 <= visual <= seq or seq < 1:
            raise InputError(f"seq={seq}, visual={visual}: expected 0 <= visual <= seq, and seq >= 1.")
        if not -1 <= exit_layer < self.layers:
            raise InputError(f"exit_layer={exit_layer}: expected -1 (never) or a layer, 0..{self.layers - 1}.")
        before = self.layers if exit_layer < 0 else exit_layer + 1
        return [seq] * before + [seq - visual] * (self.layers - before)


def prefill_flops(
    config: Any, seq: int, visual: int, exit_layer: int, plan: Plan | None = None, fold: bool = True
) -> int:
    """FLOPs of the decoder's prefill of one prompt, up to the logits of its last token.

    Args:
        config: A transformers config, of an MLLM or of its decoder; the decoder has rotary positions and a gated MLP.
        seq: Tokens of the prompt, visual ones included.
        visual: How many of them are visual.
        exit_layer: They leave after this layer; -1 = never.
        plan: Takes away the attentions it skips; adds its adapters, and its gates up to the exit, which were asked to
            decide it.
        fold: Whether adapters are folded into weights.

    Raises:
        InputError: Contradicting numbers, or a plan for more layers.
        UnsupportedModelError: A decoder of another form, such as a mixture of experts.
    """
    sizes = _Sizes.of(config, plan)
    lengths = sizes.lengths(seq, visual, exit_layer)
    flops = 2 * sum(n * weights for n, weights in zip(lengths, _weights(sizes, plan, fold), strict=True))
    pairs = [_pairs(n, window) for n, window in zip(lengths, sizes.windows, strict=True)]
    flops += sum(_kept(pairs, plan)) * sizes.pair + 2 * sizes.lm_head
    if plan is not None:
        flops += sum(_flops_per_prompt(adapter, sizes, fold) for _, adapter in _adapters(plan))
        flops += gate_flops(plan, exit_layer) if visual else 0
    return flops


def decode_flops(
    config: Any,
    seq: int,
    visual: int,
    exit_layer: int,
    tokens: int = 1,
    plan: Plan | None = None,
    fold: bool = True,
) -> int:
    """FLOPs of ``tokens`` decode steps after a prompt; other arguments and errors as in :func:`prefill_flops`."""
    sizes = _Sizes.of(config, plan)
    # Each step attends to the prompt, as far as the layer kept it, and to the tokens behind it up to its own.
    lengths = zip(sizes.lengths(seq, visual, exit_layer), sizes.windows, strict=True)
    pairs = [_pairs(n + tokens, window) - _pairs(n, window) for n, window in lengths]
    return 2 * tokens * (sum(_weights(sizes, plan, fold)) + sizes.lm_head) + sum(_kept(pairs, plan)) * sizes.pair


def gate_flops(plan: Plan, exit_layer: int) -> int:
    """FLOPs of the plan's gates that are asked until the visual tokens leave after ``exit_layer`` (-1: all gates)."""
    from vte_compile.plan import GateExit

    gates = [e for e in plan.exits if isinstance(e, GateExit) and (exit_layer < 0 or e.layer <= exit_layer)]
    return sum(flops_of_gate(gate.width, gate.hidden_size) for gate in gates)


def flops_of_gate(width: int, hidden_size: int) -> int:
    """FLOPs of asking one gate of this width M, on a decoder of hidden size C."""
    return 2 * width * (2 * hidden_size + 2)


def kv_bytes(config: Any, seq: int, visual: int, exit_layer: int, dtype: torch.dtype, plan: Plan | None = None) -> int:
    """Bytes of the keys and values of one prompt after prefill; arguments and errors as in :func:`prefill_flops`."""
    sizes = _Sizes.of(config, plan)
    lengths = _kept(sizes.lengths(seq, visual, exit_layer), plan)
    return 2 * sizes.kv_heads * sizes.head_size * dtype.itemsize * sum(lengths)


def weight_bytes(config: Any, plan: Plan | None, dtype: torch.dtype, fold: bool = True) -> int:
    """Bytes of the matrices that a decode step reads: the linear layers of the decoder, what an unfolded plan adds per
    token, and lm_head, all of one dtype. Not norms and biases, nor the token embedding, of which a step reads one row.

    Arguments and errors as in :func:`prefill_flops`.
    """
    sizes = _Sizes.of(config, plan)
    return dtype.itemsize * (sum(_weights(sizes, plan, fold)) + sizes.lm_head)


def _weights(sizes: _Sizes, plan: Plan | None, fold: bool) -> list[int]:
    """Weights of each layer's matrices that every token meets."""
    weights = [sizes.attention + sizes.mlp] * sizes.layers
    if plan is not None:
        for skip in plan.skips:
            weights[skip.layer] -= sizes.attention
        for layer, adapter in () if fold else _adapters(plan):
            weights[layer] += sum(p.weight.numel() for p in (adapter.down, adapter.up0, adapter.up1))
    return weights


def _kept(values: list[int], plan: Plan | None) -> list[int]:
    """Those of the layers that keep their attention."""
    skipped = {skip.layer for skip in plan.skips} if plan is not None else set()
    return [n for layer, n in enumerate(values) if layer not in skipped]


def _pairs(tokens: int, window: int | None) -> int:
    """How many (query, key) pairs so many tokens have from the first on."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None) or None
    types = getattr(text, "layer_types", None)
    if types is None:
        return (window,) * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types[: text.num_hidden_layers])


def _adapters(plan: Plan) -> list[tuple[int, Adapter]]:
    """All adapters, with their layers."""
    pias = [(skip.layer, skip.adapter) for skip in plan.skips if skip.adapter is not None]
    return [*pias, *((kept.layer, kept.adapter) for kept in plan.adapters)]


def _flops_per_prompt(adapter: Adapter, sizes: _Sizes, fold: bool) -> int:
    from vte_compile.adapters import PIA, Router

    routed = isinstance(adapter.router, Router)
    weights = 2 * adapter.hidden_size if routed else 0
    if isinstance(adapter, PIA):
        biases = (2 if routed else 1) * 2 * sizes.intermediate * adapter.width if fold else 0
        weights += adapter.pool.weight.numel() + biases
    return 2 * weights
