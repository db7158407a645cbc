"""Find the decoder of a Hugging Face model by structure, and the token ids that stand for visual features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vte_compile.errors import UnsupportedModelError

# The config fields in which transformers' multimodal families keep the ids of their placeholder tokens.
_VISUAL_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class DecoderSpec:
    """The parts of a model that vte_compile rewrites, and what it has to know about them."""

    decoder: nn.Module
    """The stack of decoder layers, with ``.layers`` and ``.norm``."""
    lm_head: nn.Module
    path: str
    """Dotted name of the decoder inside the model, such as ``model.language_model``."""
    config: Any
    """The decoder's own (text) config."""
    visual_token_ids: tuple[int, ...]
    """Placeholder ids whose embeddings are replaced by visual features; empty for a language model alone."""

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)  # type: ignore[arg-type]

    @property
    def is_multimodal(self) -> bool:
        """Whether the decoder sits inside a wrapper that merges other modalities into its inputs."""
        return "." in self.path

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)


def describe(model: nn.Module) -> DecoderSpec:
    """Describe a causal language model or an MLLM of transformers.

    Raises:
        UnsupportedModelError: No decoder, or one with a layout that cannot be rewritten soundly.
    """
    name = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(
            f"{name}: no decoder found: it has no get_decoder() and get_output_embeddings(). Pass a transformers model "
            "with a language-modelling head, such as LlavaForConditionalGeneration or LlamaForCausalLM."
        )
    decoder = model.get_decoder()
    missing = [part for part in ("layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
    if missing or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"{name}: no decoder found: get_decoder() gives a {type(decoder).__name__} without "
            f"{', '.join(missing) or 'a ModuleList of layers'}. Only decoder-only models with rotary positions are known."
        )
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise UnsupportedModelError(f"{name}: no language-modelling head: load the ...ForConditionalGeneration class.")
    _refuse_sliding_window(name, decoder)
    return DecoderSpec(decoder, lm_head, _path_of(model, decoder), decoder.config, _visual_token_ids(model))


def _path_of(model: nn.Module, decoder: nn.Module) -> str:
    for path, module in model.named_modules():
        if module is decoder:
            return path
    raise UnsupportedModelError(f"{type(model).__name__}: its decoder is not one of its submodules.")


def _visual_token_ids(model: nn.Module) -> tuple[int, ...]:
    ids = {getattr(model.config, field, None) for field in _VISUAL_TOKEN_FIELDS}
    return tuple(sorted(i for i in ids if isinstance(i, int)))


def _refuse_sliding_window(name: str, decoder: nn.Module) -> None:
    """A window counts cached tokens, and an exit removes some: which of them it then covers is not defined yet."""
    config: Any = decoder.config
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    for layer, kind in enumerate(types):
        if kind != "full_attention":
            raise UnsupportedModelError(
                f"{name}: decoder layer {layer} uses {kind}: only full attention is supported so far "
                "(set sliding_window=None in the config if prompts stay below the window)."
            )
