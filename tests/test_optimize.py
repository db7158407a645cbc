"""optimize(): the same model from outside, and the oracle's numbers from its forward."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from marks import thorough
from tiny_models import (
    LAYERS,
    NEVER,
    assert_relative,
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    optimized,
    plan,
    random_adapter,
    shared_model,
    tiny,
    tiny_llava,
)
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import InputError
from vte_compile.fingerprint import Fingerprint
from vte_compile.optimized_model import CausalLMOutputWithExit, OptimizedModel
from vte_compile.oracle import embed
from vte_compile.plan import KeptAdapter, SkippedAttention

FORCED = {
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "gate 0": [gate(0, -NEVER), gate(2, -NEVER)],
    "gate 2": [gate(0, NEVER), gate(2, -NEVER)],
    "gate last": [gate(LAYERS - 1, -NEVER)],
    "natural": [gate(0, 0.5), gate(1, 0.5), gate(2, 0.5)],
    "gate or static": [gate(0, 0.5), StaticExit(1)],
    "static 0": [StaticExit(0)],
    "static last": [StaticExit(LAYERS - 1)],
    "none": [],
}
BATCHES = {
    "one": ["ttvvvtt"],
    "text": ["tttt"],
    "one token": ["t"],
    "one question token": ["tvvt"],
    "image last": ["ttvv"],
    "all visual": ["vvvv"],
    "several": ["vtvvttvtt"],
    "left": ["..tvvtt", "vvvtttt", ".tttttt"],
    "right": ["tvvtt..", "vvvtttt", "tttttt."],
    "mixed": ["..vvtttt", "ttvvvttt", "tvtvtt..", "tttttttt", ".vtvtvt.", "ttttttvv"],
}


_FAST: dict = {}


def fast_for(name, exits):
    """Made once for the whole module."""
    if (name, exits) not in _FAST:
        _FAST[name, exits] = optimized(name, *FORCED[exits])
    return _FAST[name, exits]


def assert_cache(cache, want, tolerance=1e-5):
    """An ExitCache against the oracle's."""
    assert cache.lengths.T.tolist() == want.lengths()
    assert cache.next_positions.tolist() == want.next_positions()
    for b, row in enumerate(want.rows):
        for ours, theirs in zip(cache.row(b), row.layers, strict=True):
            for a, b_ in zip(ours, theirs, strict=True):
                assert_relative(a, b_, tolerance)


def assert_decided(exits, want):
    """No gate of the oracle's run was so near to its threshold that rounding could decide."""
    thresholds = {e.layer: e.threshold for e in exits if not isinstance(e, StaticExit)}
    for layer, rows in want.gate_logits.items():
        for z in rows.values():
            margin = float(z[1] - z[0]) - thresholds[layer]
            assert margin != margin or abs(margin) > 1e-3


# ---------------------------------------------------------------- the oracle's numbers


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("exits", list(FORCED))
@pytest.mark.shows("exits", "llama")
def test_language_model_equals_the_oracle(exits, batch):
    args = chunk(*BATCHES[batch], seed=3)
    fast, oracle = fast_for("llama", exits), Oracle(shared_model("llama"), plan(*FORCED[exits]))
    inputs = dict(zip(("inputs_embeds", "visual_mask", "attention_mask"), args, strict=True))
    out, want = fast(**inputs), oracle.forward(*args)
    assert_decided(FORCED[exits], want)
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert out.exit_layer.dtype == torch.int64
    assert_relative(out.logits, want.logits)
    assert torch.equal(out.logits == 0, want.logits == 0)
    assert_cache(out.past_key_values, want.cache)
    last = fast(**inputs, logits_to_keep=1).logits[:, 0]
    ends = [int(row.nonzero().max()) for row in args[2]]
    assert_relative(last, want.logits[torch.arange(len(ends)), ends])


