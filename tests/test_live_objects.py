"""Models with code of their own, as it lies beside checkpoints: classes of the shape of InternVL's, VILA's, Eagle-X5's.

Their generate() makes embeddings and hands them, with whatever else it is given, to a causal language model. The
classes here have that structure and that code's names; what they compute from pixels does not matter.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from internlm import with_intern_blocks
from tiny_models import (
    NEVER,
    TINY,
    C,
    gate,
    one_thread,  # noqa: F401
    optimized,
    plan,
    random_adapter,
    shared_model,
    tiny,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA
from vte_compile.errors import InputError, UnsupportedModelError

IMG, MEDIA, IGNORE = 58, -200, -100
TOKENS = 4
"""Of each image."""
PARTS = {
    "first": [StaticExit(0)],
    "natural": [gate(1), gate(2)],
    "never, skip": [gate(1, NEVER), SkippedAttention(2, random_adapter(PIA))],
}
NEW = 6
OPTIONS: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)


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

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None
    ) -> Any:
        raise AssertionError("for training")

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeds[input_ids == self.img_context_token_id] = self.vision_model(pixel_values).flatten(0, 1)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
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

    @staticmethod
    def merge(embed: nn.Module, features: Tensor, ids: Tensor, labels: Tensor | None, mask: Tensor | None) -> Any:
        """Embeddings [B, T', C], labels (-100 at visual tokens and padding) and mask [B, T'], padded on the left."""
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
            at = slice(longest - len(marks), None)
            embeds[b, at], merged[b, at], mask[b, at] = row, marks, True
        return embeds, merged, mask


class Vila(MergesMedia, PreTrainedModel):
    """LlavaLlamaModel of VILA: no get_decoder() of its own, the head of its llm, forward() with **kwargs."""

    config_class = LlamaConfig
    main_input_name = "input_embeds"

    def __init__(self, config: LlamaConfig, llm: Any) -> None:
        super().__init__(config)
        self.llm, self.vision_tower, self.mm_projector = llm, Encoder(), nn.Linear(C, C)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def _embed(self, ids: Tensor, media: Any, media_config: Any, labels: Tensor | None, mask: Tensor | None) -> Any:
        features = self.mm_projector(self.vision_tower(media["image"]))
        return self.merge(self.llm.model.embed_tokens, features, ids, labels, mask)

    def forward(
        self, input_ids: Any = None, media: Any = None, inputs_embeds: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds, labels, kwargs["attention_mask"] = self._embed(input_ids, media, {}, labels, None)
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


class EagleModel(LlamaModel):
    """Several encoders, their features side by side, inside the decoder itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.vision_tower, self.mm_projector = nn.ModuleList([Encoder(), Encoder()]), nn.Linear(2 * C, C)


