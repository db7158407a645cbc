"""Tiny models with code of their own, as it lies beside checkpoints: the structure of InternVL's, VILA's, Eagle-X5's.

Their generate() makes embeddings and hands them, with whatever else it is given, to a causal language model. The
classes here have that structure and that code's names; what they compute from pixels does not matter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import TINY, C
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IMG, MEDIA, IGNORE = 58, -200, -100
TOKENS = 4
"""Of each image."""


class Encoder(nn.Module):
    """Features [images, 4, C] of images [images, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, C, 4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).flatten(2).mT


class ChatModel(PreTrainedModel):
    """InternVLChatModel: a placeholder for each visual token; its id comes from the tokenizer, in chat()."""

    config_class = LlamaConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LlamaConfig, language_model: Any) -> None:
        super().__init__(config)
        self.vision_model, self.language_model, self.img_context_token_id = Encoder(), language_model, None

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model(pixel_values)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Any = None,
    ) -> CausalLMOutputWithPast:
        """No place for anything else, and what it returns is made anew."""
        outputs = self.language_model(
            inputs_embeds=self.merged(pixel_values, input_ids),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return CausalLMOutputWithPast(logits=outputs.logits, past_key_values=outputs.past_key_values)

    def merged(self, pixel_values: Tensor | None, input_ids: Tensor) -> Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            embeds[input_ids == self.img_context_token_id] = self.extract_feature(pixel_values).flatten(0, 1)
        return embeds

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        return self.language_model.generate(
            inputs_embeds=self.merged(pixel_values, input_ids),
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    def chat(self, ids: Tensor, pixel_values: Tensor, generation_config: dict[str, Any]) -> Tensor:
        """The tokens of an answer (the authors' takes and gives text)."""
        self.img_context_token_id = IMG
        mask = torch.ones_like(ids)
        return self.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, **generation_config)


class MergesMedia:
    """How VILA and LLaVA's relatives put all tokens of an image where its one placeholder is."""

    side = "left"

    def merge(self, embed: nn.Module, features: Tensor, ids: Tensor, labels: Tensor | None, mask: Tensor | None) -> Any:
        """Embeddings [B, T', C], labels (-100 at visual tokens and padding) and mask [B, T'], padded on one side."""
        labels = torch.full_like(ids, IGNORE) if labels is None else labels
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        images, rows = list(features), []
        for row, known, keep in zip(ids, labels, real, strict=True):
            parts, marks = [], []
            for token, label in zip(row[keep], known[keep], strict=True):
                is_media = int(token) == MEDIA
                parts.append(images.pop(0) if is_media else embed(token[None]))
                marks += [IGNORE] * len(parts[-1]) if is_media else [int(label)]
            rows.append((torch.cat(parts), torch.tensor(marks)))
        longest = max(len(marks) for _, marks in rows)
        embeds, mask = torch.zeros(len(rows), longest, C), torch.zeros(len(rows), longest, dtype=torch.bool)
        merged = torch.full((len(rows), longest), IGNORE)
        for b, (row, marks) in enumerate(rows):
            at = slice(longest - len(marks), None) if self.side == "left" else slice(len(marks))
            embeds[b, at], merged[b, at], mask[b, at] = row, marks, True
        return embeds, merged, mask


class ImageEncoder(nn.Module):
    """Of VILA: it knows its model, and is no submodule of it. A line break of text stands behind the features."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self._parent = [parent]

    @property
    def parent(self) -> Any:
        return self._parent[0]

    def forward(self, images: Tensor) -> Tensor:
        features = self.parent.mm_projector(self.parent.vision_tower(images))
        line = self.parent.llm.model.embed_tokens(torch.tensor([7])).expand(len(features), -1, -1)
        return torch.cat([features, line], 1)


class Vila(MergesMedia, PreTrainedModel):
    """LlavaLlamaModel of VILA: no get_decoder() of its own, the head of its llm, forward() with **kwargs."""

    config_class = LlamaConfig
    main_input_name = "input_embeds"

    def __init__(self, config: LlamaConfig, llm: Any) -> None:
        super().__init__(config)
        self.llm, self.vision_tower, self.mm_projector = llm, Encoder(), nn.Linear(C, C)
        self.encoders = {"image": ImageEncoder(self)}

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def _embed(
        self,
        input_ids: Tensor,
        media: Any,
        media_config: Any,
        labels: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Any:
        features = self.encoders["image"](media["image"]) if media else torch.empty(0)
        return self.merge(self.llm.model.embed_tokens, features, input_ids, labels, attention_mask)

    def forward(
        self, input_ids: Any = None, media: Any = None, inputs_embeds: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if inputs_embeds is None:
            mask = kwargs.get("attention_mask")
            inputs_embeds, labels, kwargs["attention_mask"] = self._embed(input_ids, media, {}, labels, mask)
        return self.llm(inputs_embeds=inputs_embeds, labels=labels, **kwargs)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Any = None,
        media: Any = None,
        media_config: Any = None,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        embeds, _, mask = self._embed(input_ids, media, media_config, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **generation_kwargs)


class Prepares(MergesMedia):
    """LLaVA's way, which Eagle-X5 and the first VILA have, too."""

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Any,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | None,
        image_sizes: Any = None,
    ) -> Any:
        """What was not given is not returned."""
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        embed: Any = self.get_input_embeddings()
        embeds, marks, mask = self.merge(embed, self.encode_images(images), input_ids, labels, attention_mask)
        marks, mask = None if labels is None else marks, None if attention_mask is None else mask.long()
        return None, position_ids, mask, past_key_values, embeds, marks


