"""ONNX engines, in both forms, give what the optimized model gives: prompts, turns, batches, generation.

Converting the pieces takes most of the time: two engines for all tests. Folders and options: test_ort_folder.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import (
    IMAGE,
    C,
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    tiny,
    tiny_llava,
)

import vte_compile
from vte_compile import SkippedAttention, StaticExit, load_engine, optimize
from vte_compile.adapters import PIA
from vte_compile.errors import InputError
from vte_compile.export.ort_engine import OnnxEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GREEDY = dict(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
OURS = dict(max_new_tokens=5, eos_token_ids=[])


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """Exits behind 0, 2 and the last layer."""
    fast = optimize(tiny_llava(), plan(gate(0), gate(2), gate(3)), compile=False)
    return fast, vte_compile.export(fast, tmp_path_factory.mktemp("llava") / "engine", target="onnxruntime")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A gate behind 0, an exit behind 1; attentions skipped with an adapter that is routed, and without."""
    parts = plan(gate(0, 0.5), StaticExit(1), SkippedAttention(1, random_adapter(PIA)), SkippedAttention(2))
    fast = optimize(tiny(num_hidden_layers=3), parts, compile=False)
    return fast, vte_compile.export(fast, tmp_path_factory.mktemp("llama") / "engine", target="onnxruntime")


@pytest.fixture(scope="module", params=["staged", "single", "copying"])
def form(request) -> str:
    """The two forms, and the staged one as it were with graphs that cannot append to memory in place."""
    return request.param


def loaded(folder: Path, form: str) -> OnnxEngine:
    engine = load_engine(folder, threads=1, form="staged" if form == "copying" else form)
    assert isinstance(engine, OnnxEngine)
    engine._parts.decoder._in_place = form != "copying"
    return engine


@pytest.fixture(scope="module")
def llava(llava_folder, form):
    return llava_folder[0], loaded(llava_folder[1], form)


@pytest.fixture(scope="module")
def llama(llama_folder, form):
    return llama_folder[0], loaded(llama_folder[1], form)


def close(ours, theirs, tolerance: float = 1e-4) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def image_inputs(*layouts: str, seed: int = 0) -> dict:
    """As keyword arguments of a model and of an engine alike."""
    ids, pixels, mask = image_prompt(*layouts, seed=seed)
    return {"input_ids": ids, "attention_mask": mask} | ({} if pixels is None else {"pixel_values": pixels})


# ---------------------------------------------------------------- what the model gives


@pytest.mark.shows("ONNX Runtime", "llava")
def test_llava_prompts_and_answers(llava) -> None:
    """Rows of a batch leave behind different layers; text alone, padding, one token, several images, four rows."""
    fast, engine = llava
    seen = set()
    batches = [("titt", "ittt"), ("..ittt", "titttt"), ("tttt",), ("t",), ("it",), ("ti",), ("tiittit",)]
    batches += [("tittt", "..tttttt", "itttt", "...ttttt")]
    for seed, layouts in enumerate([*[("titt", "ittt")] * 4, *batches]):
        inputs = image_inputs(*layouts, seed=seed)
        want = fast(**inputs, logits_to_keep=1)
        got = engine.prefill(**inputs)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        answer = engine.generate(**inputs, **OURS)
        known = fast.generate(**inputs, **GREEDY)
        assert answer.tokens.tolist() == known[:, inputs["input_ids"].shape[1] :].tolist()
        assert answer.exit_layer.tolist() == known.exit_layer.tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


def test_llava_two_turns(llava) -> None:
    """The second turn brings an image of its own; one row of the third turn says nothing."""
    fast, engine = llava
    for seed in range(3):
        inputs = [image_inputs("titt", "ittt", seed=seed), image_inputs("ttitt", "tittt", seed=seed + 10)]
        want = fast(**inputs[0])
        got = engine.prefill(**inputs[0])
        mask = torch.cat([i["attention_mask"] for i in inputs], 1)
        want = fast(**(inputs[1] | {"attention_mask": mask}), past_key_values=want.past_key_values)
        got = engine.prefill(**inputs[1], cache=got.cache)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        layers = [stage.layers for stage in engine.manifest.stages]
        assert layers == [[0], [1, 2], [3], []]
        by_layer = [row for stage, row in zip(layers, got.cache.lengths.tolist(), strict=True) for _ in stage]
        assert by_layer == want.past_key_values.lengths.tolist()
        step = engine.decode(got.logits.argmax(-1), got.cache)
        ones = torch.ones(2, 1, dtype=torch.long)
        theirs = fast(
            input_ids=want.logits[:, -1:].argmax(-1),
            attention_mask=torch.cat([mask, ones], 1),
            past_key_values=want.past_key_values,
        )
        close(step.logits, theirs.logits[:, -1])
        before = got.cache.next_positions.copy()
        third = engine.prefill([[5, 6, 7], [5]], cache=got.cache)
        quiet = engine.prefill(np.array([[5, 6]] * 2), attention_mask=[[1, 1], [0, 0]], cache=third.cache)
        assert (quiet.cache.next_positions - before).tolist() == [5, 1]
        assert not quiet.logits[1].any()


