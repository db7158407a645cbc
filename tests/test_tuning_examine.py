"""Examined samples: features, labels and losses are those of the authors' code, and of the oracle's static exits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_models import (
    DATA,
    IMAGE,
    IMAGE_TOKENS,
    LAYERS,
    NEVER,
    TINY,
    VOCAB,
    C,
    gate,
    image_prompt,
    load_golden,
    one_thread,  # noqa: F401
    optimized,
    plan,
    random_adapter,
    shared_model,
    tiny,
    tiny_llava,
)

from vte_compile import KeptAdapter, Plan, SkippedAttention
from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.oracle import Oracle, embed
from vte_compile.plan import StaticExit
from vte_compile.tuning import examine as module
from vte_compile.tuning.answered import Answered
from vte_compile.tuning.examine import Examined, Examiner, answer_of, examine
from vte_compile.tuning.samples import Sample

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


def sample(layout="tittt", answer=(7, 3, 11, 5), seed=0, name="sample"):
    """A sample of the tiny LLaVA; i is an image."""
    ids, pixels, mask = image_prompt(layout, seed=seed)
    return Sample.of({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}, answer, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_golden(dtype):
    models, _, image = load_golden()
    data = np.load(DATA / "dyvte_train_gate.npz")
    suffix = ".f64" if dtype == torch.float64 else ".f32"
    examiner = Examiner(models[dtype])
    parts = []
    for row, length in enumerate(data["attention_mask"].sum(1)):
        embeds = torch.from_numpy(data["inputs_embeds"][row : row + 1, : length - 1]).to(dtype)
        labels = torch.from_numpy(data["labels"][row])
        visual = torch.zeros(length - 1, dtype=torch.bool)
        visual[image] = True
        positions = torch.arange(length - 1)[None]
        parts.append(examiner.examine_embedded(Answered(embeds, visual, labels[labels != -100], positions)))
    examined = Examined.concatenate(parts)

    def close(actual, key):
        expected = torch.from_numpy(data[key + suffix])
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    close(examined.features.transpose(0, 1), "feat")
    close(examined.loss[:, :-1].T, "exit_ce")
    close(examined.loss[:, -1:].T.expand(6, -1), "full_ce")
    assert torch.equal(examined.may_exit().T.long(), torch.from_numpy(data["gate_labels"]))
    assert examined.visual.tolist() == [576] * 3
    assert examined.tokens.tolist() == (data["attention_mask"].sum(1) - data["answer_lengths"]).tolist()


@pytest.mark.parametrize("tokens_at_once", [4096, 1], ids=["all-branches", "few-branches"])
@pytest.mark.parametrize("layout", ["tittt", "titittt", "iittttttttttttt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_oracle(layout, attention, tokens_at_once, monkeypatch):
    """Every static exit, at the answer's positions, and what gates of the prompt alone read."""
    monkeypatch.setattr(module, "_BRANCH_TOKENS", tokens_at_once)
    monkeypatch.setattr(module, "_LOGIT_ROWS", 3)
    model = tiny_llava(attn_implementation=attention)
    given = sample(layout)
    examined = examine(model, given)
    ids, pixels = given.inputs["input_ids"], given.inputs["pixel_values"]
    watching = Oracle(model, plan(*[gate(k, NEVER) for k in range(LAYERS)]))
    features = watching.forward(*embed(model, ids, pixels)).gate_features
    answer = torch.tensor(given.answer)
    embeds = embed(model, torch.cat([ids, answer[None, :-1]], 1), pixels)
    plans = [plan(StaticExit(k)) for k in range(LAYERS)] + [Plan()]
    logits = [Oracle(model, each).forward(*embeds).logits[0, -len(answer) :] for each in plans]
    for k in range(LAYERS):
        torch.testing.assert_close(examined.features[0, k], features[k][0], rtol=5e-5, atol=5e-5)
        assert examined.same[0, k] == (logits[k].argmax(-1) == logits[-1].argmax(-1)).float().mean()
    expected = torch.stack([F.cross_entropy(each, answer) for each in logits])
    torch.testing.assert_close(examined.loss[0], expected, rtol=5e-5, atol=5e-5)
    assert (examined.loss[0, 0] - examined.loss[0, -1]).abs() > 1e-3  # an exit changes something
    assert examined.visual.tolist() == [layout.count("i") * IMAGE_TOKENS]
    assert examined.tokens.tolist() == [ids.shape[1]]
    assert {value.dtype for value in (examined.features, examined.same, examined.loss)} == {torch.float32}