class EagleX5(MergesMedia, LlamaForCausalLM):
    """EagleLlamaForCausalLM: a causal language model that makes embeddings itself (LLaVA's original code too)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = EagleModel(config)
        self.post_init()

    def prepare_inputs_labels_for_multimodal(
        self, ids: Tensor, positions: Any, mask: Tensor | None, cache: Any, labels: Any, images: Any, sizes: Any = None
    ) -> Any:
        if images is None:
            return ids, positions, mask, cache, None, labels
        features = self.model.mm_projector(torch.cat([tower(images) for tower in self.model.vision_tower], -1))
        embeds, labels, mask = self.merge(self.model.embed_tokens, features, ids, labels, mask)
        return None, positions, mask, cache, embeds, labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, _, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids,
                    position_ids,
                    attention_mask,
                    None,
                    labels,
                    images,  # type: ignore[arg-type]
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
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


def vila(llm: Any) -> Vila:
    torch.manual_seed(1)
    return Vila(LlamaConfig(**TINY), llm).eval()


def eagle() -> EagleX5:
    torch.manual_seed(1)
    return EagleX5(LlamaConfig(**TINY)).eval()


def oracle_tokens(llm: Any, planned: Plan, embeds: Tensor, visual: Tensor, mask: Tensor) -> Any:
    return Oracle(llm, planned).generate(embeds, visual_mask=visual, attention_mask=mask.bool(), max_new_tokens=NEW)


def assert_same(tokens: Any, want: Any) -> None:
    assert tokens.tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


def fast_llm(name: str, planned: Plan) -> Any:
    """`shared_model(name)` optimized; what is traced is shared by the tests."""
    return optimize(optimized(name), planned)


@functools.cache
def fast_eagle() -> Any:
    """Traced once."""
    return optimize(eagle(), Plan(), compile=False)


@pytest.mark.parametrize("parts", list(PARTS))
def test_internvl(parts: str) -> None:
    llm, planned, prompt = shared_model("qwen2"), plan(*PARTS[parts]), chat_prompts()
    model = chat_model(fast_llm("qwen2", planned))
    visual = prompt.ids == model.img_context_token_id
    tokens = model.generate(prompt.pixels, prompt.ids, prompt.mask, visual_mask=visual, **OPTIONS)
    with torch.no_grad():
        embeds = llm.get_input_embeddings()(prompt.ids)
        embeds[visual] = model.vision_model(prompt.pixels).flatten(0, 1)
    assert_same(tokens, oracle_tokens(llm, planned, embeds, visual, prompt.mask))


def test_internvl_chat() -> None:
    """chat() makes the ids itself and calls generate() by name: that can look for the image token."""
    prompt, planned = chat_prompts(), plan(StaticExit(1))
    model = chat_model(fast_llm("qwen2", planned))
    model.img_context_token_id = None
    generate = model.generate

    def generate_with_mask(input_ids: Tensor, **options: Any) -> Tensor:
        return generate(input_ids=input_ids, visual_mask=input_ids == model.img_context_token_id, **options)

    row = prompt.ids[1:2, prompt.mask[1].bool()]
    with pytest.raises(InputError, match=r"which tokens are visual is not known.*Pass visual_mask"):
        model.chat(row, prompt.pixels[:1], dict(OPTIONS))
    model.generate = generate_with_mask
    tokens: Any = model.chat(row, prompt.pixels[:1], dict(OPTIONS))
    want = model.generate(input_ids=row, pixel_values=prompt.pixels[:1], **OPTIONS)
    assert tokens.exit_layer.tolist() == [1]
    assert tokens.tolist() == want.tolist()
    alone: Any = model.chat(torch.tensor(text(6)), None, dict(OPTIONS))  # type: ignore[arg-type]
    assert alone.exit_layer.tolist() == [-1]


@pytest.mark.parametrize("parts", list(PARTS))
def test_vila(parts: str) -> None:
    llm, planned, prompt = shared_model("llama"), plan(*PARTS[parts]), media_prompts()
    model = vila(llm)
    media = {"image": prompt.pixels}
    with torch.no_grad():
        embeds, labels, mask = model._embed(prompt.ids, media, {}, prompt.ids, prompt.mask)
    visual = (labels == IGNORE) & mask
    assert visual.sum(1).tolist() == [2 * TOKENS, TOKENS, 0]
    want = oracle_tokens(llm, planned, embeds, visual, mask)
    model.llm = fast_llm("llama", planned)
    assert_same(model.generate(prompt.ids, media, {}, prompt.mask, visual_mask=visual, **OPTIONS), want)
    # What it handed on, handed on directly: the images are looked at once.
    assert_same(model.llm.generate(inputs_embeds=embeds, attention_mask=mask, visual_mask=visual, **OPTIONS), want)


@pytest.mark.parametrize("parts", list(PARTS))
def test_eagle_x5(parts: str) -> None:
    model, planned, prompt = eagle(), plan(*PARTS[parts]), media_prompts()
    with torch.no_grad():
        prepared = model.prepare_inputs_labels_for_multimodal(
            prompt.ids, None, prompt.mask, None, prompt.ids, prompt.pixels
        )
    _, _, mask, _, embeds, labels = prepared
    visual = (labels == IGNORE) & mask
    assert visual.sum(1).tolist() == [2 * TOKENS, TOKENS, 0]
    want = oracle_tokens(model, planned, embeds, visual, mask)
    fast = optimize(fast_eagle(), planned)
    tokens = fast.generate(prompt.ids, images=prompt.pixels, attention_mask=prompt.mask, visual_mask=visual, **OPTIONS)
    assert_same(tokens, want)


def test_eagle_x5_forward() -> None:
    """It takes embeddings; pixels are refused, with what to do."""
    fast, prompt = optimize(fast_eagle(), plan(StaticExit(1))), media_prompts()
    with pytest.raises(InputError, match=r"^EagleX5: .*no images: pass inputs_embeds and visual_mask, or .*generate"):
        fast(input_ids=prompt.ids, images=prompt.pixels)
    alone = torch.tensor(text(6))
    tokens: Any = fast.generate(alone, visual_mask=torch.zeros_like(alone, dtype=torch.bool), **OPTIONS)
    assert tokens.tolist() == eagle().generate(alone, **OPTIONS).tolist()


@pytest.mark.parametrize("name", ["language_model", "llm"])
def test_wrappers_are_refused_with_advice(name: str) -> None:
    model = {"language_model": chat_model, "llm": vila}[name](shared_model("llama"))
    advice = rf"Optimize its {name}, .*model\.{name} = vte_compile\.optimize\(model\.{name}, plan\).*visual_mask"
    with pytest.raises(UnsupportedModelError, match=advice):
        optimize(model, plan(StaticExit(1)))


class OwnRotary(nn.Module):
    """Its attention keeps the frequencies, as remote code does."""

    def __init__(self, attention: nn.Module, rotary_emb: nn.Module) -> None:
        super().__init__()
        self.inner, self.rotary_emb = attention, rotary_emb


def test_internlm2_of_remote_code_is_refused() -> None:
    """No advice to optimize its language model: that one cannot be."""
    llm = with_intern_blocks(tiny())
    for layer in llm.model.layers:
        layer.attention = OwnRotary(layer.attention, llm.model.rotary_emb)
    del llm.model.rotary_emb
    for model in (llm, chat_model(llm)):
        with pytest.raises(UnsupportedModelError, match=r"rotary positions in every layer \(layers\.0\.") as raised:
            optimize(model, plan(StaticExit(1)))
        assert "optimize(model." not in str(raised.value)
