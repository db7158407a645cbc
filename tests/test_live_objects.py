"""Live objects of the authors' own code through optimize(): the structures of InternVL, VILA, LLaVA and Eagle-X5.

Their own methods are called as they are; which tokens are visual, and what comes of that, is the oracle's.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from internlm import with_intern_blocks
from tiny_live import (
    IGNORE,
    IMG,
    TOKENS,
    ChatModel,
    EagleX5,
    OldVila,
    Vila,
    chat_model,
    chat_prompts,
    eagle,
    media_prompts,
    pixels,
    text,
    vila,
)
from tiny_models import (
    LAYERS,
    NEVER,
    assert_relative,
    gate,
    one_thread,  # noqa: F401
    optimized,
    plan,
    random_adapter,
    shared_model,
    tiny,
)
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, export, optimize
from vte_compile.adapters import PIA
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.fingerprint import Fingerprint
from vte_compile.tuning.answered import Answered
from vte_compile.tuning.evaluate import evaluate
from vte_compile.tuning.examine import Examiner, answer_of
from vte_compile.tuning.samples import Sample, read_samples

PARTS = {
    "first": [StaticExit(0)],
    "natural": [gate(1), gate(2)],
    "last": [StaticExit(LAYERS - 1)],
    "never, skip": [gate(1, NEVER), SkippedAttention(2, random_adapter(PIA))],
}
NEW = 16
OPTIONS: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)


def oracle_tokens(llm: Any, planned: Plan, embeds: Tensor, visual: Tensor, mask: Tensor) -> Any:
    return Oracle(llm, planned).generate(embeds, visual_mask=visual, attention_mask=mask.bool(), max_new_tokens=NEW)


def assert_same(tokens: Any, want: Any) -> None:
    assert tokens.tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


@functools.cache
def live(kind: type) -> Any:
    """An object that no test may change."""
    if kind is ChatModel:
        return chat_model(shared_model("qwen2"))
    return eagle() if kind is EagleX5 else vila(shared_model("llama"), kind)


@functools.cache
def _fast(kind: type) -> Any:
    return optimize(live(kind), Plan(), compile=False)


def fast(kind: type, *parts: Any) -> Any:
    """It optimized, of its own class; what is traced is shared by the tests."""
    return optimize(_fast(kind), plan(*parts))


def prompt_of(kind: type) -> Any:
    return chat_prompts() if kind is ChatModel else media_prompts()


def embedded(kind: type, prompt: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The language model of it; embeddings, visual tokens and mask of a prompt, found in the labels by hand."""
    model = live(kind)
    with torch.no_grad():
        if kind is ChatModel:
            visual = prompt.ids == IMG
            return model.language_model, model.merged(prompt.pixels, prompt.ids), visual, prompt.mask
        if kind is Vila:
            embeds, labels, mask = model._embed(prompt.ids, {"image": prompt.pixels}, {}, prompt.ids, prompt.mask)
        else:
            _, _, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
                prompt.ids, None, prompt.mask, None, prompt.ids, prompt.pixels
            )
    visual = (labels == IGNORE) & mask.bool()
    tokens = TOKENS + (kind is Vila)
    assert visual.sum(1).tolist() == [2 * tokens, tokens, 0]
    return getattr(model, "llm", model), embeds, visual, mask


def generate(model: Any, prompt: Any, **options: Any) -> Any:
    """As the authors' scripts call it."""
    options = OPTIONS | options
    if isinstance(model, ChatModel):
        return model.generate(prompt.pixels, prompt.ids, prompt.mask, **options)
    if isinstance(model, Vila):
        return model.generate(prompt.ids, {"image": prompt.pixels}, {}, prompt.mask, **options)
    return model.generate(prompt.ids, images=prompt.pixels, attention_mask=prompt.mask, **options)


KINDS = pytest.mark.parametrize("kind", [ChatModel, Vila, OldVila, EagleX5])