def test_the_plans_do_what_they_are_for():
    args = chunk(*BATCHES["mixed"], seed=3)
    inputs = dict(zip(("inputs_embeds", "visual_mask", "attention_mask"), args, strict=True))
    layers = {exits: fast_for("llama", exits)(**inputs).exit_layer.tolist() for exits in FORCED}
    assert layers["never"] == layers["none"] == [-1] * 6
    assert layers["gate 0"] == [0, 0, 0, -1, -1, -1]  # row 4 has one question token, whose mean is of nothing
    assert layers["gate 2"] == [2, 2, 2, -1, -1, -1]
    assert layers["gate last"] == [3, 3, 3, -1, -1, -1]
    assert layers["static 0"] == [0, 0, 0, -1, 0, -1]
    assert len(set(layers["natural"])) > 2


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        *((name, exits) for name in ("qwen2", "llava") for exits in ("natural", "gate 2", "static 0", "none")),
        ("mistral", "natural"),
        ("gemma", "natural"),
    ],
)
@pytest.mark.shows("exits")
def test_other_families_equal_the_oracle(name, exits):
    if name == "llava":
        ids, pixels, mask = image_prompt("..titt....", "tiittt.", "itit...", "t" * 13)
        embeds, visual = embed(shared_model(name), ids, pixels)
        inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    else:
        embeds, visual, mask = chunk("..vvtttt", "ttvvvttt", "tvtvtt..", "tttttttt", seed=1)
        inputs = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": mask}
    out = fast_for(name, exits)(**inputs)
    want = Oracle(shared_model(name), plan(*FORCED[exits])).forward(embeds, visual, mask)
    assert_decided(FORCED[exits], want)
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits, want.logits)
    assert_cache(out.past_key_values, want.cache)


@pytest.mark.parametrize("name", ["gemma", *map(thorough, ("llama", "mistral", "qwen2"))])
@pytest.mark.shows("skips")
def test_skips_equal_the_oracle(name):
    """With adapters and without, beside an exit; then a decode step. Gemma's norms multiply by 1 + weight."""
    skips = SkippedAttention(0, random_adapter(PIA, 1)), SkippedAttention(3)
    parts = [*skips, KeptAdapter(2, random_adapter(PlainAdapter, 2)), StaticExit(1)]
    args, token = chunk("..vvtttt", "ttvvvttt", "tttttttt", seed=1), chunk("t", "t", "t", seed=2)[0]
    fast, oracle = optimize(shared_model(name), plan(*parts), compile=False), Oracle(shared_model(name), plan(*parts))
    out = fast(**dict(zip(("inputs_embeds", "visual_mask", "attention_mask"), args, strict=True)))
    want = oracle.forward(*args)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [1, 1, -1]
    assert_relative(out.logits, want.logits)
    out = fast(inputs_embeds=token, past_key_values=out.past_key_values, visual_mask=None)
    assert_relative(out.logits, oracle.forward(token, cache=want.cache).logits)


def test_visual_mask_beside_input_ids():
    model, fast = shared_model("llama"), fast_for("llama", "static 0")
    ids = torch.tensor([[5, 9, 9, 4, 3]])
    visual = torch.tensor([[False, True, True, False, False]])
    out = fast(input_ids=ids, visual_mask=visual)
    want = Oracle(model, plan(StaticExit(0))).forward(model.get_input_embeddings()(ids).detach(), visual)
    assert out.exit_layer.tolist() == [0]
    assert_relative(out.logits, want.logits)
    assert fast(ids).exit_layer.tolist() == [-1]  # without it, ids of a language model are text
    # A LLaVA's caller may say so too, and then the placeholders do not count.
    ids, pixels, _ = image_prompt("titt")
    told = fast_for("llava", "static 0")(ids, pixels, visual_mask=torch.arange(7)[None] == 1)
    assert told.exit_layer.tolist() == [0]
    assert told.past_key_values.lengths[:, 0].tolist() == [7, 6, 6, 6]


def test_position_ids():
    args = chunk("..tvvtt", "tvvtttt")
    positions = torch.tensor([[0, 0, 3, 4, 5, 9, 20], [1, 2, 3, 4, 5, 6, 7]])
    out = fast_for("llama", "static 0")(
        inputs_embeds=args[0], visual_mask=args[1], attention_mask=args[2], position_ids=positions
    )
    want = Oracle(shared_model("llama"), plan(StaticExit(0))).forward(*args, positions)
    assert_relative(out.logits, want.logits)
    assert_cache(out.past_key_values, want.cache)
    shared_positions = fast_for("llama", "none")(inputs_embeds=args[0], position_ids=positions[1:])
    each = fast_for("llama", "none")(inputs_embeds=args[0], position_ids=positions[1:].expand(2, -1))
    assert torch.equal(shared_positions.logits, each.logits)


