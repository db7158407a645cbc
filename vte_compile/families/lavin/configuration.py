"""What a LaVIN model is made of, as a config of transformers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


class LavinConfig(PreTrainedConfig):
    """The config of a LaVIN model; without arguments, that of LaVIN-7B.

    Args:
        text_config: Of LLaMA.
        vision_config: Of CLIP's image encoder.
        feature_layers: The layers of CLIP, counted from 1, behind which the class token is a visual token.
        projector_width: Of the MLP that makes them as wide as LLaMA's tokens.
        adapter_width: D of the adapters in front of CLIP's attentions; 0: there are none.
        adapter_groups: Of their grouped linears.
        adapter_scale: s.
        adapter_temperature: t of their routers.
        adapter_routing: What a router of CLIP reads: "token", each token for itself (LaVIN), or "patches", the mean of
            the image's patches for all its tokens (LaVIN-EAS).
        image_token_id: Of placeholders; None: the first id behind LLaMA's vocabulary.
        kwargs: As of all configs.
    """

    model_type = "lavin"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | list[int] = (4, 8, 12, 16, 20, 24),
        projector_width: int = 128,
        adapter_width: int = 8,
        adapter_groups: int = 2,
        adapter_scale: float = 1.0,
        adapter_temperature: float = 10.0,
        adapter_routing: Literal["token", "patches"] = "token",
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
        }
        self.text_config: Any = _config(LlamaConfig, text_config, {"rms_norm_eps": 1e-6})
        self.vision_config: Any = _config(CLIPVisionConfig, vision_config, vision)
        self.feature_layers = list(feature_layers)
        self.projector_width = projector_width
        self.adapter_width = adapter_width
        self.adapter_groups = adapter_groups
        self.adapter_scale = adapter_scale
        self.adapter_temperature = adapter_temperature
        self.adapter_routing = adapter_routing
        self.image_token_id = self.text_config.vocab_size if image_token_id is None else image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


def _config(kind: type[ConfigT], given: ConfigT | dict[str, Any] | None, defaults: dict[str, Any]) -> ConfigT:
    return given if isinstance(given, kind) else kind(**{**defaults, **(given or {})})
