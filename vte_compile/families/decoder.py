"""Find the decoder of a Hugging Face model by structure, and the token ids that stand for visual features."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import UnsupportedModelError
from vte_compile.families.deepstack import FEATURES, MASK, deepstack_layers
from vte_compile.families.live import find_live
from vte_compile.families.logits import logit_softcap
from vte_compile.families.refusals import refuse_other_architectures
from vte_compile.families.token_blocks import NAME as BLOCKS
from vte_compile.families.token_blocks import takes_blocks

# What a decoder with multimodal rotary positions may take; others are given more than embeddings.
_KNOWN_ARGUMENTS = frozenset(
    "input_ids inputs_embeds attention_mask position_ids cache past_key_values use_cache cache_position return_dict "
    "output_attentions output_hidden_states".split()
) | {MASK, FEATURES}
# The config fields in which transformers' multimodal families keep the ids of their placeholder tokens.
VISUAL_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


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
    position_rows: int = 1
    """How many numbers make a token's position, see :func:`position_rows`."""
    deepstack: int = 0
    """Behind how many of the first layers visual features are added (vte_compile/families/deepstack.py)."""
    has_blocks: bool = False
    """Whether tokens may attend to later ones of their block (vte_compile/families/token_blocks.py)."""
    logit_softcap: float | None = None
    """By how much the logits of the head are capped (vte_compile/families/logits.py); None: they are not."""
    freed: Mapping[str, torch.Size] = field(default_factory=dict)
    """Shapes of the weights, by their name in the decoder, that it has no more, because no graph reads them."""

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of what the decoder takes."""
        return self._head_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self._head_weight.device

    @property
    def _head_weight(self) -> Tensor:
        return self.lm_head.get_parameter("weight")

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether its tokens see a window of those before them only."""
        types = getattr(self.config, "layer_types", None)
        if types is None:
            return (bool(getattr(self.config, "sliding_window", None)),) * self.num_layers
        return tuple(kind == "sliding_attention" for kind in types[: self.num_layers])

    @property
    def has_windows(self) -> bool:
        """Whether tokens of some layer do."""
        return any(self.windowed)

    @property
    def attention_softcap(self) -> float | None:
        """By how much attention caps its scores (Gemma 2, arXiv 2408.00118); None: it does not."""
        return getattr(self.config, "attn_logit_softcapping", None) or None

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """What graphs of prompts take of each token besides embedding and position: inputs [1, S, ...], by name."""
        return (*(f"deepstack_{layer}" for layer in range(self.deepstack)), *([BLOCKS] if self.has_blocks else []))

    @property
    def is_multimodal(self) -> bool:
        """Whether the decoder sits inside a wrapper that merges other modalities into its inputs."""
        return "." in self.path

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts that transformers can compute in several ways."""
        return any(hasattr(m, "has_gate") and hasattr(m, "is_transposed") for m in self.decoder.modules())

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_size(self) -> int:
        """D, of each head."""
        size = getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads
        return int(size)


def find_decoder(model: nn.Module) -> nn.Module:
    """The innermost decoder `model` names with ``get_decoder()``: the module that holds the decoder layers.

    Raises:
        UnsupportedModelError: `model` has no ``get_decoder()``.
    """
    live = find_live(model)
    model = decoder = model if live is None else model.get_submodule(live.path)
    while True:
        get_decoder = getattr(decoder, "get_decoder", None)
        if get_decoder is None:
            if decoder is model:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: no decoder found: it has no get_decoder(). Pass a transformers model "
                    "with a language-modelling head, such as LlavaForConditionalGeneration or LlamaForCausalLM."
                )
            return decoder
        # Some models name their causal LM rather than the decoder in it, so ask again until it names itself.
        inner = get_decoder()
        if inner is decoder or not isinstance(inner, nn.Module):
            return decoder
        decoder = inner


def position_rows(decoder: nn.Module) -> int:
    """How many numbers make a token's position: 3 (time, height, width) with multimodal rotary positions, else 1.

    Such a decoder takes position_ids [3, B, T]; of text, all three rows are the same.

    Raises:
        UnsupportedModelError: Its multimodal positions are not those of Qwen2-VL, or come with more than embeddings.
    """
    name, rotary = type(decoder).__name__, decoder.rotary_emb
    sections = getattr(rotary, "mrope_section", None)
    if sections is None:
        if "mrope_section" in (getattr(decoder.config, "rope_parameters", None) or {}):
            raise UnsupportedModelError(
                f"{name}: its config asks for multimodal (3-D) rotary positions, of which its "
                f"{type(rotary).__name__} knows nothing."
            )
        return 1
    if len(sections) != 3:
        raise UnsupportedModelError(
            f"{name} has rotary positions of {len(sections)} rows: only those of three (3-D: time, height, width) are "
            "supported so far."
        )
    parameters = inspect.signature(decoder.forward).parameters.values()
    if extra := [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _KNOWN_ARGUMENTS]:
        raise UnsupportedModelError(
            f"{name} has multimodal (3-D) rotary positions and takes {', '.join(extra)} besides embeddings: not "
            "supported so far."
        )
    return 3


def describe(model: nn.Module) -> DecoderSpec:
    """Describe a causal language model or an MLLM of transformers.

    Raises:
        UnsupportedModelError: No decoder, or one with a layout that cannot be rewritten soundly.
    """
    name = type(model).__name__
    decoder: Any = find_decoder(model)
    refuse_other_architectures(model, decoder)
    _refuse_other_structure(model, decoder)
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    lm_head: Any = get_head()
    if lm_head is None:
        raise UnsupportedModelError(
            f"{name}: no language-modelling head"
            + (_advice_for_wrappers(model) or ": load the ...ForConditionalGeneration class.")
        )
    _refuse_other_windows(name, decoder)
    _refuse_unknown_layout(model, decoder)
    _refuse_without_embeddings(model)
    path, ids = _path_of(model, decoder), _visual_token_ids(model)
    rows, deepstack = position_rows(decoder), deepstack_layers(model, decoder)
    softcap = logit_softcap(decoder.config)
    return DecoderSpec(decoder, lm_head, path, decoder.config, ids, rows, deepstack, takes_blocks(model), softcap)


def _path_of(model: nn.Module, decoder: nn.Module) -> str:
    for path, module in model.named_modules():
        if module is decoder:
            return path
    raise UnsupportedModelError(f"{type(model).__name__}: its decoder is not one of its submodules.")


def _visual_token_ids(model: nn.Module) -> tuple[int, ...]:
    ids = {getattr(model.config, field, None) for field in VISUAL_TOKEN_FIELDS}
    return tuple(sorted(i for i in ids if isinstance(i, int)))


def _refuse_other_windows(name: str, decoder: nn.Module) -> None:
    for layer, kind in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"{name}: decoder layer {layer} uses {kind}: only full attention and sliding windows are supported."
            )


def _refuse_other_structure(model: nn.Module, decoder: nn.Module) -> None:
    """What is not built as transformers' decoders are: layers, a norm behind them, positions computed once for all."""
    name, kind = type(model).__name__, type(decoder).__name__
    missing = [part for part in ("layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
    if missing == ["rotary_emb"]:
        for path, _ in decoder.named_modules():
            if path.startswith("layers.") and path.endswith(".rotary_emb"):
                raise UnsupportedModelError(
                    f"{name}: its {kind} computes rotary positions in every layer ({path}), as the code beside "
                    "checkpoints (InternLM2, Phi-3) does: only decoders that compute them once, as transformers' own "
                    "classes do, are supported. Load a checkpoint converted for those (InternVL's end in -hf), or "
                    "InternVL's with vte_compile.families.internvl.load_internvl(folder)."
                )
    if missing or not isinstance(decoder.layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{name}: no decoder found: get_decoder() gives a {kind} without "
            f"{', '.join(missing) or 'a ModuleList of layers'}"
            + (_advice_for_wrappers(model) or ". Only decoder-only models with rotary positions are known.")
        )


def _refuse_without_embeddings(model: nn.Module) -> None:
    """Wrappers from beside checkpoints (Eagle 2, InternVL) that generate by handing embeddings to a whole causal LM."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "inputs_embeds" or p.kind is p.VAR_KEYWORD for p in parameters):
        advice = _advice_for_wrappers(model)
        raise UnsupportedModelError(f"{type(model).__name__}: its forward takes no inputs_embeds{advice or '.'}")


def _advice_for_wrappers(model: nn.Module) -> str:
    """What to do with a model of which a whole causal language model, with head and generate(), is a part; or ""."""
    for name, child in model.named_children():
        get_head: Any = getattr(child, "get_output_embeddings", None)
        if hasattr(child, "generate") and get_head is not None and get_head() is not None:
            return (
                f". Optimize its {name}, to which its generate() hands embeddings: "
                f"model.{name} = vte_compile.optimize(model.{name}, plan); and pass visual_mask to generate(), True at "
                "visual tokens: input_ids == (the image token's id) if each of them has its placeholder (see "
                "docs/models.md, Models with code of their own)."
            )
    return ""


def _refuse_unknown_layout(model: nn.Module, decoder: nn.Module) -> None:
    """What a check on a short text prompt would not show: images, or long prompts, would be computed wrongly."""
    name = type(model).__name__
    config: Any = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # of all layers, or by type
        if each.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{name}: its decoder has {each['rope_type']} rotary positions, which depend on the longest row: not "
                "supported so far."
            )
    if getattr(config, "use_bidirectional_attention", None) and not takes_blocks(model):
        raise UnsupportedModelError(
            f"{name}: its decoder has use_bidirectional_attention: tokens attend to later ones, and only causal "
            "attention is supported so far."
        )
