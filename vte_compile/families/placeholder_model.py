"""transformers' LLaVA with other vision features: what our own model classes (VILA, Eagle) share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from vte_compile.errors import InputError


class PlaceholderModel(LlavaModel):
    """LLaVA's model whose placeholder id need not be in the vocabulary of its embeddings.

    Tokenizers of published checkpoints may hold more ids than there are embeddings: those of media, which never need
    one. Subclasses say what the features of an image are, in ``image_features``.
    """

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, tokens, C]."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """The visual tokens of each image, as transformers' families give them: ``pooler_output``, one [tokens, C]
        each.

        Raises:
            InputError: Options of LLaVA's that stand in the config here.
        """
        _refuse(options)
        visual: Any = list(self.image_features(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=visual)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LlavaModel; what it returns holds nothing of the images.

        Raises:
            InputError: Images and placeholders do not fit together, or options that stand in the config here.
        """
        _refuse(kwargs)
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(pixel_values)
        if input_ids is not None and inputs_embeds is None:
            places = input_ids == self.config.image_token_id
            embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
            input_ids, inputs_embeds = None, embeds if encoded is None else _merge(embeds, places, encoded)
        elif encoded is not None:
            raise InputError("Images need input_ids, which say where their tokens are; with inputs_embeds they cannot.")
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


def _refuse(options: dict[str, Any]) -> None:
    names = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
    if given := [name for name in names if options.get(name) is not None]:
        raise InputError(f"{', '.join(given)}: not an option of this model; its config says how images are encoded.")


def _merge(embeds: Tensor, places: Tensor, encoded: Any) -> Tensor:
    """Features in the order of their placeholders, row by row."""
    features = torch.cat(list(encoded.pooler_output)).to(embeds.device, embeds.dtype)
    if not torch.compiler.is_compiling() and len(features) != int(places.sum()):
        raise InputError(
            f"{len(encoded.pooler_output)} images make {len(features)} visual tokens, but input_ids hold "
            f"{int(places.sum())} placeholders: use the model's processor, which writes as many as there are tokens."
        )
    return embeds.masked_scatter(places[..., None], features)
