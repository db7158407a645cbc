"""Models with code of their own, as live objects: which structure one has, told by its attributes, never by its class.

Their code makes embeddings of ids and images and hands them to a causal language model, which is a part of them
(InternVL, Eagle 2, VILA) or what they derive from (LLaVA, Eagle-X5). What knows which tokens are visual is

- in InternVL and Eagle 2 the ids: a placeholder for each visual token;
- in VILA, LLaVA and Eagle-X5 the method that puts all features of an image where its one placeholder was. It takes
  labels along, so they can be tags that tell afterwards where each token of text went.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import InputError

# Where a whole causal language model, with head and generate(), may be in a model.
_LANGUAGE_MODELS = ("language_model", "llm")
# The method of InternVL and Eagle 2 that makes features of pixels, one per placeholder.
_FEATURES = "extract_feature"
# The label of tokens without one.
_IGNORE = -100


@dataclass(frozen=True)
class Splice:
    """A method that merges text and images, and returns a tuple: what it is called, what it takes, what is where."""

    method: str
    takes: tuple[str, ...]
    """The first of its parameters."""
    embeds: int
    labels: int
    mask: int
    """Places in what it returns."""
    returns_given: bool
    """Whether labels and mask come back as None if none were given."""


EMBED = Splice("_embed", ("input_ids", "media", "media_config", "labels", "attention_mask"), 0, 1, 2, False)
PREPARE = Splice(
    "prepare_inputs_labels_for_multimodal",
    ("input_ids", "position_ids", "attention_mask", "past_key_values", "labels"),
    4,
    5,
    2,
    True,
)


@dataclass(frozen=True)
class Live:
    """A model of its authors' own code with a whole causal language model in it."""

    path: str
    """The name of that."""
    splice: Splice | None
    """What merges text and images; None: each visual token has its placeholder."""


def find_live(model: nn.Module) -> Live | None:
    """The structure of a model of its authors' own code with a language model in it; None: it is no such model."""
    path = next((name for name in _LANGUAGE_MODELS if _is_language_model(model._modules.get(name))), None)
    if path is None or not hasattr(model, "generate"):
        return None
    splice = find_splice(type(model))
    has_placeholders = hasattr(model, _FEATURES) and _has_placeholder(model)
    return Live(path, splice) if splice is not None or has_placeholders else None


def find_splice(kind: type) -> Splice | None:
    """The method by which a class merges text and images, if it has one of those that are known."""
    kind = getattr(kind, "_vte_base", kind)  # of optimized ones the method is another, which takes anything
    for splice in (EMBED, PREPARE):
        method = getattr(kind, splice.method, None)
        if callable(method):
            names = tuple(inspect.signature(method).parameters)[1:]
            if names[: len(splice.takes)] == splice.takes:
                return splice
    return None


def _is_language_model(module: nn.Module | None) -> bool:
    get_head: Any = getattr(module, "get_output_embeddings", None)
    return hasattr(module, "generate") and get_head is not None and get_head() is not None


def _has_placeholder(model: nn.Module) -> bool:
    # InternVL's is None until chat() asks the tokenizer for it.
    return hasattr(model, "img_context_token_id") or placeholder_id(model) is not None


def placeholder_id(model: nn.Module) -> int | None:
    """The id that stands for a visual token; None: it is not known (yet)."""
    if hasattr(model, "img_context_token_id"):
        token: Any = model.img_context_token_id
    else:
        token = getattr(getattr(model, "config", None), "image_token_index", None)
    return token if isinstance(token, int) else None


def spliced(
    splice: Splice, method: Callable[..., tuple[Any, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Tensor | None]:
    """Call a method that merges text and images, and see where it puts images.

    Args:
        splice: What is known of it.
        method: Bound to its model.
        args: What it was called with.
        kwargs: The same, by name.

    Returns:
        What it returns for these arguments; and the mask [B, T] bool of visual tokens, None if it merged nothing.

    Raises:
        InputError: What came back does not tell where the text went.
    """
    bound = inspect.signature(method).bind(*args, **kwargs)
    given = bound.arguments
    ids, labels, mask = (given.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor):
        return method(*args, **kwargs), None
    given["labels"] = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    if mask is None:
        given["attention_mask"] = torch.ones_like(ids, dtype=torch.bool)
    result = list(method(*bound.args, **bound.kwargs))
    tags, real = result[splice.labels], result[splice.mask]
    if splice.returns_given and mask is None:
        result[splice.mask] = None
    if result[splice.embeds] is None:
        result[splice.labels] = labels
        return tuple(result), None
    text = tags[tags >= 0]
    if not bool((text.diff() > 0).all()) or not bool(real.bool()[tags >= 0].all()):
        raise InputError(
            f"{method.__qualname__}() changes labels or their order, so it cannot be seen which tokens are visual: "
            "pass visual_mask ([batch, tokens as the language model gets them] bool)."
        )
    if labels is not None:
        result[splice.labels] = torch.where(tags >= 0, labels.flatten()[tags.clamp(min=0)], tags).to(labels.dtype)
    else:
        result[splice.labels] = None if splice.returns_given else tags.clamp(max=_IGNORE)
    return tuple(result), (tags < 0) & real.bool()
