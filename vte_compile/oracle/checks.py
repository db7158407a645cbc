"""Models that the oracle would run wrongly, told by their structure and by what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vte_compile.errors import UnsupportedModelError
from vte_compile.oracle.blocks import KeptBlock, OwnBlock
from vte_compile.oracle.rows import RowRun

if TYPE_CHECKING:
    from vte_compile.oracle.oracle import Oracle

# Attention implementations that take an additive 4-D mask. The flash variants ignore or refuse one.
_MASKED_ATTENTION = ("eager", "sdpa")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_structure(decoder: Any, has_blocks: bool) -> None:
    """Refuse decoders whose forward is more than rotary embedding, layers, norm."""
    name = type(decoder).__name__
    missing = [part for part in ("layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
    if missing:
        raise UnsupportedModelError(
            f"decoder {name} has no {', '.join(missing)}: the oracle needs a stack of layers with rotary embeddings"
        )
    config = decoder.config
    if config._attn_implementation not in _MASKED_ATTENTION:
        raise UnsupportedModelError(
            f"decoder {name} uses attention {config._attn_implementation!r}, which takes no explicit mask; "
            f"load the model with attn_implementation one of {_MASKED_ATTENTION}"
        )
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if unknown:
        raise UnsupportedModelError(f"decoder {name} has layers of types {unknown}; the oracle knows {_LAYER_TYPES}")
    rope = getattr(config, "rope_parameters", None) or {}
    if any(each.get("rope_type") == "dynamic" for each in (rope, *rope.values()) if isinstance(each, dict)):
        raise UnsupportedModelError(
            f"decoder {name} has dynamic rope: it remembers the longest row, so rows would not be independent"
        )
    # The few short tokens of check_against_model would not show it.
    if getattr(config, "use_bidirectional_attention", None) and not has_blocks:
        raise UnsupportedModelError(
            f"decoder {name} has use_bidirectional_attention, which the oracle does not support"
        )


@torch.no_grad()
def check_against_model(oracle: Oracle) -> None:
    """Compare with the model's own forward on a few tokens: the same modules, so only rounding may differ."""
    weight = oracle.model.get_input_embeddings().weight
    ids = torch.arange(min(8, weight.shape[0]), device=weight.device)[None]
    embeds = oracle.embed_tokens(ids)
    # Given, since a model with multimodal positions may count on from those of its latest images.
    expected = oracle.model(inputs_embeds=embeds, position_ids=ids, use_cache=False).logits
    actual = oracle.forward(embeds).logits
    scale = expected.abs().max().item()
    tolerance = 5e-2 if torch.finfo(expected.dtype).bits <= 16 else 1e-4
    error = (actual - expected).abs().max().item()
    # `not <=` rather than `>`: NaN must fail too.
    if not error <= tolerance * scale:
        raise UnsupportedModelError(
            f"{type(oracle.model).__name__}: running the decoder layer by layer gives other logits than the model's "
            f"own forward (off by {error:.1e}, logits up to {scale:.1e}). The model does something around its "
            "layers that the oracle does not know, or has dropout switched on (call model.eval())."
        )


@torch.no_grad()
def check_block(oracle: Oracle, index: int) -> None:
    """Compare the block form that a plan changes with the layer's own forward, on a few random tokens."""
    weight = oracle.model.get_input_embeddings().weight
    hidden = torch.randn(1, 8, oracle.config.hidden_size, generator=torch.Generator().manual_seed(index)).to(weight)
    positions = torch.arange(8, device=weight.device)
    outputs = []
    for block in (OwnBlock(oracle.layers[index]), KeptBlock(oracle.layers[index], None)):
        visual = torch.zeros_like(positions, dtype=torch.bool)
        run = RowRun(hidden, visual, oracle.row_positions(positions), positions, {}, torch.full_like(positions, -1))
        oracle.run_layer(index, block, run, None)
        outputs.append(run.hidden)
    own, spelled_out = outputs
    # The same operations: even low precision may not differ by more. `not <=` rather than `>`: NaN must fail too.
    if not (spelled_out - own).abs().max() <= 1e-4 * (own - hidden).abs().max():
        raise UnsupportedModelError(
            f"layer {index} ({type(oracle.layers[index]).__name__}) is not h = x + self_attn(input_layernorm(x)), "
            "h + mlp(post_attention_layernorm(h)): its attention cannot be skipped or adapted"
        )
