"""InternVL: checkpoints in the authors' layout against their code's numbers, and optimize() of them against the oracle.

data/internvl.npz holds what the authors' InternVLChatModel (OpenGVLab/InternVL, run aside with transformers 4.46.3,
attention "eager", float32) gives for the weights and three prompts of tests/tiny_internvl.py: visual tokens, logits,
and eight greedy tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import write_weights
from tiny_internvl import LAYERS, TOKENS, VARIANTS, VOCAB, C, inputs, weights, write_internvl
from tiny_models import DATA, NEVER, assert_close, assert_relative, one_thread, plan, random_adapter  # noqa: F401

from vte_compile import GateExit, Oracle, Plan, SkippedAttention, StaticExit, export, load_engine, optimize
from vte_compile.adapters import PIA
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.cache_name import cache_name, cache_of
from vte_compile.families.internvl import load_internvl
from vte_compile.oracle import embed

QWEN2, INTERNLM2 = VARIANTS
GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, eos_token_id=VOCAB - 1)


@functools.cache
def loaded(name: str) -> Any:
    """A model that no test may change."""
    return load_internvl(write_internvl(Path(mkdtemp()) / "checkpoint", **VARIANTS[name]))


@functools.cache
def traced(name: str) -> Any:
    """What is traced is shared by all plans."""
    return optimize(loaded(name), Plan(), compile=False)


def of(name: str, key: str) -> torch.Tensor:
    """A number of the authors', for a variant."""
    with np.load(DATA / "internvl.npz") as data:
        return torch.from_numpy(data[f"{list(VARIANTS).index(name)}.{key}"])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.shows("images", "internvl_chat")
def test_numbers_are_the_authors(name: str) -> None:
    model, given = loaded(name), inputs()
    real = given["attention_mask"].bool()
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"]).pooler_output
        assert_relative(features, of(name, "features"))
        assert_relative(model(**given).logits[real], of(name, "logits")[real])
        assert_relative(traced(name)(**given).logits[:, -1], of(name, "logits")[:, -1])
    tokens = traced(name).generate(**given, **GREEDY)
    assert tokens[:, given["input_ids"].shape[1] :].tolist() == of(name, "tokens").tolist()
    assert model.generation_config.eos_token_id == [VOCAB - 1]


def gate(layer: int, threshold: float) -> GateExit:
    generator = torch.Generator().manual_seed(layer)
    w1, w2 = torch.randn(5, 2 * C, generator=generator) * 0.2, torch.randn(2, 5, generator=generator)
    return GateExit(layer, w1, w2, threshold)


@pytest.mark.parametrize("parts", ["first", "middle, skip", "never"])
@pytest.mark.shows("exits", "internvl_chat")
@pytest.mark.shows("generate", "internvl_chat")
@pytest.mark.shows("skips", "internvl_chat")
def test_optimized_internlm2_gives_the_oracles_numbers_and_tokens(parts: str) -> None:
    skip = SkippedAttention(LAYERS - 1, random_adapter(PIA, hidden_size=C))
    planned, layer = {
        "first": (plan(StaticExit(0)), 0),
        "middle, skip": (plan(gate(0, NEVER), StaticExit(1), skip), 1),
        "never": (plan(gate(1, NEVER)), -1),
    }[parts]
    model, given = loaded(INTERNLM2), inputs()
    embeds, visual = embed(model, given["input_ids"], given["pixel_values"])
    assert visual.sum(1).tolist() == [2 * TOKENS, TOKENS, 0]
    fast, oracle = optimize(traced(INTERNLM2), planned), Oracle(model, planned)
    expected = oracle.forward(embeds, visual, given["attention_mask"].bool())
    with torch.no_grad():
        assert_close(fast(**given).logits[:, -1], expected.logits[:, -1], 1e-4)
    tokens = fast.generate(**given, **{**GREEDY, "eos_token_id": -1})
    assert tokens.exit_layer.tolist() == [layer, layer, -1]
    answers = oracle.generate(embeds, visual, given["attention_mask"].bool(), max_new_tokens=8)
    assert tokens[:, given["input_ids"].shape[1] :].tolist() == answers.tokens


@pytest.mark.shows("second turn", "internvl_chat")
def test_second_turn() -> None:
    """Of text, and one with tiles of its own, whose tokens leave, too; without exits, it is the rest of one prompt."""
    model, pixels = loaded(INTERNLM2), inputs()["pixel_values"]
    image = model.config.image_token_id
    turns = [
        ([3, 4, *[image] * 2 * TOKENS, 5, 6], pixels[:2]),
        ([7, 8, 9], None),
        ([9, *[image] * TOKENS, 4], pixels[2:]),
    ]
    for planned, layers in ((plan(), [-1, -1, -1]), (plan(gate(0, NEVER), StaticExit(1)), [1, -1, 1])):
        fast, oracle = optimize(traced(INTERNLM2), planned), Oracle(model, planned)
        cache: dict[str, Any] = {}
        known, logits = None, []
        for (ids, tiles), layer in zip(turns, layers, strict=True):
            given = {"input_ids": torch.tensor([ids])} | ({} if tiles is None else {"pixel_values": tiles})
            with torch.no_grad():
                out = fast(**given, **cache)
            want = oracle.forward(*embed(model, **given), cache=known)
            assert out.exit_layer.tolist() == want.exit_layer.tolist() == [layer]
            assert_close(out.logits, want.logits, 1e-4)
            assert cache_of(out).lengths.T.tolist() == want.cache.lengths()
            cache, known = {cache_name(fast): cache_of(out)}, want.cache
            logits.append(out.logits)
        if not planned.exits:
            whole = torch.tensor([[token for ids, _ in turns for token in ids]])
            with torch.no_grad():
                assert_close(torch.cat(logits, 1), model(input_ids=whole, pixel_values=pixels).logits, 1e-4)


