"""optimize() of multimodal families through their real inputs: equal to the model without exits, else to the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from marks import thorough
from tiny_families import (
    BLOCKS,
    BY_ROW,
    FAMILIES,
    FURTHER,
    IMAGE_TOKEN,
    MROPE,
    PREFIX,
    VIDEO_TOKEN,
    family_inputs,
    shared_family,
    tiny_family,
    video_inputs,
)
from tiny_models import (
    LAYERS,
    NEVER,
    C,
    assert_relative,
    gate,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
)
from transformers import DynamicCache

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import InputError
from vte_compile.families.decoder import find_decoder
from vte_compile.oracle import embed
from vte_compile.plan import KeptAdapter, SkippedAttention

EXITS = {
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "first": [gate(0, -NEVER)],
    "middle": [gate(0, NEVER), StaticExit(1)],
    "last": [StaticExit(LAYERS - 1)],
    "natural": [gate(0, 0.5), gate(1, 0.5), StaticExit(2)],
}
PROMPTS = {
    "one image": dict(images=1),
    "text": dict(images=0, batch=2),
    "mixed, padded left": dict(images=[2, 0, 1]),
    "mixed, padded right": dict(images=[1, 0, 1], side="right"),
}
NO_ADAPTERS = ("paligemma2", "gemma3", "llava_mixtral")
"""Families with extra norms in their blocks, or experts: adapters are refused there."""
WITHOUT_ADAPTERS = "without adapters: those cannot fold into blocks with extra norms, or into experts, and are refused"
VIDEO = ("llava_onevision", *MROPE)
ALL = (*FAMILIES, *FURTHER)
GREEDY = dict(do_sample=False, max_new_tokens=16)


def cases(prompts, of_further):
    """Family and prompt: every prompt for FAMILIES, some for FURTHER."""
    return [*((n, p) for n in FAMILIES for p in prompts), *((n, p) for n in FURTHER for p in of_further)]


@functools.cache
def optimized(name, exits=None):
    """`shared_family(name)` with exits of `EXITS`, or none; what is traced and rewritten is shared by the module."""
    if exits is None:
        return optimize(shared_family(name), Plan(), compile=False)
    return optimize(optimized(name), plan(*EXITS[exits]))


def oracle_of(name, exits):
    return Oracle(shared_family(name), plan(*EXITS[exits]))


def text_positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def decode_positions(name, mask, images):
    """Of the last column, for the model's own forward, which gets them wrong from a mask of all columns."""
    if name not in MROPE:
        return text_positions(mask)[:, -1:]
    if not images:  # such a model's own positions of text count padding
        return torch.full((len(mask), 1), mask.shape[1] - 1)
    return text_positions(mask)[:, -1:] + shared_family(name).model.rope_deltas