def test_image_features_and_embeddings_instead_of_pixels(llava) -> None:
    fast, engine = llava
    ids, pixels, mask = image_prompt("titt", "ittt")
    want = engine.prefill(ids, pixel_values=pixels, attention_mask=mask)
    features = engine.encode_images(pixels)
    close(features, torch.cat(tuple(fast.get_image_features(pixels).pooler_output)))
    close(engine.prefill(ids, image_features=features).logits, want.logits)
    close(engine.prefill(ids, image_features=list(features.reshape(2, -1, C))).logits, want.logits)
    visual = ids == IMAGE
    embeds = fast.get_input_embeddings()(ids).detach()
    embeds[visual] = torch.from_numpy(features)
    given = engine.prefill(inputs_embeds=embeds, visual_mask=visual)
    close(given.logits, want.logits)
    assert given.exit_layer.tolist() == want.exit_layer.tolist()


def test_llama_with_skips_and_adapters(llama) -> None:
    fast, engine = llama
    seen = set()
    batches = [("tvvtt",), ("t",), ("vvt", "ttt"), ("ttvv",), ("tvvttt", "vvtttt", "tttttt")]
    for seed, layouts in enumerate([*batches, ("..tvvtt", "vvvtttt", ".tttttt", ".vttttt")]):
        embeds, visual, mask = chunk(*layouts, seed=seed)
        inputs = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": mask.long()}
        want = fast(**inputs, logits_to_keep=1)
        got = engine.prefill(**inputs)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        more, visual_too, _ = chunk(*["ttvt"] * len(layouts), seed=seed + 20)
        second = {"inputs_embeds": more, "visual_mask": visual_too}
        want = fast(**second, past_key_values=want.past_key_values, logits_to_keep=1)
        close(engine.prefill(**second, cache=got.cache).logits, want.logits[:, -1])
        answer = engine.generate(**inputs, **OURS)
        assert answer.tokens.tolist() == fast.generate(**inputs, **GREEDY).tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 1}


@pytest.mark.thorough
def test_half_precision(tmp_path: Path) -> None:
    fast = optimize(tiny_llava().half(), plan(gate(0), gate(2)), compile=False)
    vte_compile.export(fast, tmp_path / "engine", target="onnxruntime")
    for form in ("staged", "single"):
        engine = load_engine(tmp_path / "engine", threads=1, form=form)
        assert isinstance(engine, OnnxEngine)
        for seed in range(3):
            inputs = image_inputs("titt", "ittt", seed=seed)
            theirs = inputs | {"pixel_values": inputs["pixel_values"].half()}
            # Tokens are not compared: in half precision, two may be equally likely.
            assert engine.generate(**inputs, **OURS).exit_layer.tolist() == fast(**theirs).exit_layer.tolist()
            close(engine.prefill(**inputs).logits, fast(**theirs, logits_to_keep=1).logits[:, -1], 5e-2)


# ---------------------------------------------------------------- batches, caches, ends


def test_rows_are_independent(llava) -> None:
    """Each row of a batch of unequal rows gives what it gives alone."""
    _, engine = llava
    rows = [image_prompt(layout, seed=seed) for seed, layout in enumerate(("titt", "tttttt", "iittttt", "t"))]
    ids = [row[0][0].tolist() for row in rows]
    pixels = np.concatenate([row[1].numpy() for row in rows if row[1] is not None])
    together = engine.generate(ids, pixel_values=pixels, **OURS)
    for b, (one, images, _) in enumerate(rows):
        alone = engine.generate([one[0].tolist()], pixel_values=images, **OURS)
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
        assert alone.exit_layer[0] == together.exit_layer[b]