BASES = {
    "skips": plan(SkippedAttention(0), SkippedAttention(2)),
    "adapters": plan(SkippedAttention(1, random_adapter(PIA, 1)), KeptAdapter(2, random_adapter(PlainAdapter, 2))),
}
BASES["companion"] = Plan(
    skips=[SkippedAttention(layer, random_adapter(PIA, layer)) for layer in (1, 3)],
    adapters=BASES["adapters"].adapters,
    companion=torch.linspace(-2, 2, C),
)


@pytest.mark.parametrize("tokens_at_once", [1, 4096])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_exits_on_top_of_skips_and_adapters_equal_the_oracle(base, tokens_at_once, monkeypatch):
    """What an adapter knows is of the prompt: so prompt and answer are two chunks of the oracle's."""
    monkeypatch.setattr(module, "_BRANCH_TOKENS", tokens_at_once)
    model, given = shared_model("llava"), sample("tittt", (7, 3, 11, 5, 9, 2, 8, 6))
    examined = Examiner(model, base).examine(given)
    ids, pixels = given.inputs["input_ids"], given.inputs["pixel_values"]
    answer = torch.tensor(given.answer)
    said = model.get_input_embeddings()(answer[None, :-1])

    def logits_of(each):
        oracle = Oracle(model, each)
        prompt = oracle.forward(*embed(model, ids, pixels))
        return torch.cat([prompt.logits[0, -1:], oracle.forward(said, cache=prompt.cache).logits[0]])

    watching = Oracle(model, dataclasses.replace(base, exits=[gate(k, NEVER) for k in range(LAYERS)]))
    features = watching.forward(*embed(model, ids, pixels)).gate_features
    full = logits_of(Plan()).argmax(-1)
    logits = [logits_of(dataclasses.replace(base, exits=[StaticExit(k)])) for k in range(LAYERS)] + [logits_of(base)]
    for k in range(LAYERS):
        torch.testing.assert_close(examined.features[0, k], features[k][0], rtol=5e-5, atol=5e-5)
        assert examined.same[0, k] == (logits[k].argmax(-1) == full).float().mean()
    expected = torch.stack([F.cross_entropy(each, answer) for each in logits])
    torch.testing.assert_close(examined.loss[0], expected, rtol=5e-5, atol=5e-5)
    assert examined.same[0, -1] < 1  # what is skipped changes an answer, without any exit


def test_a_base_has_no_exits():
    with pytest.raises(InputError, match="base: has exits"):
        Examiner(shared_model("llava"), plan(StaticExit(1)))


def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=tiny_llava().config.vision_config,
        text_config=hf.LlamaConfig(**TINY),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return hf.LlavaNextForConditionalGeneration(config), 14, torch.randn(1, 3, 3, 8, 8)


def internvl():
    vision = hf.InternVLVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = hf.Qwen2Config(**TINY)
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_ratio=0.5)
    return hf.InternVLForConditionalGeneration(config), 8, torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("family", [llava_next, internvl])
def test_other_families(family):
    torch.manual_seed(0)
    model, visual_tokens, pixels = family()
    extra = {"image_sizes": torch.tensor([[8, 16]])} if family is llava_next else {}
    ids = torch.tensor([[5, *[IMAGE] * visual_tokens, 6, 7, 8]])
    given = Sample.of({"input_ids": ids, "pixel_values": pixels, **extra}, (3, 4, 9))
    examined = examine(model.eval(), given)
    embeds = embed(model, torch.cat([ids, torch.tensor([[3, 4]])], 1), pixels, **extra)
    for k in range(LAYERS):
        logits = Oracle(model, plan(StaticExit(k))).forward(*embeds).logits[0, -3:]
        expected = F.cross_entropy(logits, torch.tensor(given.answer))
        torch.testing.assert_close(examined.loss[0, k], expected, rtol=5e-5, atol=5e-5)
    assert examined.visual.tolist() == [visual_tokens]