def handed_over(name, inputs):
    """What the model's own code hands to its decoder, as arguments of the oracle, by name."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs)

    model = shared_family(name)
    handle = find_decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    [kwargs], ids = seen, inputs["input_ids"]
    return {
        "inputs_embeds": kwargs["inputs_embeds"],
        "visual_mask": (ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN),
        "attention_mask": inputs["attention_mask"],
        "position_ids": kwargs["position_ids"] if name in MROPE else None,
        "deepstack": kwargs.get("deepstack_visual_embeds"),
        "block_ids": block_ids(name, inputs),
    }


def block_ids(name, inputs):
    """Which tokens see each other in both directions: of PaliGemma those of type 0, of Gemma3 those of an image."""
    if name not in BLOCKS:
        return None
    types = inputs["token_type_ids"]
    if name in PREFIX:
        return types.masked_fill(types == 1, -1)
    begins = torch.cat([types[:, :1], types.diff(dim=1).clamp(min=0)], 1)
    return torch.where(types == 1, begins.cumsum(1), -1)


def assert_same(out, want, tolerance=1e-5):
    """A forward's result against the oracle's."""
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits, want.logits, tolerance)
    cache = out.past_key_values
    assert cache.lengths.T.tolist() == want.cache.lengths()
    assert cache.next_positions.tolist() == want.cache.next_positions()
    for b, row in enumerate(want.cache.rows):
        for ours, theirs in zip(cache.row(b), row.layers, strict=True):
            assert (ours is None) == (theirs is None)
            for a, b_ in zip(ours or (), theirs or (), strict=True):
                assert_relative(a, b_, tolerance)


def joined(name, first, second):
    """Two turns of one row as one prompt."""
    whole = {}
    for key in first.keys() | second.keys():
        parts = [turn[key] for turn in (first, second) if key in turn]
        tokens = key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        whole[key] = torch.cat(parts, 1 if tokens or name in BY_ROW else 0)
    return whole


# ---------------------------------------------------------------- nothing exits: the model


@pytest.mark.shows("images")
@pytest.mark.parametrize(
    ("name", "prompt"),
    # A window of the model's own counts padding between a prompt and what follows.
    [
        (n, p.replace("right", "left") if n in ("paligemma2", "gemma3") else p)
        for n, p in cases(PROMPTS, ["mixed, padded right"])
    ],
)
def test_without_exits_equals_the_model(name, prompt):
    """Prefill, and then decode steps."""
    model, fast, inputs = shared_family(name), optimized(name), family_inputs(name, **PROMPTS[prompt])
    mask, images = inputs["attention_mask"], "pixel_values" in inputs
    real = mask.bool()
    with torch.no_grad():
        counted = {} if name in MROPE else {"position_ids": text_positions(mask)}
        want = model(**inputs, **counted, use_cache=True)
        out = fast(**inputs)
        assert_relative(out.logits[real], want.logits[real])
        assert out.exit_layer.tolist() == [-1] * len(mask)
        for token in (5, 9, 13):
            ids = torch.full((len(mask), 1), token)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step = {"attention_mask": mask, "position_ids": decode_positions(name, mask, images)}
            want = model(input_ids=ids, **step, past_key_values=want.past_key_values)
            out = fast(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            assert_relative(out.logits, want.logits)


@pytest.mark.parametrize(
    ("name", "prompt"),
    cases([prompt for prompt in PROMPTS if "right" not in prompt], ["mixed, padded left"]),
)
def test_generate_without_exits_equals_the_model(name, prompt):
    inputs = family_inputs(name, **PROMPTS[prompt])
    ours = optimized(name).generate(**inputs, **GREEDY)
    assert torch.equal(ours, shared_family(name).generate(**inputs, **GREEDY))


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_without_exits_equal_the_models(name):
    inputs = family_inputs(name, images=1, batch=2)
    if "batch_num_images" in inputs:  # generate() would repeat it without the images
        del inputs["batch_num_images"]
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=5)
    ours = optimized(name).generate(**inputs, **options)
    assert torch.equal(ours, shared_family(name).generate(**inputs, **options))


# ---------------------------------------------------------------- exits: the oracle


@pytest.mark.parametrize("exits", list(EXITS))
@pytest.mark.parametrize("name", ALL)
@pytest.mark.shows("exits")
def test_exits_equal_the_oracle(name, exits):
    """A batch of several images, none and one, padded; then a decode step."""
    inputs = family_inputs(name, images=[2, 0, 1])
    fast, oracle = optimized(name, exits), oracle_of(name, exits)
    out, want = fast(**inputs), oracle.forward(**handed_over(name, inputs))
    forced = {"never": -1, "first": 0, "middle": 1, "last": LAYERS - 1}
    if exits in forced:
        assert out.exit_layer.tolist() == [forced[exits], -1, forced[exits]]
    assert_same(out, want)
    ids = torch.tensor([[7], [8], [9]])
    out = fast(input_ids=ids, past_key_values=out.past_key_values)
    assert_same(out, oracle.forward(oracle.embed_tokens(ids), cache=want.cache))


@pytest.mark.parametrize(("name", "prompt"), cases(PROMPTS, ["text", "mixed, padded left"]))
@pytest.mark.shows("generate")
def test_generate_with_exits_equals_the_oracle(name, prompt):
    inputs = family_inputs(name, **PROMPTS[prompt], seed=1)
    tokens = optimized(name, "natural").generate(**inputs, **GREEDY)
    want = oracle_of(name, "natural").generate(**handed_over(name, inputs), max_new_tokens=16)
    assert tokens[:, -16:].tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


@pytest.mark.parametrize("name", ALL)
def test_embed_is_the_models_own(name):
    """What the oracle's users call to make its inputs."""
    inputs = family_inputs(name, images=[2, 0, 1])
    own = handed_over(name, inputs)
    ours, mask = embed(shared_family(name), **inputs)
    assert torch.equal(mask, own["visual_mask"])
    assert_relative(ours[inputs["attention_mask"].bool()], own["inputs_embeds"][inputs["attention_mask"].bool()])