@pytest.mark.parametrize("exits", ["natural", "static 0", "gate 2"])
@pytest.mark.parametrize(
    "turn", [["ttt", "ttt", "ttt"], ["tvvtt", "vvttt", "ttttt"], ["vtt..", "..ttt", "....."], ["t", "t", "t"]]
)
@pytest.mark.shows("second turn")
@pytest.mark.parametrize("name", ["llama", thorough("gemma")])
def test_second_turn(name, exits, turn):
    """With text, with new images, with padding, with nothing at all in a row; then a decode step on top."""
    fast, oracle = fast_for(name, exits), Oracle(shared_model(name), plan(*FORCED[exits]))
    first, second = chunk("..vvtttt", "ttvvvttt", "tttttt..", seed=1), chunk(*turn, seed=2)
    names = ("inputs_embeds", "visual_mask", "attention_mask")
    cache = fast(**dict(zip(names, first, strict=True))).past_key_values
    known = oracle.forward(*first).cache
    out, want = (
        fast(**dict(zip(names, second, strict=True)), past_key_values=cache),
        oracle.forward(*second, cache=known),
    )
    assert_decided(FORCED[exits], want)
    assert out.past_key_values is cache
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits, want.logits)
    assert_cache(cache, want.cache)
    token = chunk("t", "t", "t", seed=3)[0]
    out, want = (
        fast(inputs_embeds=token, past_key_values=cache, visual_mask=None),
        oracle.forward(token, cache=want.cache),
    )
    assert_relative(out.logits, want.logits)
    assert_cache(cache, want.cache)


def test_masks_of_all_columns_so_far():
    fast = fast_for("llama", "static 0")
    first, second = chunk("..vvtt", "ttvvtt"), chunk("tt.", "ttt", seed=1)
    results = []
    for mask in (second[2], torch.cat([first[2], second[2]], 1)):
        out = fast(inputs_embeds=first[0], visual_mask=first[1], attention_mask=first[2])
        out = fast(
            inputs_embeds=second[0], visual_mask=second[1], attention_mask=mask, past_key_values=out.past_key_values
        )
        results.append(out.logits)
    assert torch.equal(*results)


def test_float64_from_the_start():
    """transformers normalizes and rotates in float32 even then: no reason to refuse the model."""
    model = tiny().double()
    fast = optimize(model, plan(), compile=False)
    embeds = chunk("ttttt")[0].double()
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)


def test_bfloat16():
    model = tiny().to(torch.bfloat16)
    args = chunk(*BATCHES["mixed"], seed=3)
    args = (args[0].bfloat16(), *args[1:])
    # Gates far from their thresholds: only those may be compared at this precision.
    exits = [gate(0, -50.0), gate(1, NEVER), gate(2, -NEVER)]
    want = Oracle(model, plan(*exits)).forward(*args)
    for z in want.gate_logits[0].values():
        assert z.isnan().any() or abs(float(z[1] - z[0]) + 50) > 1
    fast = optimize(model, plan(*exits), compile=False)
    out = fast(**dict(zip(("inputs_embeds", "visual_mask", "attention_mask"), args, strict=True)))
    assert out.logits.dtype == torch.bfloat16
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits.float(), want.logits.float(), 3e-2)


# ---------------------------------------------------------------- the forward's other arguments


def test_logits_to_keep_and_return_dict():
    fast, model = fast_for("llama", "none"), shared_model("llama")
    embeds, visual, _ = chunk("tvvtt", "ttttt")
    inputs = {"inputs_embeds": embeds, "visual_mask": visual}
    with torch.no_grad():
        for keep in (0, 1, 3, torch.tensor([0, 3])):
            want = model(inputs_embeds=embeds, logits_to_keep=keep).logits
            assert_relative(fast(**inputs, logits_to_keep=keep).logits, want)
    result = fast(**inputs, return_dict=False)
    assert isinstance(result, tuple)
    full = fast(**inputs)
    assert isinstance(full, CausalLMOutputWithExit)
    assert torch.equal(result[0], full.logits)
    assert result[-1].tolist() == [-1, -1]
    assert fast(**inputs, use_cache=False).past_key_values is None


