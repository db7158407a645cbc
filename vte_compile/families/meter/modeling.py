"""METER's models, of transformers' parts: CLIP's image encoder, RoBERTa, BridgeTower's co-attention layers.

    x = text_transform(RoBERTa(text)) + type 0        y = image_transform(LN_post(CLIP(image))) + type 1 (or 2)
    for each level:   x, y = text_layer(x, y), image_layer(y, x)
    pooled = [tanh(W_text x_0) ; tanh(W_image y_0)]

Source: "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv 2111.02387; parameters are
named as in the authors' checkpoints where the parts allow it (vte_compile/families/meter/checkpoint.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PreTrainedModel, RobertaModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bridgetower.modeling_bridgetower import (
    BridgeTowerBertCrossLayer,
    BridgeTowerModelOutput,
    BridgeTowerPooler,
)
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from vte_compile.errors import InputError
from vte_compile.families.meter.configuration import MeterConfig


class MeterPreTrainedModel(PreTrainedModel):
    """What METER's models share."""

    config: MeterConfig
    config_class = MeterConfig
    base_model_prefix = "meter"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
        elif isinstance(module, MeterModel) and module.token4classifier is not None:
            init.zeros_(module.token4classifier)


class MeterVisionModel(nn.Module):
    """CLIP's image encoder; what leaves it is normed for all tokens, not for the class token alone."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 1 + patches, hidden size of the encoder]; the class token comes first."""
        embedded = self.pre_layernorm(self.embeddings(pixel_values))
        normed: Tensor = self.post_layernorm(self.encoder(inputs_embeds=embedded).last_hidden_state)
        return normed


class MeterModel(MeterPreTrainedModel):
    """METER without a head."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        cross_modal = config.cross_modal_config
        size = cross_modal.hidden_size
        for part in (config.vision_config, cross_modal):  # whose modules are no models, which would see to it
            if part._attn_implementation is None:
                part._attn_implementation = self.config._attn_implementation
        self.text_transformer = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vit_model = MeterVisionModel(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, size)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, size)
        self.token_type_embeddings = nn.Embedding(1 + config.num_images, size)
        self.token4classifier = nn.Parameter(torch.zeros(1, 1, size)) if config.classification_token else None
        self.cross_modal_text_layers = self._layers()
        self.cross_modal_image_layers = self._layers()
        self.cross_modal_text_pooler = BridgeTowerPooler(cross_modal)
        self.cross_modal_image_pooler = BridgeTowerPooler(cross_modal)
        self.post_init()

    def _layers(self) -> nn.ModuleList:
        config = self.config.cross_modal_config
        layers = [BridgeTowerBertCrossLayer(config) for _ in range(config.num_hidden_layers)]
        for layer in layers:
            layer.attention.self.is_causal = False  # which it else is to SDPA when there is no mask
        return nn.ModuleList(layers)

    def get_input_embeddings(self) -> nn.Module:
        """RoBERTa's word embeddings."""
        embeddings: nn.Module = self.text_transformer.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_token_type: int = 1,
    ) -> BridgeTowerModelOutput:
        """Encode texts with images.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding; None: no padding.
            pixel_values: [B, 3, H, W], normalized as for CLIP.
            image_token_type: Which image it is, 1 or, with NLVR2, 2.

        Returns:
            ``text_features`` [B, T, C], ``image_features`` [B, 1 + patches, C] and ``pooler_output`` [B, 2C].

        Raises:
            InputError: No image, or not one for each text.
        """
        if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[0] != input_ids.shape[0]:
            got = None if pixel_values is None else list(pixel_values.shape)
            raise InputError(
                f"pixel_values: expected an image for each of the {input_ids.shape[0]} texts, [B, 3, H, W], got {got}."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text = self.text_transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
        text = self.cross_modal_text_transform(text)
        if self.token4classifier is not None:
            text = torch.cat([self.token4classifier.expand(text.shape[0], -1, -1), text[:, 1:]], dim=1)
        image = self.cross_modal_image_transform(self.vit_model(pixel_values))
        types = self.token_type_embeddings.weight
        x, y = text + types[0], image + types[image_token_type]
        # The authors' number; softmax makes it 0 as it does more negative ones, which float16 does not have.
        hidden = (1 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x, y = (
                text_layer(x, y, attention_mask=hidden, encoder_attention_mask=None)[0],
                image_layer(y, x, attention_mask=None, encoder_attention_mask=hidden)[0],
            )
        pooled = torch.cat([self.cross_modal_text_pooler(x), self.cross_modal_image_pooler(y)], dim=-1)
        return BridgeTowerModelOutput(text_features=x, image_features=y, pooler_output=pooled)


def _classifier(inputs: int, hidden: int, labels: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, labels))


class _MeterClassifier(MeterPreTrainedModel):
    """A classifier of one text with one image."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        size = 2 * config.cross_modal_config.hidden_size
        self.meter = MeterModel(config)
        self.classifier = _classifier(size, size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """``logits`` [B, labels]; arguments as of :class:`MeterModel`."""
        pooled = self.meter(input_ids, attention_mask, pixel_values).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class MeterForQuestionAnswering(_MeterClassifier):
    """METER for VQAv2: ``logits`` [B, answers]; each answer's score is its sigmoid."""


class MeterForVisualEntailment(_MeterClassifier):
    """METER for SNLI-VE: ``logits`` [B, 3]."""


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """METER for NLVR2: ``logits`` [B, 2], whether a text is true of two images."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        size = config.cross_modal_config.hidden_size
        self.meter = MeterModel(config)
        self.classifier = _classifier(2 * size * config.num_images, 2 * size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """``logits`` [B, labels].

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            pixel_values: [B, images, 3, H, W].

        Raises:
            InputError: Not that many images.
        """
        images = self.config.num_images
        if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != images:
            got = None if pixel_values is None else list(pixel_values.shape)
            raise InputError(
                f"pixel_values: expected {images} images for each text, [B, {images}, 3, H, W], got {got}."
            )
        pooled: list[Any] = [
            self.meter(input_ids, attention_mask, pixel_values[:, i], image_token_type=1 + i).pooler_output
            for i in range(images)
        ]
        return SequenceClassifierOutput(logits=self.classifier(torch.cat(pooled, dim=-1)))


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """METER for retrieval: ``logits`` [B, 1], how well each text fits its image, to rank by."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.cross_modal_config.hidden_size, 1)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """``logits`` [B, 1]; arguments as of :class:`MeterModel`."""
        pooled = self.meter(input_ids, attention_mask, pixel_values).pooler_output
        return SequenceClassifierOutput(logits=self.rank_output(pooled))
