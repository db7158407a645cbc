"""Blocks of tokens that attend to each other in both directions: an image (Gemma3), or a whole prompt (PaliGemma).

A token has the number of its block, or -1: then it is causal, as text is. It attends to all tokens before it (with a
sliding window, to the last of them), and to all of its block. So tokens may leave a block, and what is left is one.

The model's own code makes the mask; the numbers are read off it, and nothing here knows what they mean to a family.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vte_compile.errors import InputError, UnsupportedModelError

NAME = "block_ids"
"""Of the graphs' input [1, S] int64."""
TYPES = "token_type_ids"
"""What models make blocks of, [B, tokens]."""


def takes_blocks(model: nn.Module) -> bool:
    """Whether a multimodal model's mask depends on more than the order of tokens."""
    return TYPES in inspect.signature(model.forward).parameters


def unmasked_block(decoder: nn.Module) -> int:
    """The block of all tokens of a prompt of which no types are known: 0 if the model lets them see each other.

    It does where it makes no mask and attention is not causal by itself. Eager attention always has a mask, of order.
    """
    layers, config = cast(Any, decoder.layers), cast(Any, decoder.config)
    if config._attn_implementation == "eager":
        return -1
    return 0 if any(getattr(module, "is_causal", True) is False for module in layers.modules()) else -1


def same_block(blocks: Tensor, columns: int) -> Tensor:
    """Which columns are of a token's block, [B, 1, T, columns] bool; the last T columns are the tokens'.

    Args:
        blocks: [B, T].
        columns: Of keys, those of earlier chunks included.
    """
    past = columns - blocks.shape[1]
    of_columns = blocks if isinstance(past, int) and past == 0 else F.pad(blocks, (past, 0), value=-1)
    return ((blocks[:, :, None] == of_columns[:, None, :]) & (blocks >= 0)[:, :, None])[:, None]


def allowed(blocks: Tensor, columns: int) -> Tensor:
    """Which columns tokens attend to, [B, 1, T, columns] bool; as :func:`same_block` takes them."""
    tokens = blocks.shape[1]
    rows = torch.arange(tokens, device=blocks.device)[:, None] + (columns - tokens)
    causal = torch.arange(columns, device=blocks.device)[None, :] <= rows
    return causal | same_block(blocks, columns)


def continued_inputs(inputs: dict[str, Any], batch: int, tokens: int, continued: bool) -> dict[str, Any]:
    """Inputs of a model's merging code by which it sees whether a chunk is a prompt's first.

    Args:
        inputs: With token types of this chunk or of all tokens so far.
        batch: B.
        tokens: T, of this chunk.
        continued: Whether there were earlier ones: then they are one token here, of type 0.

    Raises:
        InputError: There are fewer token types than tokens.
    """
    types = inputs.get(TYPES)
    if types is not None:
        if types.shape[0] != batch or types.shape[1] < tokens:
            raise InputError(f"{TYPES}: expected shape [{batch}, {tokens}], got {list(types.shape)}.")
        types = types[:, types.shape[1] - tokens :]
        inputs = inputs | {TYPES: F.pad(types, (1, 0)) if continued else types}
    if continued:
        # Plans, which come here too, do without transformers.
        from transformers.cache_utils import DynamicCache

        from vte_compile.families.cache_name import CACHE

        cache = DynamicCache()
        cache.update(torch.zeros(batch, 1, 1, 1), torch.zeros(batch, 1, 1, 1), 0)
        inputs = inputs | {CACHE: cache}
    return inputs


def blocks_of(mask: Any, batch: int, tokens: int, unmasked: int, device: torch.device) -> Tensor:
    """The blocks [B, T] of a mask that a model's own code made.

    Args:
        mask: [B or 1, 1, T, columns], True or 0 where a token attends; of layers by their type; or None.
        batch: B.
        tokens: T.
        unmasked: The block where there is no mask.
        device: Of the result.

    Raises:
        UnsupportedModelError: No blocks give this mask.
    """
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise UnsupportedModelError(f"its model makes masks for {sorted(mask)} only: none of all tokens.")
        mask = mask["full_attention"]
    if mask is None:
        return torch.full((batch, tokens), unmasked, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] != tokens:
        raise UnsupportedModelError(
            f"its model makes a mask of another form ({type(mask).__name__}): load it with attention 'sdpa'."
        )
    own = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, -tokens:]
    mutual = own & own.mT
    # A block is known by its first token; a token that no other one sees and is seen by is no block.
    blocks = torch.where(mutual.sum(-1) > 1, mutual.int().argmax(-1), -1).expand(batch, -1)
    if not torch.equal(allowed(blocks, tokens)[:, 0], own.expand(batch, -1, -1)):
        raise UnsupportedModelError(
            "its model makes a mask in which tokens attend to later ones, but not as blocks do: not supported so far."
        )
    return blocks.to(device)


def masks_of(blocks: Tensor, config: Any) -> Any:
    """The mask of blocks [B, T] as a decoder takes it: [B, 1, T, T], or one for each of its types of layers.

    It is bool, or, where attention is eager, which adds it to scores, 0 and -inf.

    Args:
        config: The decoder's.
    """
    mask = allowed(blocks, blocks.shape[1])
    types = getattr(config, "layer_types", None)
    masks: dict[Any, Tensor] = {None: mask} if types is None else dict.fromkeys(types, mask)
    if "sliding_attention" in masks:
        order = torch.arange(blocks.shape[1], device=blocks.device)
        near = order > order[:, None] - config.sliding_window
        masks["sliding_attention"] = (mask & near) | same_block(blocks, blocks.shape[1])
    if config._attn_implementation == "eager":
        masks = {kind: torch.zeros(m.shape, device=m.device).masked_fill(~m, -torch.inf) for kind, m in masks.items()}
    return masks[None] if types is None else masks
