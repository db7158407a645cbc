"""FLOPs and KV bytes of a decoder, from its config: what an exit saves, before anything is run.

What is counted:

- Linear layers, 2 m n k each: q, k, v, o and the three matrices of a gated MLP, per token and layer.
- Attention scores and values, 4 * heads * head size per (query, key) pair, for the pairs that causal attention admits:
  S(S+1)/2 in prefill, not S^2. Flash kernels skip what the mask hides, and counting it would credit an exit with
  savings that such kernels never spent. (torch.utils.flop_counter counts S^2.)
- lm_head for one token: generation needs no other logits.
- The gates that are asked: those up to the exit.
- Layers as wholes: that optimize() spares the last layer most of its work where only the last token's logits are
  wanted is no saving of an exit.

Not counted: norms, rotations, activations, softmax, the token embedding (no multiplications, or under a percent), and
everything before the decoder, which an exit does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vte_compile.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

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

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        text = config.get_text_config(decoder=True)
        for field in _UNCOUNTED_FIELDS:
            if getattr(text, field, None):
                raise UnsupportedModelError(f"{text.model_type}: FLOPs of a decoder with {field} are not known.")
        if text.model_type in _UNGATED_TYPES:
            raise UnsupportedModelError(f"{text.model_type}: FLOPs of a decoder without a gated MLP are not known.")
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
        )

    @property
    def linear(self) -> int:
        """Per token and layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    @property
    def pair(self) -> int:
        """Per (query, key) pair and layer."""
        return 4 * self.heads * self.head_size

    @property
    def lm_head(self) -> int:
        """Per token."""
        return 2 * self.hidden * self.vocabulary

    def lengths(self, seq: int, visual: int, exit_layer: int) -> list[int]:
        """How many prompt tokens each layer sees."""
        if not 0 <= visual <= seq or seq < 1:
            raise InputError(f"seq={seq}, visual={visual}: expected 0 <= visual <= seq, and seq >= 1.")
        if not -1 <= exit_layer < self.layers:
            raise InputError(f"exit_layer={exit_layer}: expected -1 (never) or a layer, 0..{self.layers - 1}.")
        before = self.layers if exit_layer < 0 else exit_layer + 1
        return [seq] * before + [seq - visual] * (self.layers - before)


def prefill_flops(config: Any, seq: int, visual: int, exit_layer: int, plan: Plan | None = None) -> int:
    """FLOPs of the decoder's prefill of one prompt, up to the logits of its last token.

    Args:
        config: A transformers config, of an MLLM or of its decoder; the decoder has rotary positions and a gated MLP.
        seq: Tokens of the prompt, visual ones included.
        visual: How many of them are visual.
        exit_layer: They leave after this layer; -1 = never.
        plan: Adds its gates up to the exit, which were asked to decide it.

    Raises:
        InputError: Contradicting numbers.
        UnsupportedModelError: A decoder of another form, such as a mixture of experts.
    """
    sizes = _Sizes.of(config)
    lengths = sizes.lengths(seq, visual, exit_layer)
    layers = sum(n * sizes.linear + n * (n + 1) // 2 * sizes.pair for n in lengths)
    return layers + sizes.lm_head + (gate_flops(plan, exit_layer) if plan is not None and visual else 0)


def decode_flops(config: Any, seq: int, visual: int, exit_layer: int, tokens: int = 1) -> int:
    """FLOPs of ``tokens`` decode steps after a prompt; arguments and errors as in :func:`prefill_flops`."""
    sizes = _Sizes.of(config)
    # Step t, counted from 1, attends to the prompt, as far as the layer kept it, and to the t tokens behind it.
    keys = sum(n * tokens + tokens * (tokens + 1) // 2 for n in sizes.lengths(seq, visual, exit_layer))
    return tokens * (sizes.layers * sizes.linear + sizes.lm_head) + keys * sizes.pair


def gate_flops(plan: Plan, exit_layer: int) -> int:
    """FLOPs of the plan's gates that are asked until the visual tokens leave after ``exit_layer`` (-1: all gates)."""
    from vte_compile.plan import GateExit

    gates = [e for e in plan.exits if isinstance(e, GateExit) and (exit_layer < 0 or e.layer <= exit_layer)]
    return sum(flops_of_gate(gate.width, gate.hidden_size) for gate in gates)


def flops_of_gate(width: int, hidden_size: int) -> int:
    """FLOPs of asking one gate of this width M, on a decoder of hidden size C."""
    return 2 * width * (2 * hidden_size + 2)


def kv_bytes(config: Any, seq: int, visual: int, exit_layer: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one prompt after prefill; arguments and errors as in :func:`prefill_flops`."""
    sizes = _Sizes.of(config)
    return 2 * sizes.kv_heads * sizes.head_size * dtype.itemsize * sum(sizes.lengths(seq, visual, exit_layer))