@pytest.mark.thorough
@pytest.mark.shows('backend="vte"', "internvl_chat")
def test_backend(tmp_path: Path) -> None:
    """The same through torch.compile(backend="vte"): two tiles, one and none; and decode steps."""
    torch._dynamo.reset()
    model = load_internvl(write_internvl(tmp_path / "checkpoint", **VARIANTS[QWEN2]))
    planned, given = plan(gate(0, 0.1), StaticExit(1)), inputs()
    embeds, visual = embed(loaded(QWEN2), given["input_ids"], given["pixel_values"])
    want = Oracle(loaded(QWEN2), planned).generate(embeds, visual, given["attention_mask"].bool(), max_new_tokens=8)
    model.forward = torch.compile(model.forward, backend="vte", options={"plan": planned, "compile": False})
    out: Any = model.generate(**given, **{**GREEDY, "eos_token_id": -1}, return_dict_in_generate=True)
    assert out.sequences[:, -8:].tolist() == want.tokens
    assert exit_layers(cache_of(out)).tolist() == want.exit_layer.tolist()
    assert min(want.exit_layer.tolist()) == -1 < max(want.exit_layer.tolist())
    torch._dynamo.reset()


@pytest.mark.thorough
@pytest.mark.shows("ONNX Runtime", "internvl_chat")
def test_onnx_engine(tmp_path: Path) -> None:
    """InternLM2, read as a Llama, and the encoder of InternViT-6B's form: rows of two tiles, one and none."""
    skip = SkippedAttention(LAYERS - 1, random_adapter(PIA, hidden_size=C))
    model, given, planned = loaded(INTERNLM2), inputs(), plan(StaticExit(1), skip)
    export(optimize(traced(INTERNLM2), planned), tmp_path / "e", target="onnxruntime", forms=("staged",))
    engine: Any = load_engine(tmp_path / "e", threads=1)
    embeds, visual = embed(model, given["input_ids"], given["pixel_values"])
    prompt = (embeds, visual, given["attention_mask"].bool())
    oracle = Oracle(model, planned)
    want, got = oracle.forward(*prompt), engine.prefill(**given)
    assert_close(torch.from_numpy(got.logits), want.logits[:, -1], 1e-4)
    assert got.exit_layer.tolist() == want.exit_layer.tolist() == [1, 1, -1]
    answer = engine.generate(**given, max_new_tokens=8, eos_token_ids=[])
    assert answer.tokens.tolist() == oracle.generate(*prompt, max_new_tokens=8).tokens


def test_llama_dtype_and_saving(tmp_path: Path) -> None:
    """Half-precision files give a half-precision model; what is saved has transformers' layout."""
    folder = write_internvl(tmp_path / "checkpoint", llm="LlamaForCausalLM")
    half = {name: tensor.half() for name, tensor in weights("LlamaForCausalLM", large=False).items()}
    write_weights(folder, half, "safetensors")
    model: Any = load_internvl(folder)
    assert model.dtype == torch.float16
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dynamic_positions_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    model = load_internvl(write_internvl(tmp_path / "c", **VARIANTS[INTERNLM2], llm_config=scaling))
    assert "rows of more than 512 tokens would differ" in caplog.text
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, loaded(INTERNLM2)(**inputs()).logits)


def test_what_is_no_internvl_of_this_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot read it"):
        load_internvl(tmp_path)
    for number, (changed, error, message) in enumerate(
        (
            ({"model_type": "internvl"}, InputError, "model_type is 'internvl', not 'internvl_chat'"),
            ({"ps_version": "v1"}, UnsupportedModelError, "ps_version is 'v1'"),
            ({"use_llm_lora": 16}, UnsupportedModelError, "use_llm_lora: adapters beside the weights"),
            (
                {"llm_config": {"architectures": ["Phi3ForCausalLM"]}},
                UnsupportedModelError,
                "Phi3ForCausalLM: expected",
            ),
            ({"llm_config": {"num_hidden_layers": LAYERS + 1}}, InputError, r"lacks model\.language_model\.layers\.3"),
            ({"llm_config": {"num_hidden_layers": LAYERS - 1}}, InputError, r"has also model\.language_model\.layers"),
            ({"vision_config": {"image_size": 16}}, InputError, "position_embeddings: expected shape"),
            ({"vision_config": {"qk_normalization": True, "layer_norm_eps": 1e-5}}, UnsupportedModelError, "1e-05"),
        )
    ):
        folder = write_internvl(tmp_path / str(number), llm="Qwen2ForCausalLM", **changed)
        with pytest.raises(error, match=message):
            load_internvl(folder)
    folder = write_internvl(tmp_path / "files", llm="Qwen2ForCausalLM")
    (folder / "added_tokens.json").unlink()
    with pytest.raises(InputError, match=r"which id <IMG_CONTEXT> has"):
        load_internvl(folder)
    tokenizer = {"added_tokens_decoder": {"60": {"content": "<IMG_CONTEXT>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert load_internvl(folder).config.image_token_id == 60
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot read it"):
        load_internvl(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no safetensors files"):
        load_internvl(folder)