def test_last_logits_are_of_the_last_real_token():
    embeds, visual, real = chunk("tvvtt..", "..tvvtt")
    fast = fast_for("llama", "static 0")
    last = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real, logits_to_keep=1).logits
    full = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real).logits
    assert_relative(last[:, 0], torch.stack([full[0, 4], full[1, 6]]))


def test_loss_is_the_models():
    ids, pixels, mask = image_prompt("titttt", "ittttt")
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        want = shared_model("llava")(**inputs)
    out = fast_for("llava", "never")(**inputs)
    assert_relative(out.loss, want.loss)
    # Of all images, or (transformers 5.24) of each.
    for ours, theirs in zip(out.image_hidden_states, want.image_hidden_states, strict=True):
        assert_relative(ours, theirs)
    with pytest.raises(InputError, match="labels"):
        fast_for("llava", "never")(**inputs, logits_to_keep=1)


# ---------------------------------------------------------------- the same model from outside


def test_same_class_and_untouched_original():
    model = tiny_llava()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attributes = set(vars(model))
    forward, cls = type(model).forward, type(model)
    fast = optimize(model, plan(StaticExit(1)), compile=False)
    fast.generation_config.max_new_tokens = 3
    fast.register_forward_hook(lambda *args: pytest.fail("a hook of the copy ran on the original"))

    assert isinstance(fast, LlavaForConditionalGeneration)
    assert isinstance(fast, OptimizedModel)
    assert type(fast).__name__ == "LlavaForConditionalGeneration"
    assert type(model) is cls is LlavaForConditionalGeneration
    assert type(model).forward is forward
    assert set(vars(model)) == attributes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for (name, ours), (_, theirs) in zip(fast.named_parameters(), model.named_parameters(), strict=True):
        assert ours is theirs, name
    ids, pixels, _ = image_prompt("titt")
    assert not hasattr(model(input_ids=ids, pixel_values=pixels), "exit_layer")
    assert fast.plan.exits == (StaticExit(1),)


def test_eval_and_train():
    fast = optimized("llama", StaticExit(1))
    assert fast.eval() is fast
    assert not fast.training
    with pytest.raises(InputError, match="inference"):
        fast.train()


def test_model_in_training_mode_warns(caplog):
    model = tiny(attention_dropout=0.5).train()
    with caplog.at_level(logging.WARNING, "vte_compile"):
        fast = optimize(model, plan(StaticExit(1)), compile=False)
    assert "training mode" in caplog.text
    assert all(m.training for m in model.modules())
    embeds, visual, _ = chunk("tvvtt")
    out = fast(inputs_embeds=embeds, visual_mask=visual)
    assert not fast.training
    assert_relative(out.logits, Oracle(model.eval(), plan(StaticExit(1))).forward(embeds, visual).logits)


def test_other_dtypes_and_back():
    model = tiny()
    exits = [gate(0, 0.5), StaticExit(1)]
    fast = optimize(model, plan(*exits), compile=False)
    embeds, visual, _ = chunk("tvvtt", "vvttt")
    inputs = {"inputs_embeds": embeds, "visual_mask": visual}
    fast(**inputs)
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float64, 1e-5)):  # norms compute in float32
        moved = fast.to(dtype)
        assert moved is fast
        out = fast(inputs_embeds=embeds.to(dtype), visual_mask=visual)
        assert out.logits.dtype == dtype
        want = Oracle(model, plan(*exits)).forward(embeds.to(dtype), visual)
        assert_relative(out.logits.double(), want.logits.double(), tolerance)
    fast.float()  # weights, and the rotary table, stay rounded to bfloat16
    assert_relative(fast(**inputs).logits, Oracle(model, plan(*exits)).forward(embeds, visual).logits)


def test_weights_are_read_when_used():
    """load_state_dict, or a replaced parameter, changes what is computed."""
    model = tiny()
    fast = optimize(model, plan(StaticExit(1)), compile=False)
    embeds, visual, _ = chunk("tvvtt")
    fast(inputs_embeds=embeds, visual_mask=visual)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    model.model.layers[3].self_attn.q_proj.weight = nn.Parameter(model.model.layers[3].self_attn.q_proj.weight * -0.7)
    out = fast(inputs_embeds=embeds, visual_mask=visual)
    assert_relative(out.logits, Oracle(model, plan(StaticExit(1))).forward(embeds, visual).logits)