@pytest.mark.parametrize("parts", list(PARTS))
@KINDS
def test_generate_is_the_oracles(kind: type, parts: str) -> None:
    """Rows with two images, one, and none."""
    planned, prompt = plan(*PARTS[parts]), prompt_of(kind)
    want = oracle_tokens(embedded(kind, prompt)[0], planned, *embedded(kind, prompt)[1:])
    assert_same(generate(fast(kind, *PARTS[parts]), prompt), want)


@KINDS
def test_without_exits_it_is_the_model(kind: type) -> None:
    prompt = prompt_of(kind)
    tokens = generate(_fast(kind), prompt)
    assert tokens.tolist() == generate(live(kind), prompt).tolist()
    assert tokens.exit_layer.tolist() == [-1] * 3


@KINDS
def test_the_object_is_not_changed(kind: type) -> None:
    model = live(kind)
    made = fast(kind, StaticExit(1))
    assert isinstance(made, kind)
    assert (type(made).__name__, type(model)) == (kind.__name__, kind)
    assert (made.plan.exits, made.training) == ((StaticExit(1),), False)
    assert not hasattr(model, "plan")
    assert getattr(model, "llm", None) is (shared_model("llama") if hasattr(model, "llm") else None)
    mine, theirs = dict(made.named_parameters()), dict(model.named_parameters())
    assert {name: id(value) for name, value in mine.items()} == {name: id(value) for name, value in theirs.items()}


@KINDS
def test_padded_on_the_right(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(kind)
    if kind is ChatModel:
        real = prompt.mask.bool()
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        prompt.ids, prompt.mask = prompt.ids.gather(1, order), prompt.mask.gather(1, order)
    else:
        monkeypatch.setattr(kind, "side", "right")
    llm, *given = embedded(kind, prompt)
    assert not given[2][1, -1]
    assert_same(generate(fast(kind, *PARTS["natural"]), prompt), oracle_tokens(llm, plan(*PARTS["natural"]), *given))


class Llava(EagleX5):
    """LLaVA's forward() takes no more than it names, and so no cache by the name of transformers 5.24."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        images: Any = None,
        image_sizes: Any = None,
        return_dict: Any = None,
    ) -> Any:
        assert past_key_values is None
        return super().forward(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache
        )


def test_a_forward_without_room_for_more() -> None:
    prompt, planned = media_prompts(), plan(*PARTS["natural"])
    model = eagle()
    model.__class__ = Llava
    made = optimize(model, planned, compile=False)
    want = oracle_tokens(embedded(EagleX5, prompt)[0], planned, *embedded(EagleX5, prompt)[1:])
    assert_same(generate(made, prompt), want)


@KINDS
def test_text_alone(kind: type) -> None:
    ids, made = torch.tensor(text(6)), fast(kind, StaticExit(1))
    media = [None] if kind is ChatModel else []
    options = OPTIONS | (dict(media=None) if kind is Vila else {})
    tokens, want = (model.generate(*media, ids, **options) for model in (made, live(kind)))
    assert tokens.tolist() == want.tolist()
    assert tokens.exit_layer.tolist() == [-1]


@KINDS
def test_beams(kind: type) -> None:
    """A mask has a row for each prompt, embeddings have one for each beam."""
    prompt, made = prompt_of(kind), fast(kind, *PARTS["natural"])
    beams = dict(num_beams=2, num_return_sequences=2, max_new_tokens=5)
    tokens = generate(made, prompt, **beams)
    _, _, visual, _ = embedded(kind, prompt)
    assert tokens.tolist() == generate(made, prompt, visual_mask=visual, **beams).tolist()
    assert tokens.exit_layer.tolist() == generate(made, prompt).exit_layer.repeat_interleave(2).tolist()
    assert tokens.tolist() != generate(live(kind), prompt, **beams).tolist()


@KINDS
def test_a_given_mask_is_taken(kind: type) -> None:
    prompt, made = prompt_of(kind), fast(kind, StaticExit(0))
    visual = embedded(kind, prompt)[2].clone()
    visual[0] = False
    tokens = generate(made, prompt, visual_mask=visual)
    assert tokens.exit_layer.tolist() == [-1, 0, -1]
    with pytest.raises(InputError, match=r"visual_mask: expected a bool tensor of shape"):
        generate(made, prompt, visual_mask=visual[:, 1:])


@KINDS
def test_forward_and_a_second_turn(kind: type) -> None:
    """Both turns bring an image; VILA's older forward() takes no cache, and so has one turn."""
    prompt, made = prompt_of(kind), fast(kind, *PARTS["natural"])
    prompt.ids, prompt.mask, prompt.pixels = prompt.ids[:2], prompt.mask[:2], prompt.pixels[:3]
    llm, embeds, visual, mask = embedded_rows(kind, prompt)
    oracle = Oracle(llm, plan(*PARTS["natural"]))
    want, out = oracle.forward(embeds, visual, mask), call(made, prompt)
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits, want.logits)
    if kind is OldVila:
        return
    _, more, visual, mask = embedded_rows(kind, prompt)
    again = call(made, prompt, past_key_values=out.past_key_values)
    want = oracle.forward(more, visual, mask, cache=want.cache)
    assert again.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(again.logits, want.logits)
    assert again.past_key_values.lengths.T.tolist() == want.cache.lengths()