def test_labels_are_the_papers():
    examined = Examined(
        features=torch.zeros(2, 2, 4),
        same=torch.tensor([[0.995, 1.0], [0.99, 1.0]]),
        loss=torch.tensor([[1.02, 1.04, 1.0], [0.5, 0.5, 1.0]]),
        visual=torch.tensor([4, 4]),
        tokens=torch.tensor([9, 9]),
    )
    assert examined.may_exit().tolist() == [[True, False], [False, True]]
    assert examined.may_exit(slack=0.02).tolist() == [[True, True], [False, True]]
    assert examined.unchanged.tolist() == [[False, True], [False, True]]
    both = Examined.concatenate([examined, examined])
    assert both.loss.shape == (4, 3)
    assert both.tokens.tolist() == [9] * 4


def test_own_answer_is_generates():
    model = shared_model("llava")
    asked = sample(answer=None)
    answered = answer_of(model, asked, max_new_tokens=5)
    output = model.generate(**asked.inputs, do_sample=False, max_new_tokens=5)
    assert answered.answer == tuple(output[0, asked.inputs["input_ids"].shape[1] :].tolist())
    assert answered.key not in (asked.key, sample(answer=(1, 2)).key)
    # What the labels say is what the model with such an exit does: the whole answer stays iff no position changes.
    examined = examine(model, answered)
    for k in range(LAYERS):
        fast = optimized("llava", StaticExit(k))
        same = torch.equal(fast.generate(**asked.inputs, do_sample=False, max_new_tokens=5), output)
        assert bool(examined.unchanged[0, k]) == same


def test_a_placeholder_in_the_answer_is_text():
    model = shared_model("llava")
    given = sample(answer=(7, IMAGE, 3))
    examined = examine(model, given)
    embeds, visual = embed(model, given.inputs["input_ids"], given.inputs["pixel_values"])
    said = model.get_input_embeddings()(torch.tensor([[7, IMAGE]]))
    logits = Oracle(model, plan(StaticExit(1))).forward(torch.cat([embeds, said], 1), F.pad(visual, (0, 2))).logits
    expected = F.cross_entropy(logits[0, -3:], torch.tensor(given.answer))
    torch.testing.assert_close(examined.loss[0, 1], expected, rtol=5e-5, atol=5e-5)
    assert examined.visual.tolist() == [IMAGE_TOKENS]


def test_own_answer_ends_with_the_end_token_whatever_the_settings():
    model = tiny_llava()
    asked = sample(answer=None)
    free = answer_of(model, asked, max_new_tokens=3).answer
    model.generation_config.eos_token_id = free[0]
    model.generation_config.update(do_sample=True, num_beams=2, return_dict_in_generate=True)
    assert answer_of(model, asked, max_new_tokens=3).answer == free[:1]


def test_low_precision_gives_losses_in_float32():
    model = copy.deepcopy(shared_model("llava")).bfloat16()
    examined, precise = examine(model, sample()), examine(shared_model("llava"), sample())
    assert (examined.features.dtype, examined.loss.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(examined.loss, precise.loss, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sample(answer=None), "no answer"),
        (sample(answer=()), "no answer"),
        (sample(answer=(1, VOCAB)), r"answer tokens \[61\]"),
        (sample("tttti"), "no question behind the image: 0 tokens"),
        (sample("ttttit"), "no question behind the image: 1 tokens"),
        (Sample.of({"input_ids": torch.tensor([[3, 4, 5]])}, (1,)), "no visual token"),
        (Sample.of({**sample("tiitt").inputs, "pixel_values": torch.zeros(1, 3, 8, 8)}, (1,)), "[Ii]mage"),
        (Sample.of({**sample().inputs, "pixel_values": torch.full((1, 3, 8, 8), torch.nan)}, (1,)), "NaN or infinite"),
    ],
)
def test_unusable_samples_are_named(given, message):
    given = Sample(given.inputs, given.answer, given.key, "samples[17]")
    with pytest.raises(InputError, match=rf"^samples\[17\]: .*{message}"):
        examine(shared_model("llava"), given)


def test_unusable_models():
    with pytest.raises(InputError, match="optimized"):
        examine(optimized("llava"), sample())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic rotary positions"):
        examine(tiny(rope_parameters=dynamic), sample())


def test_gate_width_is_the_features():
    examined = examine(shared_model("llava"), sample())
    assert examined.features.shape == (1, LAYERS, 2 * C)
