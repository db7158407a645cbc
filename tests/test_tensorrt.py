"""TensorRT engines give what the optimized model gives: the real runner, with ONNX Runtime behind TensorRT's API."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from fake_tensorrt import CPU, load_fake
from marks import thorough
from test_families import handed_over, optimized, oracle_of
from tiny_families import family_inputs, tiny_family
from tiny_models import (
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
from vte_compile import SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA
from vte_compile.export.onnx_pieces import check, convert
from vte_compile.export.tensorrt_ops import TENSORRT
from vte_compile.export.tensorrt_profiles import DECODE, PREFILL
from vte_compile.kernels.cached_attention import rotate
from vte_compile.passes.last_layer_queries import CACHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GREEDY = dict(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
OURS = dict(max_new_tokens=5, eos_token_ids=[], do_sample=False)
SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 64), "visual": (1, 8, 32), "columns": (1, 32, 128)}
LARGER = {"prompt": (1, 16, 128), "visual": (1, 8, 100)}


def exported(fast, folder: Path, **options):
    vte_compile.export(fast, folder, target="tensorrt", build=False, profiles=SIZES, **options)
    return load_fake(folder)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A gate behind 0, an exit behind 1; attentions skipped with a folded adapter that is routed, and without."""
    parts = plan(gate(0, 0.5), StaticExit(1), SkippedAttention(1, random_adapter(PIA)), SkippedAttention(2))
    fast = optimize(tiny(num_hidden_layers=3), parts, compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llama") / "engine")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Exits behind 0, 2 and the last layer; two query heads share a key."""
    fast = optimize(tiny_llava(), plan(gate(0), gate(2), gate(3)), compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llava") / "engine")


def close(ours, theirs) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-4)


def test_llava_prompts_and_answers(llava) -> None:
    """Rows of a batch leave behind different layers; text alone, padding, one token, several images."""
    fast, engine = llava
    seen = set()
    batches = [("titt", "ittt"), ("..ittt", "titttt"), ("tttt",), ("t",), ("it",), ("ti",), ("tiittit",)]
    for seed, layouts in enumerate([*[("titt", "ittt")] * 4, *batches]):
        ids, pixels, mask = image_prompt(*layouts, seed=seed)
        images = {} if pixels is None else {"pixel_values": pixels}
        want = fast(input_ids=ids, attention_mask=mask, **images, logits_to_keep=1)
        got = engine.prefill(ids, attention_mask=mask, **images)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        answer = engine.generate(ids, attention_mask=mask, **images, **OURS)
        known = fast.generate(input_ids=ids, attention_mask=mask, **images, **GREEDY)
        assert answer.tokens.tolist() == known[:, ids.shape[1] :].tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


def test_llava_two_turns(llava) -> None:
    """The second turn brings an image of its own."""
    fast, engine = llava
    for seed in range(3):
        ids, pixels, _ = image_prompt("titt", seed=seed)
        more, others, _ = image_prompt("ttitt", seed=seed + 10)
        want = fast(input_ids=ids, pixel_values=pixels)
        want = fast(input_ids=more, pixel_values=others, past_key_values=want.past_key_values)
        got = engine.prefill(ids, pixel_values=pixels)
        got = engine.prefill(more, pixel_values=others, cache=got.cache)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        step = engine.decode(got.logits.argmax(-1), got.cache)
        theirs = fast(input_ids=want.logits[:, -1:].argmax(-1), past_key_values=want.past_key_values)
        close(step.logits, theirs.logits[:, -1])


def test_llama_with_skips_and_adapters(llama) -> None:
    fast, engine = llama
    seen = set()
    batches = [("tvvtt",), ("t",), ("vvt", "ttt"), ("ttvv",), ("tvvttt", "vvtttt", "tttttt")]
    for seed, layouts in enumerate([*batches, ("..tvvtt", "vvvtttt", ".tttttt")]):
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


def test_prompts_and_steps_use_their_profiles(llava) -> None:
    engine = llava[1]
    _, graphs = load_fake(engine.folder)
    engine = type(engine)(engine.folder, engine.manifest, graphs, CPU)
    ids, pixels, mask = image_prompt("titt", "ittt")
    engine.generate(ids, pixel_values=pixels, attention_mask=mask, **OURS)
    stage = graphs["stage_0.onnx"]._engine.runs
    assert stage == [PREFILL] * 2 + [DECODE] * 4
    assert graphs["vision.onnx"]._engine.runs == [None, None]  # of one size: nothing to choose
    assert set(graphs["gate_0.onnx"]._engine.runs) == {PREFILL}


def test_cache_holds_less_above_exits_and_moves_when_full(llava) -> None:
    fast, engine = llava
    seed = next(s for s in range(20) if engine.prefill(*image_prompt("titt", seed=s)[:1],
                pixel_values=image_prompt("titt", seed=s)[1]).exit_layer[0] == 0)  # fmt: skip
    ids, pixels, _ = image_prompt("titt", seed=seed)
    got = engine.prefill(ids, pixel_values=pixels)
    lower, upper = got.cache.memories[:2]
    assert lower.nbytes / 1 > upper.nbytes / 2  # of one layer, and of two
    assert got.cache.lengths[:, 0].tolist() == [7, 3, 3, 3]
    want = fast(input_ids=ids, pixel_values=pixels)
    for _ in range(9):
        token = got.logits.argmax(-1)
        got = engine.decode(token, got.cache)
        want = fast(input_ids=torch.as_tensor(token)[:, None], past_key_values=want.past_key_values)
        close(got.logits, want.logits[:, -1])
    again = engine.prefill(ids, pixel_values=pixels, room=9)
    assert again.cache.nbytes == 2 * 2 * 8 * 4 * ((7 + 9) + 3 * (3 + 9))


@pytest.mark.parametrize("blocks", [False, thorough(True)])
@pytest.mark.parametrize(("window", "softcap"), [*(thorough(window, 0.0) for window in (0, 1, 3, 7)), (3, 0.5)])
def test_windows_blocks_and_capped_scores(window: int, softcap: float, blocks: bool) -> None:
    """What stands for attention sees what the reference sees, in rows that are padded, behind pasts and in blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 32), (2, 4, 16), (2, 4, 16), (2, 2, 6, 8), (2, 2, 6, 8))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    rows = (torch.tensor([6, 2]), torch.tensor([4, 3]))
    function, expected = TENSORRT.lowered[CACHED], TENSORRT.expected[CACHED]
    of_tokens = torch.tensor([[0, 0, -1, 1], [-1, 2, 2, -1]]) if blocks else None
    got, want = (of(*values, *rows, 4, 2, 0.3, window, of_tokens, softcap) for of in (function, expected))
    for b, count in enumerate(rows[1].tolist()):
        close(got[0][b, :count], want[0][b, :count])
    close(got[1], want[1])


def test_rotations_of_heads_whose_number_is_a_symbol() -> None:
    """Where heads are normed (Qwen3), their number is not known to be one when a piece is converted."""

    def function(x, like, cos, sin):
        return (rotate(x.view(*like.shape[:2], -1, 8).flatten(-2), cos, sin, 4),)

    examples = [torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size)) for size in (32, 7, 4, 4)]
    model = convert(function, examples, [{0, 1}] * 4, ["y"], TENSORRT)
    check(model, function, [x[:2, :1] for x in examples])
    assert not {node.op_type for node in model.graph} & {"SplitToSequence", "SequenceAt"}


def test_half_precision(llava, tmp_path: Path) -> None:
    """Types are those of the model; the numbers are compared with the model in float32."""
    fast, _ = llava
    engine = exported(fast, tmp_path / "engine", precision="fp16")
    assert engine.manifest.precision == engine.manifest.model.dtype == "float16"
    graph = onnx.load(engine.folder / "stage_1.onnx").graph
    floats = {v.name for v in graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    assert "hidden_states" in floats
    assert "past_key_values.1.key" in floats
    ids, pixels, _ = image_prompt("titt", seed=1)
    want = fast(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    got = engine.prefill(ids, pixel_values=pixels)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(torch.as_tensor(got.logits), want.logits[:, -1], rtol=3e-2, atol=3e-2)


def test_multimodal_rotary_positions(tmp_path: Path) -> None:
    """Qwen2-VL, with images of any size: an exit for rows that have them, decode steps, a second turn."""
    model = tiny_family("qwen2_vl")
    fast = optimize(model, plan(StaticExit(1)), compile=False)
    vte_compile.export(fast, tmp_path / "engine", target="tensorrt", build=False, profiles=SIZES)
    engine, _ = load_fake(tmp_path / "engine")
    assert engine.manifest.model.position_rows == 3
    first, second = family_inputs("qwen2_vl", [1, 0, 2]), family_inputs("qwen2_vl", [1, 1, 0], seed=1)
    answer = engine.generate(**first, max_new_tokens=4, eos_token_ids=[])
    known = fast.generate(**first, do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert answer.tokens.tolist() == known[:, first["input_ids"].shape[1] :].tolist()
    assert answer.exit_layer.tolist() == known.exit_layer.tolist() == [1, -1, 1]
    want, got = fast(**first), engine.prefill(**first)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    want = fast(**(second | {"attention_mask": mask}), past_key_values=want.past_key_values, logits_to_keep=1)
    got = engine.prefill(**second, cache=got.cache)
    close(torch.as_tensor(got.logits), want.logits[:, -1])
    assert got.cache.next_positions.tolist() == want.past_key_values.next_positions.tolist()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llava_next", "idefics3", "mistral3"])
def test_image_encoders(name: str, tmp_path: Path) -> None:
    """Images in tiles, with masks, of any size."""
    vte_compile.export(
        optimized(name, "natural"), tmp_path / "engine", target="tensorrt", build=False, profiles=SIZES | LARGER
    )
    engine, _ = load_fake(tmp_path / "engine")
    inputs = family_inputs(name, [2, 0, 1], seed=1)
    want = oracle_of(name, "natural").forward(**handed_over(name, inputs))
    got = engine.prefill(**inputs)
    close(torch.as_tensor(got.logits), want.logits[:, -1])
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