def embedded_rows(kind: type, prompt: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """`embedded` for rows that all have images."""
    whole = prompt_of(kind)
    llm, embeds, visual, mask = embedded(kind, whole)
    return llm, embeds[:2], visual[:2], mask[:2].bool()


def call(model: Any, prompt: Any, **options: Any) -> Any:
    if isinstance(model, ChatModel):
        return model(prompt.pixels, prompt.ids, prompt.mask, **options)
    if isinstance(model, Vila):
        return model(prompt.ids, {"image": prompt.pixels}, attention_mask=prompt.mask, **options)
    return model(prompt.ids, images=prompt.pixels, attention_mask=prompt.mask, **options)


class OldChatModel(ChatModel):
    def generate(self, pixel_values: Any = None, input_ids: Any = None, **options: Any) -> Any:
        """It hands return_dict on, as code from before transformers 5 does it; generate() there would pass it twice."""
        return super().generate(pixel_values, input_ids, **options, return_dict=None)


@pytest.mark.parametrize("cls", [ChatModel, OldChatModel])
def test_internvl_chat(cls: type) -> None:
    """chat() learns the image token's id late, and calls generate() by name."""
    model, prompt = chat_model(shared_model("qwen2")), chat_prompts()
    model.__class__, model.img_context_token_id = cls, None
    made = optimize(model, plan(StaticExit(1)), compile=False)
    row = prompt.ids[1:2, prompt.mask[1].bool()]
    tokens: Any = made.chat(row, prompt.pixels[:1], dict(OPTIONS))
    assert tokens.exit_layer.tolist() == [1]
    assert tokens.tolist() == made.generate(prompt.pixels[:1], row, **OPTIONS).tolist()
    assert (made.img_context_token_id, model.img_context_token_id) == (IMG, None)
    alone: Any = made.chat(torch.tensor(text(6)), None, dict(OPTIONS))
    assert alone.exit_layer.tolist() == [-1]


def test_an_unknown_placeholder_is_asked_for() -> None:
    model, prompt = fast(ChatModel, StaticExit(1)), chat_prompts()
    model.img_context_token_id = None
    with pytest.raises(InputError, match=r"which tokens are visual is not known.*Pass visual_mask"):
        model.generate(None, prompt.ids, **OPTIONS)


@pytest.mark.parametrize("labels", [None, "given"])
def test_labels_come_back(labels: str | None) -> None:
    """The methods that merge text and images give what they give without optimize()."""
    prompt = media_prompts()
    labels_in = None if labels is None else torch.where(prompt.mask.bool(), prompt.ids + 3, IGNORE)
    for mask in (None, prompt.mask):
        want, got = (
            model._embed(prompt.ids, {"image": prompt.pixels}, {}, labels_in, mask)
            for model in (live(Vila), _fast(Vila))
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        want, got = (
            model.prepare_inputs_labels_for_multimodal(prompt.ids, None, mask, None, labels_in, prompt.pixels)
            for model in (live(EagleX5), _fast(EagleX5))
        )
        assert [each is None for each in got] == [each is None for each in want]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.parametrize("kind", [Vila, EagleX5])
def test_a_loss_is_the_models(kind: type) -> None:
    prompt = media_prompts()
    prompt.ids, prompt.mask, prompt.pixels = prompt.ids[:1], prompt.mask[:1], prompt.pixels[:2]
    labels = prompt.ids.where(prompt.ids > 0, IGNORE)
    with torch.no_grad():
        want = call(live(kind), prompt, labels=labels).loss
        assert_relative(call(_fast(kind), prompt, labels=labels).loss, want)


def test_labels_that_do_not_tell_are_refused() -> None:
    class Other(Vila):
        def merge(self, *args: Any) -> Any:
            embeds, labels, mask = super().merge(*args)
            return embeds, labels.flip(1), mask

    made = optimize(vila(optimized("llama"), Other), plan(StaticExit(1)))
    with pytest.raises(InputError, match=r"_embed\(\) changes labels or their order.*pass visual_mask"):
        generate(made, media_prompts())


def test_encoders_know_the_copy() -> None:
    """And not the object that it was made from, which would stay for them, with all its weights."""
    model, made = live(Vila), fast(Vila)
    assert made.encoders["image"].parent is made
    assert model.encoders["image"].parent is model
    assert _fast(Vila).encoders["image"].parent is _fast(Vila)


@pytest.mark.parametrize("kind", [Vila, EagleX5])
def test_copies_and_folders(kind: type, tmp_path: Path) -> None:
    made, prompt = fast(kind, StaticExit(1)), prompt_of(kind)
    assert call(copy.deepcopy(made), prompt).logits.equal(call(made, prompt).logits)
    made.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).exits == made.plan.exits
    with pytest.raises(InputError, match="for inference"):
        made.train()
    skips = fast(kind, SkippedAttention(2))
    with pytest.raises(InputError, match="weights were freed"):
        skips.save_pretrained(tmp_path / "more")


@KINDS
def test_plans_are_checked_and_made(kind: type) -> None:
    """A plan fits the object if it fits its language model."""
    model = live(kind)
    llm = getattr(model, {ChatModel: "language_model", Vila: "llm", OldVila: "llm"}.get(kind, ""), model)
    assert Fingerprint.of(model) == Fingerprint.of(llm)
    Plan((StaticExit(1),), fingerprint=Fingerprint.of(llm)).check(model)


def test_what_takes_no_live_objects_says_so() -> None:
    for refused in (Examiner, lambda model: Oracle(model, Plan())):
        with pytest.raises(
            UnsupportedModelError, match=r"^ChatModel: .*only vte_compile\.optimize\(\).*language_model"
        ):
            refused(live(ChatModel))
    with pytest.raises(InputError, match=r"export: .*ChatModel.*language_model"):
        export(_fast(ChatModel), "nowhere", target="onnxruntime")


def test_the_backend_knows_the_placeholder() -> None:
    """Dynamo's graph is of the language model in it, which alone would take all ids for text."""
    llm, planned, prompt = tiny(), plan(StaticExit(1)), chat_prompts()
    model = chat_model(llm)
    options = {"plan": planned, "compile": False}
    with torch.no_grad():
        got = torch.compile(model, backend="vte", options=options)(prompt.pixels, prompt.ids, prompt.mask).logits
        visual = prompt.ids == IMG
        want = Oracle(llm, planned).forward(model.merged(prompt.pixels, prompt.ids), visual, prompt.mask).logits
        text_tokens = prompt.mask.bool() & ~visual
        assert_relative(got[text_tokens], want[text_tokens])
        model.img_context_token_id = None
        torch._dynamo.reset()
        with pytest.raises(
            BackendCompilerFailed, match=r"ChatModel does not know its image token's id.*visual_token_ids"
        ):
            torch.compile(model, backend="vte", options=options)(None, prompt.ids, prompt.mask)


def test_samples_of_llava() -> None:
    """calibrate() and the like embed them with the authors' method; answers are the oracle's where there are none."""
    model, prompt = live(EagleX5), media_prompts()
    ids = prompt.ids[:1, prompt.mask[0].bool()]
    answer = [5, 9, 4]
    labels = torch.tensor([[*[IGNORE] * ids.shape[1], *answer]])
    whole = torch.cat([ids, torch.tensor([answer])], 1)
    batches = [{"input_ids": whole, "images": prompt.pixels[:2], "labels": labels}]
    [sample] = read_samples(batches)
    assert sample.answer == tuple(answer)
    examiner = Examiner(model)
    _, embeds, visual, _ = embedded(EagleX5, prompt)
    with torch.no_grad():
        said = model.get_input_embeddings()(torch.tensor([answer[:-1]]))
    given = torch.cat([embeds[:1], said], 1), torch.cat([visual[0], torch.zeros(2, dtype=torch.bool)])
    positions = torch.arange(given[0].shape[1])[None]
    want = examiner.examine_embedded(Answered(*given, torch.tensor(answer), positions))
    got = examiner.examine(sample)
    for field in ("features", "same", "loss", "visual", "tokens"):
        assert torch.equal(getattr(got, field), getattr(want, field))
    own = answer_of(model, Sample.of(sample.inputs, None), NEW)
    assert own.answer == tuple(
        oracle_tokens(model, Plan(), embeds[:1], visual[:1], torch.ones(visual[:1].shape)).tokens[0]
    )
    with pytest.raises(UnsupportedModelError, match=r"EagleX5: generate\(\) of its own code"):
        evaluate(model, batches, {"a": plan(StaticExit(1))})


class GoesAround(ChatModel):
    """Eagle 2.5's forward(), for training: it runs the decoder itself."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Any:
        return self.language_model.model(inputs_embeds=self.merged(pixel_values, input_ids))


def test_code_that_goes_around_the_language_model() -> None:
    torch.manual_seed(1)
    model = GoesAround(live(ChatModel).config, shared_model("qwen2")).eval()
    model.img_context_token_id = IMG
    made = optimize(model, plan(StaticExit(1)), compile=False)
    with pytest.raises(InputError, match=r"GoesAround\.forward\(\) ran nothing of its language_model"):
        made(pixels(3), chat_prompts().ids)
    assert generate(made, chat_prompts()).exit_layer.tolist() == [1, 1, -1]


def test_methods_set_on_the_object_are_refused() -> None:
    for model in (chat_model(shared_model("qwen2")), eagle()):
        model.generate = functools.partial(model.generate)
        with pytest.raises(UnsupportedModelError, match=r"generate was set on the object itself.*del model\.generate"):
            optimize(model, plan(StaticExit(1)))


class Unknown(nn.Module):
    """A whole language model, and code of which nothing is known."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm, self.config = llm, llm.config

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    def generate(self, ids: Tensor) -> None:
        raise AssertionError

    def forward(self, ids: Tensor) -> None:
        raise AssertionError


def test_other_wrappers_are_refused_with_advice() -> None:
    advice = r"Optimize its llm, .*model\.llm = vte_compile\.optimize\(model\.llm, plan\).*visual_mask"
    with pytest.raises(UnsupportedModelError, match=advice):
        optimize(Unknown(shared_model("llama")), plan(StaticExit(1)))


def test_by_hand() -> None:
    """What such objects, too, can do: the language model is an optimized one, and says what it lacks."""
    prompt = media_prompts()
    llm, embeds, visual, mask = embedded(Vila, prompt)
    model = vila(optimized("llama", StaticExit(1)))
    want = oracle_tokens(llm, plan(StaticExit(1)), embeds, visual, mask)
    given = dict(inputs_embeds=embeds, attention_mask=mask, **OPTIONS)
    assert_same(model.llm.generate(visual_mask=visual, **given), want)
    for each in (model, fast(Vila, StaticExit(1))):
        with pytest.raises(InputError, match=r"which tokens are visual is not known.*Pass visual_mask"):
            each.llm.generate(**given)
    assert_same(generate(model, prompt, visual_mask=visual), want)


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
