"""The config of a published Eagle 2 or 2.5 checkpoint."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.eagle2.tokenizer import image_token_id, load_tokenizer

ARCHITECTURE = "Eagle2_5_VLForConditionalGeneration"
PROCESSOR_CLASS, IMAGE_PROCESSOR_TYPE = "Eagle2_5_VLProcessor", "Eagle2_5_VLImageProcessorFast"
"""The authors' names of their classes, by which other programs know what a checkpoint is."""
_TEXT_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_TOWER = "siglip_vision_model"
_OLD_TYPE = "eagle_chat"
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
# What the first published checkpoints (model_type eagle_chat) call some fields.
_OLD_NAMES = {
    "llm_config": "text_config",
    "min_dynamic_patch": "min_dynamic_tiles",
    "max_dynamic_patch": "max_dynamic_tiles",
}
# How attention was computed, and where the authors' code lies, is not part of the model.
# Fields of LlavaConfig that say nothing here.
_LLAVAS = (
    "image_seq_length",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
_NOT_OURS = ("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "auto_map")


class Eagle2Config(LlavaConfig):
    """What config.json of an Eagle 2 or 2.5 checkpoint says; that of the older eagle_chat ones is read too.

    ``save_pretrained`` writes the layout of Eagle 2.5. Fields are those of the authors' config, and of LlavaConfig:

    Attributes:
        vision_config: Of SigLIP. Its pooling head is left out, because nothing reads it.
        text_config: Of Qwen2, Qwen3 or Llama.
        image_token_index: The id of ``<IMG_CONTEXT>``, one for each visual token.
        select_layer: Which hidden states of SigLIP are taken; -1 the last, normed.
        use_pixel_shuffle: Whether squares of neighbouring patches become one visual token.
        downsample_ratio: One over the side of these squares.
        mlp_connector_layers: Linear layers between SigLIP and the decoder, 1 or 2.
        force_image_size: Side of a tile in pixels, if config.json names it twice.
        dynamic_image_size, min_dynamic_tiles, max_dynamic_tiles, use_thumbnail: How pictures were cut in training;
            processors have their own numbers.
        template: The authors' name of the chat template.
    """

    model_type = "eagle_2_5_vl"

    image_token_index: int = 151667
    select_layer: int = -4
    use_pixel_shuffle: bool = True
    downsample_ratio: float = 0.5
    mlp_connector_layers: int = 2
    force_image_size: int | None = None
    dynamic_image_size: bool = False
    min_dynamic_tiles: int = 1
    max_dynamic_tiles: int = 6
    use_thumbnail: bool = False
    template: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for old, name in _OLD_NAMES.items():
            if (value := kwargs.pop(old, None)) is not None:
                setattr(self, name, value)
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_OURS}
        self.vision_config = _vision_config(self.vision_config)
        self.text_config = _text_config(self.text_config)
        if lora := [name for name in ("use_backbone_lora", "use_llm_lora") if kwargs.get(name)]:
            raise UnsupportedModelError(
                f"{', '.join(lora)}: adapters beside the weights are not supported: merge them."
            )
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields in config.json, by the names of Eagle 2.5.

        Raises:
            InputError: It is no Eagle 2; or no id of ``<IMG_CONTEXT>`` is known.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
        fields, rest = super().get_config_dict(name, **kwargs)
        if fields.get("model_type") not in (cls.model_type, _OLD_TYPE):
            raise InputError(
                f"{name}: model_type is {fields.get('model_type')!r}, not Eagle 2's ({cls.model_type}, {_OLD_TYPE})."
            )
        if fields["model_type"] == _OLD_TYPE:
            fields = {"select_layer": -1, **fields, "model_type": cls.model_type}
        if fields.get("image_token_index") is None:
            # Configs of model_type eagle_chat do not name it.
            fields["image_token_index"] = image_token_id(load_tokenizer(name, **hub), name)
        return fields, rest

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        fields = {name: value for name, value in super().to_dict().items() if name not in _LLAVAS}
        return {**fields, "architectures": [ARCHITECTURE]}

    @property
    def shuffle_factor(self) -> int:
        """How many patches along each side of an image become one visual token."""
        return round(1 / self.downsample_ratio) if self.use_pixel_shuffle else 1

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile or frame."""
        return (self._side // self.shuffle_factor) ** 2

    @property
    def _side(self) -> int:
        vision: Any = self.vision_config
        return int(vision.image_size // vision.patch_size)

    def _check(self) -> None:
        """Refuse what would fail, or be wrong, at the first image.

        Raises:
            UnsupportedModelError: The message names the field.
        """
        vision: Any = self.vision_config
        if self.force_image_size not in (None, vision.image_size):
            raise UnsupportedModelError(
                f"force_image_size is {self.force_image_size}, but SigLIP's image_size {vision.image_size}: position "
                "embeddings of another size are not supported."
            )
        if self.use_pixel_shuffle and abs(self.shuffle_factor * self.downsample_ratio - 1) > 1e-6:
            raise UnsupportedModelError(f"downsample_ratio is {self.downsample_ratio}: expected 1/2, 1/3 ...")
        if self._side % self.shuffle_factor:
            raise UnsupportedModelError(
                f"downsample_ratio is {self.downsample_ratio}, but a tile has {self._side} patches along a side."
            )
        if self.mlp_connector_layers not in (1, 2) or (self.mlp_connector_layers == 2 and not self.use_pixel_shuffle):
            raise UnsupportedModelError(
                f"mlp_connector_layers is {self.mlp_connector_layers}: only 2, and 1, which may go without "
                "use_pixel_shuffle, are supported."
            )
        if not -vision.num_hidden_layers - 1 <= self.select_layer <= vision.num_hidden_layers:
            raise UnsupportedModelError(
                f"select_layer is {self.select_layer}, but SigLIP has {vision.num_hidden_layers} layers."
            )


def _vision_config(given: Any) -> Any:
    config = _sub_config("vision_config", given, {"model_type": _TOWER})
    if config.model_type != _TOWER:
        raise UnsupportedModelError(
            f"vision_config: model_type is {config.model_type!r}: only {_TOWER} is supported so far. (Eagle2-9B of "
            "January 2025 has a ConvNeXt beside SigLIP.)"
        )
    config.vision_use_head = False
    return config


def _text_config(given: Any) -> Any:
    if isinstance(given, dict) and "model_type" not in given:
        architecture = (given.get("architectures") or ["Qwen2ForCausalLM"])[0]
        given = {**given, "model_type": _TEXT_TYPES.get(architecture, architecture)}
    config = _sub_config("text_config", given, {"model_type": "qwen2"})
    if config.model_type not in _TEXT_TYPES.values():
        raise UnsupportedModelError(
            f"text_config: model_type is {config.model_type!r}: only {', '.join(_TEXT_TYPES.values())} are supported."
        )
    config.use_cache = True  # published ones say False, which is left over from training
    return config


def _sub_config(name: str, given: Any, default: dict[str, Any]) -> Any:
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given)
    fields = {key: value for key, value in (given or default).items() if key not in _NOT_OURS}
    try:
        return AutoConfig.for_model(**{**default, **fields})
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: transformers knows no such model: {error}") from error