# ---------------------------------------------------------------- further turns


@pytest.mark.parametrize("images", [0, 1], ids=["text", "image"])
@pytest.mark.shows("second turn")
@pytest.mark.parametrize(
    "name",
    # (PaliGemma's turns, of both kinds, are no parts of one prompt: tests/test_token_blocks.py.)
    [*FAMILIES, "idefics3", "gemma3", *map(thorough, ("vipllava", "mistral3", "smolvlm", "llava_mixtral"))],
)
def test_second_turn(name, images):
    """Without exits it is the rest of one long prompt, new images included; with exits it is the oracle's."""
    first, second = family_inputs(name, images=1), family_inputs(name, images=images, seed=1)
    length = first["input_ids"].shape[1]
    whole = joined(name, first, second)
    with torch.no_grad():
        want = shared_family(name)(**whole).logits[:, length:]
    fast = optimized(name)
    out = fast(**second, past_key_values=fast(**first).past_key_values)
    assert_relative(out.logits, want)

    fast, oracle = optimized(name, "middle"), oracle_of(name, "middle")
    out = fast(**second, past_key_values=fast(**first).past_key_values)
    prompt = handed_over(name, whole)
    features = prompt.pop("deepstack")
    cache, seen = None, 0
    for columns in (slice(0, length), slice(length, None)):
        turn = {key: None if value is None else value[..., columns] for key, value in prompt.items()}
        turn["inputs_embeds"] = prompt["inputs_embeds"][:, columns]
        count = int(turn["visual_mask"].sum())
        if features is not None:
            turn["deepstack"] = [of_layer[seen : seen + count] for of_layer in features]
        want = oracle.forward(**turn, cache=cache)
        cache, seen = want.cache, seen + count
    assert_same(out, want)


