"""What a METER model is made of, as a config of transformers."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from transformers import BridgeTowerTextConfig, CLIPVisionConfig, PreTrainedConfig, RobertaConfig

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


class MeterConfig(PreTrainedConfig):
    """The config of a METER model; without arguments, that of METER-CLIP16-RoBERTa at 288 x 288 pixels.

    Args:
        text_config: Of RoBERTa.
        vision_config: Of CLIP's image encoder, whose last layer METER leaves out: 11 of ViT-B/16's 12.
        cross_modal_config: Of the co-attention layers; ``num_hidden_layers`` is the number of levels. They have the
            form of BridgeTower's, which took them from METER.
        num_images: How many images a text goes with: 1, or 2 for NLVR2.
        classification_token: Whether a learned vector takes the place of the text's first token in front of the
            co-attention layers, as in METER-EAS.
        kwargs: As of all configs, such as ``num_labels``.
    """

    model_type = "meter"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": RobertaConfig,
        "vision_config": CLIPVisionConfig,
        "cross_modal_config": BridgeTowerTextConfig,
    }

    def __init__(
        self,
        text_config: RobertaConfig | dict[str, Any] | None = None,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        cross_modal_config: BridgeTowerTextConfig | dict[str, Any] | None = None,
        num_images: int = 1,
        classification_token: bool = False,
        **kwargs: Any,
    ) -> None:
        text = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        vision = {"num_hidden_layers": 11, "patch_size": 16, "image_size": 288}
        cross_modal = {"num_hidden_layers": 6, "layer_norm_eps": 1e-12}
        self.text_config = _config(RobertaConfig, text_config, text)
        self.vision_config = _config(CLIPVisionConfig, vision_config, vision)
        self.cross_modal_config = _config(BridgeTowerTextConfig, cross_modal_config, cross_modal)
        self.num_images = num_images
        self.classification_token = classification_token
        self.initializer_range = 0.02
        super().__init__(**kwargs)


def _config(kind: type[ConfigT], given: ConfigT | dict[str, Any] | None, defaults: dict[str, Any]) -> ConfigT:
    return given if isinstance(given, kind) else kind(**{**defaults, **(given or {})})
