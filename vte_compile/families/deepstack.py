"""DeepStack (arXiv 2406.04334): visual features that a decoder adds to the stream behind its first layers.

They are added to visual tokens only. So an exit may stand before the last of them: what would still be added belongs
to tokens that are gone. In graphs, each of these layers has an input of its own as long as the sequence, zero at text;
an exit shortens it as it does everything of that length.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.module_tree import shallow_copy

MASK, FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
"""How decoders with DeepStack call where the visual tokens are, [B, T] bool, and what is added behind layer 0, 1 ..:
a list of [visual tokens, C]."""
_INDEXES = "deepstack_visual_indexes"
"""In the config of the image encoder: behind which of its layers features are taken, one for each decoder layer."""

_features: contextvars.ContextVar[Sequence[Tensor]] = contextvars.ContextVar("vte_deepstack", default=())


def deepstack_layers(model: nn.Module, decoder: Any) -> int:
    """Behind how many of a decoder's first layers features are added; 0 for most decoders.

    Raises:
        UnsupportedModelError: It takes features in another way, or nothing says for how many layers.
    """
    name, given = type(decoder).__name__, inspect.signature(decoder.forward).parameters
    if not (found := [parameter for parameter in given if "deepstack" in parameter]):
        return 0
    if MASK not in given or found != [FEATURES]:
        raise UnsupportedModelError(
            f"{name} takes {', '.join(found)} besides embeddings: features that are added to the hidden states behind "
            f"several layers (DeepStack) are known as {MASK} and {FEATURES} only."
        )
    counts = {len(getattr(getattr(m, "config", None), _INDEXES, None) or ()) for m in model.modules()} - {0}
    if len(counts) != 1 or max(counts) > len(decoder.layers):
        raise UnsupportedModelError(
            f"{name} takes {FEATURES} (DeepStack), and {_INDEXES} in the model's configs does not say for how many of "
            f"its {len(decoder.layers)} layers: {sorted(counts) or 'it is not there'}."
        )
    return counts.pop()


def spread(mask: Tensor, features: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Features as graphs take them, of each layer [B, T, C], zero where no visual token is.

    Args:
        mask: [B, T] bool.
        features: Of each layer, [visual tokens, C], row by row.
        like: Embeddings [B, T, C].
    """
    spread_out = []
    for of_layer in features:
        whole = torch.zeros_like(like)
        whole[mask.to(like.device)] = of_layer.to(like)
        spread_out.append(whole)
    return spread_out


def rows_of(mask: Tensor, features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Features of each row: per row, of each layer, [its visual tokens, C].

    Raises:
        InputError: They are not as many as the mask [B, T] has tokens.
    """
    counts = mask.sum(-1).tolist()
    for layer, of_layer in enumerate(features):
        if len(of_layer) != sum(counts):
            raise InputError(
                f"{FEATURES}: {len(of_layer)} features behind layer {layer}, but {sum(counts)} visual tokens."
            )
    return [list(row) for row in zip(*(of_layer.split(counts) for of_layer in features), strict=True)]


def adding(decoder: Any, layers: int) -> nn.Module:
    """A copy of a decoder, to be traced: behind its first layers it adds what :func:`given` says.

    The decoder's own code selects visual tokens by a mask, whose number no graph knows before it runs.
    """
    other = shallow_copy(decoder)
    other.layers = nn.ModuleList(list(decoder.layers))
    for index in range(layers):
        layer = shallow_copy(other.layers[index])
        layer.forward = partial(_forward, decoder.layers[index].forward, index)
        other.layers[index] = layer
    return other


def _forward(forward: Callable[..., Tensor], index: int, *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs) + _features.get()[index]


@contextmanager
def given(features: Sequence[Tensor]) -> Iterator[None]:
    """What decoders that :func:`adding` made add meanwhile, of each layer [B, T, C]."""
    token = _features.set(features)
    try:
        yield
    finally:
        _features.reset(token)
