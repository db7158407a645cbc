"""Which model a graph of Dynamo's belongs to, told by its parameters, and which live object that model is a part of."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.decoder import find_decoder
from vte_compile.families.live import find_live, placeholder_id
from vte_compile.optimized_model import OptimizedModel

_T = TypeVar("_T")


def find_model(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[PreTrainedModel, list[fx.Node]] | None:
    """The model whose decoder layers the graph reads, and its inputs that are weights of the first of them.

    Dynamo names modules, but does not hand them out; the parameters are the model's own objects, though, and tell it.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    weights = {id(value): n for n, value in zip(placeholders, example_inputs, strict=True) if isinstance(value, Tensor)}
    for candidate in _alive(PreTrainedModel):
        if isinstance(candidate, OptimizedModel):
            continue
        try:
            # Of live objects the language model in them is a candidate, too, and what Dynamo compiled.
            if find_live(candidate) is not None or candidate.get_output_embeddings() is None:
                continue
            layers: Any = find_decoder(candidate).layers
        except (UnsupportedModelError, AttributeError, NotImplementedError):
            continue
        read = [weights[id(p)] for p in layers[0].parameters() if id(p) in weights] if len(layers) else []
        if read:
            return candidate, read
    return None


def placeholder_ids(language_model: nn.Module) -> tuple[int, ...]:
    """The ids that stand for a visual token in live objects with this language model in them; none: it is alone.

    Raises:
        InputError: There is such an object, and does not know its id yet.
    """
    ids = set()
    for candidate in _alive(nn.Module):
        if not hasattr(candidate, "_modules"):  # half made
            continue
        live = find_live(candidate)
        inner = None if live is None else getattr(candidate, live.path)
        if live is None or live.splice is not None or getattr(inner, "_orig_mod", inner) is not language_model:
            continue
        if (token := placeholder_id(candidate)) is None:
            raise InputError(
                f"{type(candidate).__name__} does not know its image token's id before chat() was called: set "
                "img_context_token_id, or pass options={'visual_token_ids': [...]}."
            )
        ids.add(token)
    return tuple(sorted(ids))


def _alive(kind: type[_T]) -> Iterator[_T]:
    """All objects of a class, asked by type(): isinstance() would ask proxies for their class."""
    for candidate in gc.get_objects():
        if issubclass(type(candidate), kind):
            yield candidate