class OldVila(Prepares, PreTrainedModel):
    """LlavaLlamaModel of the first VILA: a language model in it as in VILA, and LLaVA's method."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, llm: Any) -> None:
        super().__init__(config)
        self.llm, self.vision_tower, self.mm_projector = llm, Encoder(), nn.Linear(C, C)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.mm_projector(self.vision_tower(images))

    def forward(self, input_ids: Tensor, images: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        ids, _, mask, _, embeds, labels = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, labels, images
        )
        return self.llm(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, labels=labels)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, images: Any = None, attention_mask: Any = None, **generation_kwargs: Any
    ) -> Any:
        if images is None:
            embeds = self.llm.model.embed_tokens(input_ids)
        else:
            _, _, attention_mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                input_ids, None, attention_mask, None, None, images
            )
        embeds = embeds.to(self.llm.dtype)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **generation_kwargs)


class EagleModel(LlamaModel):
    """Several encoders, their features side by side, inside the decoder itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.vision_tower, self.mm_projector = nn.ModuleList([Encoder(), Encoder()]), nn.Linear(2 * C, C)


class EagleX5(Prepares, LlamaForCausalLM):
    """EagleLlamaForCausalLM: a causal language model that makes embeddings itself (LLaVA's original code too)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = EagleModel(config)
        self.post_init()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.model.mm_projector(torch.cat([tower(images) for tower in self.model.vision_tower], -1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = input_ids, position_ids, attention_mask, past_key_values, labels
        if inputs_embeds is None:
            *given, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(*given, images, image_sizes)
        return super().forward(
            input_ids=given[0],
            attention_mask=given[2],
            position_ids=given[1],
            past_key_values=given[3],
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs: Any = None, images: Any = None, image_sizes: Any = None, **kwargs: Any) -> Any:
        positions, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is None:
            embeds = self.model.embed_tokens(inputs)
        else:
            _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, positions, mask, None, None, images, image_sizes
            )
        return super().generate(position_ids=positions, attention_mask=mask, inputs_embeds=embeds, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        images, sizes = kwargs.pop("images", None), kwargs.pop("image_sizes", None)
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return inputs | {k: v for k, v in dict(images=images, image_sizes=sizes).items() if v is not None}


def pixels(images: int) -> Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def text(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]


def chat_prompts() -> SimpleNamespace:
    """Two images, one, and none, padded on the left."""
    a, b, c, d, e, f = text(2, 1, 3, 4, 2, 9)
    image = [IMG] * TOKENS
    return _padded([a + image + b + image + c, d + image + e, f], images=3)


def media_prompts() -> SimpleNamespace:
    """The same with one placeholder for an image."""
    a, b, c, d, e, f = text(2, 1, 3, 4, 2, 9)
    return _padded([[*a, MEDIA, *b, MEDIA, *c], [*d, MEDIA, *e], f], images=3)


def _padded(rows: list[list[int]], images: int) -> SimpleNamespace:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return SimpleNamespace(ids=ids, mask=mask, pixels=pixels(images))


def chat_model(llm: Any) -> ChatModel:
    torch.manual_seed(1)
    model = ChatModel(LlamaConfig(**TINY), llm).eval()
    model.img_context_token_id = IMG
    return model


def vila(llm: Any, kind: type = Vila) -> Any:
    torch.manual_seed(1)
    return kind(LlamaConfig(**TINY), llm).eval()


def eagle() -> EagleX5:
    torch.manual_seed(1)
    return EagleX5(LlamaConfig(**TINY)).eval()
