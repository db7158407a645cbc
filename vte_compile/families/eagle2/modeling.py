"""Eagle 2 and 2.5: SigLIP, pixel shuffle, a small MLP, and a causal language model, all of transformers' parts.

    visual tokens = mlp1(pixel_shuffle(SigLIP(tile)))        in the places of <IMG_CONTEXT>

Sources: "Eagle 2", arXiv 2501.14818; "Eagle 2.5", arXiv 2504.15271; the authors' code, github.com/NVlabs/Eagle.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, SiglipVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llava.modeling_llava import LlavaModel

from vte_compile.errors import InputError
from vte_compile.families.eagle2.configuration import Eagle2Config
from vte_compile.families.placeholder_model import PlaceholderModel


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Make each square of neighbouring tokens one, their channels behind each other, row by row.

    Args:
        features: [n, side * side, c], rows of a square image behind each other.
        factor: Side of the small squares; divides `side`.

    Returns:
        [n, (side / factor)^2, c * factor^2].
    """
    blocks = round(features.shape[1] ** 0.5) // factor
    squares = features.unflatten(1, (blocks, factor, blocks, factor)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def _connector(config: Eagle2Config) -> nn.Sequential:
    vision, text = (config.vision_config, config.text_config)
    inputs, outputs = vision.hidden_size * config.shuffle_factor**2, text.hidden_size  # type: ignore[union-attr]
    if config.mlp_connector_layers == 1:
        return nn.Sequential(nn.Linear(inputs, outputs))
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class Eagle2Model(PlaceholderModel):
    """Eagle 2 without the language-modelling head."""

    config: Eagle2Config

    def __init__(self, config: Eagle2Config) -> None:
        super(LlavaModel, self).__init__(config)  # its tower and projector are others
        self.vision_tower = SiglipVisionModel(config.vision_config)  # type: ignore[arg-type]
        self.multi_modal_projector = _connector(config)  # type: ignore[assignment]
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [tiles, 3, height, width] -> visual tokens [tiles, tokens, C]."""
        tower = self.vision_tower
        last = self.config.select_layer == -1
        encoded = tower(pixel_values.to(tower.device, tower.dtype), output_hidden_states=not last)
        features = encoded.last_hidden_state if last else encoded.hidden_states[self.config.select_layer]
        shuffled = pixel_shuffle(features, self.config.shuffle_factor)
        projected: Tensor = self.multi_modal_projector(shuffled)
        return projected


class Eagle2ForConditionalGeneration(LlavaForConditionalGeneration):
    """Eagle 2 and 2.5 (NVlabs/Eagle; nvidia/Eagle2-1B, Eagle2-2B, Eagle2.5-8B).

    ``from_pretrained`` and ``save_pretrained`` are those of transformers, for the published layout: weights are named
    ``vision_model.*``, ``mlp1.*`` and ``language_model.*`` in the files. What goes in and out is as in
    LlavaForConditionalGeneration; Eagle2Processor makes ``input_ids`` [B, T], with a placeholder for each visual token,
    and ``pixel_values`` [tiles of all rows, 3, height, width]. Padding may be on either side.
    """

    config_class = Eagle2Config
    config: Eagle2Config
    # SigLIP's pooling head is in some files. Nothing reads it.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.head\.", r"vision_model\.head\."]  # noqa: RUF012

    def __init__(self, config: Eagle2Config) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = Eagle2Model(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a checkpoint, in eval mode; arguments are those of transformers' from_pretrained.

        Raises:
            InputError: The weights do not fit config.json; the message says which are missing or left over.
            UnsupportedModelError: The checkpoint has parts that are not supported.
        """
        wants_info = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **options)
        model, info = loaded
        problems = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "mismatched", "unexpected")}
        if any(problems.values()):
            found = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names)
            raise InputError(f"{pretrained_model_name_or_path}: its weights do not fit its config.json: {found}")
        _stop_as_the_decoder(model)
        return (model, info) if wants_info else model


def _stop_as_the_decoder(model: Any) -> None:
    """Published generation configs say nothing of where answers end; the decoder's config does."""
    text, generation = model.config.text_config, model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(text, name, None))


# By name of the class, so that the files of Eagle2Model, which nobody publishes, keep transformers' names.
register_checkpoint_conversion_mapping(
    Eagle2ForConditionalGeneration.__name__,
    [
        WeightRenaming(r"^vision_model\.vision_model\.", r"^model.vision_tower."),
        WeightRenaming(r"^mlp1\.", r"^model.multi_modal_projector."),
        WeightRenaming(r"^language_model\.lm_head\.", r"^lm_head."),
        WeightRenaming(r"^language_model\.model\.", r"^model.language_model."),
    ],
    overwrite=True,  # this module may be imported anew
)