def test_rows_that_ended_are_as_they_were(llava) -> None:
    """Their caches hold no padding: the next turn of such a batch is that of each row alone."""
    _, engine = llava
    ids = [[5, 6, 7], [8, 9, 10, 11, 13]]
    free = engine.generate(ids, **OURS)
    end = int(free.tokens[0, 1])
    assert end not in free.tokens[1, :4]
    answer = engine.generate(ids, max_new_tokens=4, eos_token_ids=[end])
    padding = engine.manifest.model.pad_token_id
    assert answer.tokens[0].tolist() == [*free.tokens[0, :2].tolist(), padding, padding]
    assert answer.tokens[1].tolist() == free.tokens[1, :4].tolist()
    assert answer.lengths.tolist() == [2, 4]
    assert answer.cache.next_positions.tolist() == [3 + 1, 5 + 3]
    last = [int(row[n - 1]) for row, n in zip(answer.tokens, answer.lengths, strict=True)]
    more = [[last[0], 20, 21], [last[1], 22]]
    again = engine.generate(more, cache=answer.cache, **OURS)
    for b in range(2):
        whole = [*ids[b], *answer.tokens[b, : answer.lengths[b] - 1].tolist(), *more[b]]
        assert engine.generate([whole], **OURS).tokens[0].tolist() == again.tokens[b].tolist()


def test_one_row_stops_at_its_end_token(llava) -> None:
    _, engine = llava
    free = engine.generate([[5, 6, 7]], **OURS).tokens[0].tolist()
    steps: list[list[int]] = []
    answer = engine.generate(
        [[5, 6, 7]], max_new_tokens=5, eos_token_ids=[free[2]], on_tokens=lambda tokens: steps.append(tokens.tolist())
    )
    assert answer.tokens.tolist() == [free[: free.index(free[2]) + 1]]
    assert steps == [[token] for token in answer.tokens[0]]


def test_a_cache_without_room_moves(llava) -> None:
    _, engine = llava
    inputs = image_inputs("titt", "ittt", seed=1)
    roomy, tight = engine.prefill(**inputs, room=12), engine.prefill(**inputs)
    assert (tight.cache.nbytes < roomy.cache.nbytes) == engine._parts.decoder._in_place
    for _ in range(12):
        tokens = roomy.logits.argmax(-1)
        size = roomy.cache.nbytes
        roomy, tight = engine.decode(tokens, roomy.cache), engine.decode(tokens, tight.cache)
        close(roomy.logits, tight.logits, 1e-5)
        assert (roomy.cache.nbytes == size) == engine._parts.decoder._in_place


def test_layers_above_an_exit_need_less_memory(llava_folder) -> None:
    _, folder = llava_folder
    engine = loaded(folder, "staged")
    early, never = (engine.prefill(**image_inputs("titt", seed=seed)) for seed in _seeds(engine, 0, -1))
    assert early.cache.lengths[:, 0].tolist() == [7, 3, 3, 3]
    assert never.cache.lengths[:, 0].tolist() == [7, 7, 7, 7]
    # One layer below the first exit, three above it.
    assert early.cache.nbytes / never.cache.nbytes == pytest.approx((7 + 3 * 3) / (4 * 7))


def _seeds(engine: OnnxEngine, *layers: int) -> list[int]:
    """Of prompts "titt" that leave behind these layers."""
    found = {int(engine.prefill(**image_inputs("titt", seed=seed)).exit_layer[0]): seed for seed in range(12)}
    return [found[layer] for layer in layers]


def test_an_error_in_a_chunk_leaves_the_cache(llava, monkeypatch) -> None:
    _, engine = llava
    first = engine.prefill([[5, 6, 7], [5, 6, 7]])
    cache = first.cache
    want = engine.prefill([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]).logits
    before = cache.lengths.copy()
    graph = engine._parts.decoder._graphs[-1]
    with monkeypatch.context() as patch:
        patch.setattr(graph, "session", None)
        with pytest.raises(AttributeError):
            engine.prefill([[20, 21, 22], [20, 21, 22]], cache=cache)
    assert cache.lengths.tolist() == before.tolist()
    close(engine.prefill([[8, 9], [8, 10]], cache=cache).logits, want)


# ---------------------------------------------------------------- sampling


