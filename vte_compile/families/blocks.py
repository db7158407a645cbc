"""The parts of a pre-norm decoder block, found by structure: what attention skipping has to take apart.

    h = x + attention(input_norm(x)) ;  out = h + mlp(post_norm(h))

Names alone do not prove this form (Granite scales its residuals, Gemma's norms multiply by 1 + weight): who uses the
parts compares what they give with the block's own forward, as the oracle does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import UnsupportedModelError

# The names of the four parts in transformers (Llama, Mistral, Qwen, Gemma, InternLM3 and their relatives), and in
# InternLM2's own code.
_NAMES = (
    {
        "input_norm": "input_layernorm",
        "attention": "self_attn",
        "post_norm": "post_attention_layernorm",
        "mlp": "mlp",
    },
    {"input_norm": "attention_norm", "attention": "attention", "post_norm": "ffn_norm", "mlp": "feed_forward"},
)
# Norms of transformers compute in float32 even so.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class BlockParts:
    """The four modules of a pre-norm decoder block."""

    input_norm: nn.Module
    attention: nn.Module
    post_norm: nn.Module
    mlp: nn.Module


def block_parts(layer: nn.Module) -> BlockParts:
    """The parts of `layer`, which has no other weights (Gemma2 and Gemma3 have more norms, Olmo2 other ones).

    Raises:
        UnsupportedModelError: a part is missing, or there is more.
    """
    children = dict(layer.named_children())
    # Of the names that fit best, so that the message tells what is missing.
    names = min(_NAMES, key=lambda names: sum(name not in children for name in names.values()))
    missing = [name for name in names.values() if name not in children]
    if missing:
        raise UnsupportedModelError(f"{type(layer).__name__} has no {', '.join(missing)}: not a block of pre-norm form")
    weights = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    extra = sorted({first for first in (name.split(".")[0] for name in weights) if first not in names.values()})
    if extra:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has {', '.join(extra)} besides {', '.join(names.values())}: not a block of "
            "pre-norm form"
        )
    return BlockParts(**{part: children[name] for part, name in names.items()})


def can_be_taken_apart(layer: nn.Module) -> bool:
    """Whether :func:`block_parts` takes it."""
    try:
        block_parts(layer)
    except UnsupportedModelError:
        return False
    return True


def attention_name(layer: nn.Module) -> str:
    """The name of the attention in `layer`, which may be of another form.

    Raises:
        UnsupportedModelError: There is none of a name that is known.
    """
    children = dict(layer.named_children())
    found = [names["attention"] for names in _NAMES if names["attention"] in children]
    if not found:
        known = ", ".join(names["attention"] for names in _NAMES)
        raise UnsupportedModelError(f"{type(layer).__name__} has no attention of a name that is known ({known})")
    return found[0]


@torch.no_grad()
def rms_gain(norm: nn.Module) -> Tensor:
    """What an RMSNorm multiplies its normalised input by: g [C] in norm(x) = g * x / sqrt(mean(x^2) + eps).

    That is its weight, or 1 + weight in Gemma's. Which of them is found out by running the norm. In the weight's dtype,
    or in float32 for 1 + weight if that is wider.

    Raises:
        UnsupportedModelError: `norm` is no RMSNorm with a weight per channel.
    """
    weight: Any = getattr(norm, "weight", None)
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(eps, float):
        # In float64, since trained weights may be so large that a coarser dtype does not tell w from 1 + w.
        precise = copy.deepcopy(norm).double()
        # A mean of 1: what subtracts the mean shows.
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).double().to(weight.device) + 1
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        for gain in (weight.detach(), 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))):
            expected = gain.double() * normed
            if bool((precise(x) - expected).abs().max() <= _TOLERANCE * expected.abs().max()):
                return gain
    raise UnsupportedModelError(f"{type(norm).__name__} is not an RMSNorm with a weight per channel")