def test_deepcopy_is_independent():
    fast = optimize(tiny(), plan(gate(0, -NEVER)), compile=False)
    embeds, visual, _ = chunk("tvvtt")
    before = fast(inputs_embeds=embeds, visual_mask=visual)
    twin = copy.deepcopy(fast)
    assert isinstance(twin, LlamaForCausalLM)
    assert_relative(twin(inputs_embeds=embeds, visual_mask=visual).logits, before.logits, 1e-6)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(0.5)
    after = twin(inputs_embeds=embeds, visual_mask=visual)
    assert after.exit_layer.tolist() == [0]
    assert_relative(after.logits, before.logits, 1e-6)
    assert not torch.allclose(fast(inputs_embeds=embeds, visual_mask=visual).logits, before.logits, atol=1e-3)


def test_checkpoints(tmp_path, caplog):
    """save_pretrained writes the plan; optimize() of the loaded model finds it, and says so; so does no plan."""
    model = tiny_llava()
    made_for = Plan([gate(0, 0.5), StaticExit(1)], Fingerprint.of(model))
    fast = optimize(model, made_for, compile=False)
    fast.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    torch.save(fast.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())

    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "with", device_map="cpu")
    assert not isinstance(loaded, OptimizedModel)
    with caplog.at_level(logging.INFO, "vte_compile"):
        again = optimize(loaded, compile=False)
    assert str(tmp_path / "with" / "vte_plan.json") in caplog.text
    assert again.plan.describe() == made_for.describe()
    ids, pixels, _ = image_prompt("titt")
    ours, theirs = (m(input_ids=ids, pixel_values=pixels) for m in (again, fast))
    assert_relative(ours.logits, theirs.logits, 1e-6)
    assert ours.exit_layer.tolist() == theirs.exit_layer.tolist() != [-1]

    caplog.clear()
    with caplog.at_level(logging.INFO, "vte_compile"):
        plain = optimize(LlavaForConditionalGeneration.from_pretrained(tmp_path / "without"), compile=False)
    assert "lossless" in caplog.text
    assert plain.plan.exits == ()
    assert plain(input_ids=ids, pixel_values=pixels).exit_layer.tolist() == [-1]


def test_another_plan_shares_the_traces(monkeypatch):
    fast = optimized("llama", StaticExit(1))
    embeds, visual, _ = chunk("tvvtt")
    first = fast(inputs_embeds=embeds, visual_mask=visual)
    monkeypatch.setattr(
        "vte_compile.runtime.decoder_runner.capture", lambda *args, **kwargs: pytest.fail("traced again")
    )
    other = optimize(fast, plan(StaticExit(2)))
    assert other is not fast
    assert (fast.plan.exits, other.plan.exits) == ((StaticExit(1),), (StaticExit(2),))
    out = other(inputs_embeds=embeds, visual_mask=visual)
    assert out.exit_layer.tolist() == [2]
    again = fast(inputs_embeds=embeds, visual_mask=visual)
    assert again.exit_layer.tolist() == [1]
    assert torch.equal(again.logits, first.logits)
    with pytest.raises(InputError, match="compile=True"):
        optimize(fast, plan(StaticExit(2)), compile=True)
    other.generation_config.max_new_tokens = 1234
    assert fast.generation_config.max_new_tokens != 1234


def test_threads():
    """Calls share nothing: two threads at once get what each gets alone."""
    fast = optimized("llava", gate(0, 0.5), StaticExit(2))
    prompts = [image_prompt("titt", "ittt", seed=s)[:2] for s in range(4)]

    def generate(prompt):
        out = fast.generate(
            input_ids=prompt[0], pixel_values=prompt[1], do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        return out.tolist(), out.exit_layer.tolist()

    alone = [generate(prompt) for prompt in prompts]
    together: dict = {}
    fast = optimize(fast, fast.plan)  # nothing lowered yet: the threads also race to build its programs
    barrier = threading.Barrier(len(prompts))

    def work(index):
        barrier.wait()
        together[index] = generate(prompts[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == alone