def test_sampling(llava) -> None:
    _, engine = llava
    inputs = image_inputs("titt", "ittt", seed=2)
    greedy = engine.generate(**inputs, **OURS).tokens.tolist()
    assert engine.generate(**inputs, **OURS, temperature=0).tokens.tolist() == greedy
    assert engine.generate(**inputs, **OURS, top_k=1, seed=4).tokens.tolist() == greedy
    assert engine.generate(**inputs, **OURS, top_p=1e-9).tokens.tolist() == greedy
    drawn = [engine.generate(**inputs, **OURS, temperature=3.0, seed=seed).tokens.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn
    with pytest.raises(InputError, match="temperature"):
        engine.generate(**inputs, temperature=-1)


# ---------------------------------------------------------------- what is refused


def test_bad_inputs(llava, llama) -> None:
    engine, text = llava[1], llama[1]
    ids, pixels, mask = image_prompt("titt")
    embeds = np.zeros((1, 4, C), np.float32)
    for message, arguments in [
        ("exactly one of input_ids and inputs_embeds", {}),
        ("at most one of image_features", {"input_ids": ids, "pixel_values": pixels, "image_features": pixels}),
        ("hold 4 visual placeholders", {"input_ids": ids}),
        ("expected \\[4, 32\\]", {"input_ids": ids, "image_features": np.zeros((3, C))}),
        ("expected \\[images, 3, 8, 8\\]", {"input_ids": ids, "pixel_values": pixels[:, :, :4]}),
        ("attention_mask: expected", {"input_ids": ids[:, 5:], "attention_mask": mask}),
        ("row 0 has no token", {"input_ids": ids[:, 5:], "attention_mask": [[0, 0]]}),
        ("pass visual_mask", {"inputs_embeds": embeds}),
        ("visual_mask: expected bools", {"inputs_embeds": embeds, "visual_mask": np.zeros((1, 4))}),
        ("marks tokens of input_ids that are no", {"input_ids": ids[:, 5:], "visual_mask": np.ones((1, 2), bool)}),
        ("outside the vocabulary", {"input_ids": ids[:, 5:] + 100}),
        ("expected token ids", {"input_ids": ids[:, 5:].float()}),
        ("input_ids: expected shape", {"input_ids": [5, 6]}),
        ("without padding", {"input_ids": [[5], [5, 6]], "attention_mask": [[1], [1]]}),
        ("inputs_embeds: expected shape", {"inputs_embeds": embeds[:, :, 1:]}),
        ("leave image_features out", {"inputs_embeds": embeds, "image_features": np.zeros((4, C))}),
    ]:
        with pytest.raises(InputError, match=message):
            engine.prefill(**arguments)
    with pytest.raises(InputError, match="a language model alone"):
        text.prefill(ids, pixel_values=pixels)
    with pytest.raises(InputError, match="max_new_tokens"):
        text.generate([[1, 2]], max_new_tokens=0)
    cache = text.prefill([[1, 2]]).cache
    with pytest.raises(InputError, match="tokens: expected shape"):
        text.decode([[1]], cache)
    with pytest.raises(InputError, match="tokens: expected 1, one for each row"):
        text.decode([1, 2], cache)
    with pytest.raises(InputError, match="active: expected 1"):
        text.decode([1], cache, active=[True, False])
    with pytest.raises(InputError, match="cache holds 1 rows, the inputs 2"):
        text.prefill([[1], [2]], cache=cache)
    with pytest.raises(InputError, match="cache: is of another engine"):
        engine.prefill([[1]], cache=cache)
    with pytest.raises(InputError, match="cache: is of another engine"):
        engine.decode([1], cache)
    with pytest.raises(InputError, match="no row has a token"):
        text.prefill([[1]], attention_mask=[[0]], cache=cache)
    with pytest.raises(InputError, match="cache: is empty"):
        text.decode([1], text._parts.decoder.new_cache(1))


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no CUDAExecutionProvider (pip install onnxruntime-gpu, on a machine with a GPU)",
)
def test_cuda(llava_folder) -> None:
    """The same answers; keys and values stay on the GPU."""
    fast, folder = llava_folder
    engine = load_engine(folder, provider="cuda")
    for seed in range(4):
        inputs = image_inputs("titt", "ittt", seed=seed)
        answer = engine.generate(**inputs, **OURS)
        assert answer.tokens.tolist() == fast.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :].tolist()
        values = [value for memory in answer.cache.memories for value in memory._values.values()]
        assert {value.device_name() for value in values} == {"cuda"}