@pytest.mark.parametrize("images", [0, 1], ids=["text", "image"])
@pytest.mark.parametrize("name", FAMILIES)
def test_second_turn_of_generate(name, images):
    """The whole conversation's tokens with the cache, as chat code passes them, and the new turn's images alone."""
    fast = optimized(name)
    first, question = family_inputs(name, images=1), family_inputs(name, images=images, seed=1)
    cache = DynamicCache()
    options = dict(do_sample=False, suppress_tokens=[IMAGE_TOKEN, VIDEO_TOKEN])  # the model would look for its image
    said = fast.generate(**first, **options, max_new_tokens=4, past_key_values=cache)
    types = (said == IMAGE_TOKEN).long()
    answered = {**first, "input_ids": said, "attention_mask": torch.ones_like(said)}
    if name in MROPE:
        answered["mm_token_type_ids"] = types
    whole = joined(name, answered, question)
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    new = {key: value for key, value in whole.items() if key in tokens}
    new |= {key: value for key, value in question.items() if key not in tokens}
    again = fast.generate(**new, **options, max_new_tokens=16, past_key_values=cache)
    assert torch.equal(again, shared_family(name).generate(**whole, **options, max_new_tokens=16))


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("frames", [4, 24])
@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.shows("videos")
def test_video(name, frames):
    """Long ones: their last frame's position lies behind that of the question."""
    model, fast, inputs = shared_family(name), optimized(name), video_inputs(name, frames=frames)
    assert torch.equal(fast.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    token, mask = torch.tensor([[5]]), torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    with torch.no_grad():
        want, out = model(**inputs, use_cache=True), fast(**inputs)
        assert_relative(out.logits, want.logits)
        positions = decode_positions(name, mask, True)
        want = model(input_ids=token, position_ids=positions, past_key_values=want.past_key_values)
        assert_relative(fast(input_ids=token, past_key_values=out.past_key_values).logits, want.logits)
    out = optimized(name, "middle")(**inputs)
    assert_same(out, oracle_of(name, "middle").forward(**handed_over(name, inputs)))


# ---------------------------------------------------------------- multimodal positions


@pytest.mark.parametrize("name", MROPE)
def test_nothing_of_a_request_is_kept(name):
    """Neither on the original, nor from it: such models remember how far their latest images shifted positions."""
    model = tiny_family(name)
    prompt, other = family_inputs(name, images=1), family_inputs(name, images=[2, 1], seed=3)
    embeds = torch.randn(1, 5, C, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(inputs_embeds=embeds).logits
        model(**other)
    left = model.model.rope_deltas
    fast = optimize(model, Plan(), compile=False)  # its check, on a text, is not led astray
    Oracle(model, Plan())
    for _ in range(2):
        assert torch.equal(fast.generate(**prompt, **GREEDY), optimized(name).generate(**prompt, **GREEDY))
        assert_relative(fast(inputs_embeds=embeds).logits, want)
        fast(**other)
    assert model.model.rope_deltas is left


@pytest.mark.parametrize("name", MROPE)
def test_position_ids_given(name):
    """As three rows, or as four of which the first numbers the tokens; or two-dimensional ones, as of text."""
    inputs, fast = family_inputs(name, images=[1, 2]), optimized(name, "middle")
    want, positions = fast(**inputs), handed_over(name, inputs)["position_ids"]
    text = text_positions(inputs["attention_mask"])
    for given in (positions, torch.cat([text[None], positions])):
        out = fast(**inputs, position_ids=given)
        assert torch.equal(out.logits, want.logits)
        assert torch.equal(fast.generate(**inputs, position_ids=given, **GREEDY), fast.generate(**inputs, **GREEDY))
    with torch.no_grad():
        flat = shared_family(name)(**inputs, position_ids=text)
    assert_relative(optimized(name)(**inputs, position_ids=text).logits[:, -1], flat.logits[:, -1])


def test_position_ids_that_do_not_fit():
    inputs, fast = family_inputs("qwen2_vl", images=1), optimized("qwen2_vl", "middle")
    length = inputs["input_ids"].shape[1]
    counted = torch.arange(length)[None]
    for given in (counted[0], counted[:, 1:], counted.expand(2, 1, -1), counted.expand(5, 1, -1)):
        with pytest.raises(InputError, match=rf"\[1, {length}\] or \[3, 1, {length}\] or \[4, 1, {length}\], got"):
            fast(**inputs, position_ids=given)
    with pytest.raises(InputError, match="packed"):
        fast(**inputs, position_ids=torch.cat([counted % 5, counted, counted, counted])[:, None])
    with pytest.raises(InputError, match=rf"\[1, {length}\], got \[3, 1, {length}\]"):
        optimized("llava")(torch.full((1, length), 5), position_ids=counted.expand(3, 1, -1))


@pytest.mark.parametrize("name", MROPE)
def test_images_without_their_places(name):
    """Their positions would be taken for those of text."""
    inputs, fast = family_inputs(name, images=1), optimized(name, "middle")
    positions = handed_over(name, inputs)["position_ids"]
    types = inputs.pop("mm_token_type_ids")
    for call in (fast, functools.partial(fast.generate, **GREEDY)):
        with pytest.raises((InputError, ValueError), match="mm_token_type_ids"):
            call(**inputs)
    want = fast(**inputs, mm_token_type_ids=types)
    assert torch.equal(fast(**inputs, position_ids=positions).logits, want.logits)


@pytest.mark.parametrize("name", [*MROPE, *(thorough(name) for name in ALL if name not in (*MROPE, *NO_ADAPTERS))])
@pytest.mark.shows("skips")
def test_skips_and_adapters(name):
    parts = [
        StaticExit(2),
        SkippedAttention(0),
        SkippedAttention(2, random_adapter(PIA, 1)),
        KeptAdapter(1, random_adapter(PlainAdapter, 2)),
    ]
    inputs = family_inputs(name, images=[2, 0, 1])
    fast = optimize(tiny_family(name), plan(*parts), compile=False)
    out, oracle = fast(**inputs), Oracle(shared_family(name), plan(*parts))
    prompt = handed_over(name, inputs)
    assert_same(out, oracle.forward(**prompt))
    tokens = fast.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert tokens[:, -6:].tolist() == oracle.generate(**prompt, max_new_tokens=6).tokens


@pytest.mark.parametrize("name", ["gemma3", *map(thorough, ("paligemma2", "llava_mixtral"))])
@pytest.mark.shows("skips")
def test_skips_without_adapters(name, record_property):
    record_property("note", WITHOUT_ADAPTERS)
    skipped = (0, 3)
    inputs, parts = family_inputs(name, images=[2, 0, 1]), plan(StaticExit(1), *map(SkippedAttention, skipped))
    fast = optimize(tiny_family(name), parts, compile=False)
    out, oracle, prompt = fast(**inputs), Oracle(shared_family(name), parts), handed_over(name, inputs)
    want = oracle.forward(**prompt)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [1, -1, 1]
    assert_relative(out.logits, want.logits)
    assert [layer.is_initialized for layer in out.past_key_values.layers] == [False, True, True, False]
    tokens = fast.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert tokens[:, -6:].tolist() == oracle.generate(**prompt, max_new_tokens=6).tokens


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_a_skipped_attention_is_one_that_gives_zeros(name):
    """What the oracle makes of blocks that cannot be taken apart, against the model itself with such weights."""
    silent = tiny_family(name)
    torch.nn.init.zeros_(find_decoder(silent).layers[1].self_attn.o_proj.weight)
    prompt = handed_over(name, family_inputs(name, images=[2, 0, 1]))
    logits = [
        Oracle(model, parts).forward(**prompt).logits
        for model, parts in ((silent, Plan()), (shared_family(name), plan(SkippedAttention(1))))
    ]
    assert_relative(*logits)


@pytest.mark.thorough
def test_compiled_multimodal_positions():
    """Through Inductor: prefill with an exit, a second turn, decode; behind the exit, features would be added."""
    name = "qwen3_vl"
    fast = optimize(shared_family(name), plan(*EXITS["first"]), compile=True)
    plain = optimized(name, "first")
    first, second = family_inputs(name, images=[1, 2]), family_inputs(name, images=[1, 2], seed=1)
    runs = []
    for model in (fast, plain):
        out = model(**first)
        turn = model(**second, past_key_values=out.past_key_values)
        runs.append((out, turn, model(input_ids=torch.tensor([[7], [8]]), past_key_values=turn.past_key_values)))
    for ours, theirs in zip(*runs, strict=True):
        assert ours.exit_layer.tolist() == theirs.exit_layer.tolist()
        assert_relative(ours.logits, theirs.logits)
    assert runs[0][0].exit_layer.tolist() == runs[0][1].exit_layer.tolist() == [0, 0]
