"""Models in which no visual token could leave the decoder soundly, told by their structure: refused, with the reason.

Some of them would pass any comparison on a short text prompt, so this is not left to one.
"""

from __future__ import annotations

from torch import nn

from vte_compile.errors import UnsupportedModelError
from vte_compile.families.live import find_live

# Of layers: how state-space models call the matrix of their recurrence, GPT-OSS its sinks, and others what attends to
# another sequence.
_RECURRENCE = "A_log"
_SINKS = "sinks"
_CROSS_ATTENTION = frozenset("cross_attn cross_attention crossattention encoder_attn EncDecAttention".split())
_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def refuse_other_architectures(model: nn.Module, decoder: nn.Module) -> None:
    """Refuse what is no stack of layers that attend to the one sequence in which the visual tokens are.

    Args:
        model: The user's model.
        decoder: What it names as its decoder.

    Raises:
        UnsupportedModelError: An encoder-decoder, cross-attention, recurrent layers; or attention that does not cap
            scores where the config asks for it; or a live object of the authors' own code.
    """
    name = type(model).__name__
    if (live := find_live(model)) is not None:
        raise UnsupportedModelError(
            f"{name}: how a model with code of its own embeds images only vte_compile.optimize() knows. Here pass its "
            f"{live.path}, with embeddings; or the checkpoint as a class of transformers or vte_compile, whose plans "
            "are for this object, too (docs/models.md, Models with code of their own)."
        )
    for config in (getattr(model, "config", None), getattr(decoder, "config", None)):
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{name} is an encoder-decoder: its decoder reads the prompt through cross-attention, and no visual "
                "token is in it that could leave. Only decoder-only models are supported."
            )
    for index, layer in enumerate(getattr(decoder, "layers", ())):
        where = f"{name}: decoder layer {index} ({type(layer).__name__})"
        if any(path.rpartition(".")[2] == _RECURRENCE for path, _ in layer.named_parameters()):
            raise UnsupportedModelError(
                f"{where} is a state-space layer: its state sums up all tokens before, so visual tokens cannot be "
                "taken out of it. Only layers that attend are supported."
            )
        if found := sorted(_CROSS_ATTENTION & {path.rpartition(".")[2] for path, _ in layer.named_modules()}):
            raise UnsupportedModelError(
                f"{where} has {', '.join(found)}: it attends to image features beside the sequence, where no visual "
                "token is that could leave. Only models that put them into the sequence are supported."
            )
        if any(path.rpartition(".")[2] == _SINKS for path, _ in layer.named_parameters()):
            raise UnsupportedModelError(
                f"{where} has attention sinks, logits that belong to no token: not supported so far."
            )
    config = getattr(decoder, "config", None)
    if getattr(config, "attn_logit_softcapping", None) and getattr(config, "_attn_implementation", None) == "sdpa":
        raise UnsupportedModelError(
            f"{name}: its decoder's attention is 'sdpa', which does not cap scores, and its config asks for that "
            "(attn_logit_softcapping): load it with attn_implementation='eager'."
        )
    types = getattr(config, "layer_types", None) or ()
    for index, kind in enumerate(types):
        if kind not in _ATTENTION_TYPES:
            raise UnsupportedModelError(
                f"{name}: decoder layer {index} is of type {kind}: only layers that attend are supported."
            )
