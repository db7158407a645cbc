"""Engines compiled by AOTInductor give what the optimized model gives, also where transformers is not installed.

Compiling takes most of the time: two engines for all tests, which share pieces through Inductor's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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
from vte_compile.errors import EngineError, InputError
from vte_compile.export import aoti_target
from vte_compile.export.manifest import MANIFEST, SCHEMA_VERSION, ExitCall, Manifest, PieceCall, decode, encode
from vte_compile.runtime.inductor import missing_compiler

_MISSING = missing_compiler(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_MISSING is not None, reason=f"AOTInductor cannot compile: {_MISSING}"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).resolve().parent.parent
GREEDY = dict(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
OURS = dict(max_new_tokens=5, eos_token_ids=[])


def exported(fast, folder: Path):
    """The engine of a model, with C++ around the kernels that is quick to compile."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        assert vte_compile.export(fast, folder, target="aoti") == folder
    return load_engine(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A gate behind 0, an exit behind 1; attentions skipped with a folded adapter that is routed, and without."""
    parts = plan(gate(0, 0.5), StaticExit(1), SkippedAttention(1, random_adapter(PIA)), SkippedAttention(2))
    fast = optimize(tiny(num_hidden_layers=3), parts, compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llama") / "engine")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Exits behind 0, 2 and the last layer."""
    fast = optimize(tiny_llava(), plan(gate(0), gate(2), gate(3)), compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llava") / "engine")


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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
        assert got.cache.lengths.tolist() == want.past_key_values.lengths.tolist()
        answer = engine.generate(ids, attention_mask=mask, **images, **OURS)
        known = fast.generate(input_ids=ids, attention_mask=mask, **images, **GREEDY)
        assert answer.tokens.tolist() == known[:, ids.shape[1] :].tolist()
        assert answer.exit_layer.tolist() == known.exit_layer.tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


def test_batches_are_packed(llava, llama, monkeypatch) -> None:
    """Rows of a batch run at once, and each is what it is alone; with routed adapters, they run one by one."""
    engine = llava[1]
    program, seen = engine._loaded.programs["packed"], []
    run = program.run
    monkeypatch.setattr(program, "run", lambda inputs, rows: seen.append(list(rows.lengths)) or run(inputs, rows))
    layouts = (".titt", "tittt", "....tttt", "..itt")
    ids, pixels, mask = image_prompt(*layouts, seed=2)
    together = engine.prefill(ids, attention_mask=mask, pixel_values=pixels)
    [lengths], features = seen, list(engine.encode_images(pixels).split(4))
    assert lengths == mask.sum(1).tolist()
    for b, layout in enumerate(layouts):
        given = [features.pop(0) for _ in range(layout.count("i"))]
        alone = engine.prefill(ids[b : b + 1, mask[b].bool()], image_features=given or None)
        close(together.logits[b], alone.logits[0])
        assert together.exit_layer[b] == alone.exit_layer[0]
        assert together.cache.lengths[:, b].tolist() == alone.cache.lengths[:, 0].tolist()
    assert seen == [lengths]
    assert len(set(together.exit_layer.tolist())) > 1
    assert "packed" not in llama[1].manifest.phases


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
    embeds[visual] = features
    close(engine.prefill(inputs_embeds=embeds, visual_mask=visual).logits, want.logits)


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


def test_end_tokens(llama) -> None:
    _, engine = llama
    inputs = dict(zip(("inputs_embeds", "visual_mask"), chunk("tvvtt", "ttttt"), strict=False))
    free = engine.generate(**inputs, **OURS).tokens
    end = int(free[0, 1])
    answer = engine.generate(**inputs, max_new_tokens=5, eos_token_ids=[end]).tokens
    assert answer[0].tolist() == [*free[0, :2].tolist(), *[engine.manifest.model.pad_token_id] * (len(answer[0]) - 2)]
    alone = {name: value[:1] for name, value in inputs.items()}
    assert engine.generate(**alone, max_new_tokens=5, eos_token_ids=[end]).tokens.shape == (1, 2)


def test_equal_layers_are_one_piece(llava, llama) -> None:
    """Of four layers, none is compiled twice: before, in and behind the layers, the last one, and the encoder."""
    manifest = llava[1].manifest
    folder = llava[1].folder
    steps = {name: [s for s in p.steps if isinstance(s, PieceCall)] for name, p in manifest.phases.items()}
    assert [len(s) for s in steps.values()] == [6, 6, 5, 6]
    compiled = list((folder / "pieces").glob("*.pt2"))
    assert len(compiled) <= 12
    assert {f"pieces/{file.name}" for file in compiled} < set(manifest.files)
    assert steps["decode"][1].piece == steps["decode"][3].piece
    assert steps["decode"][1].weights != steps["decode"][3].weights
    assert [s.layer for s in manifest.phases["prefill"].steps if isinstance(s, ExitCall)] == [0, 2, 3]
    assert llama[1].manifest.phases["decode"].kv == [0, None, None]
    assert not [name for name in llama[1].manifest.files if name.endswith((".pkl", ".pt", ".bin"))]


def test_bad_inputs(llava, llama) -> None:
    engine, text = llava[1], llama[1]
    ids, pixels, mask = image_prompt("titt")
    embeds = torch.zeros(1, 4, C)
    for message, arguments in [
        ("exactly one of input_ids and inputs_embeds", {}),
        ("at most one of image_features", {"input_ids": ids, "pixel_values": pixels, "image_features": pixels}),
        ("hold 4 visual placeholders", {"input_ids": ids}),
        ("expected \\[4, 32\\]", {"input_ids": ids, "image_features": torch.zeros(3, C)}),
        ("expected \\[images, 3, 8, 8\\]", {"input_ids": ids, "pixel_values": pixels[:, :, :4]}),
        ("attention_mask: expected", {"input_ids": ids[:, 5:], "attention_mask": mask}),
        ("pass visual_mask", {"inputs_embeds": embeds}),
        ("visual_mask: expected a bool", {"inputs_embeds": embeds, "visual_mask": torch.zeros(1, 4)}),
        ("outside the vocabulary", {"input_ids": ids[:, 5:] + 100}),
        ("expected token ids", {"input_ids": ids[:, 5:].float()}),
        ("inputs_embeds: expected shape", {"inputs_embeds": embeds[:, :, 1:]}),
        ("leave image_features out", {"inputs_embeds": embeds, "image_features": torch.zeros(4, C)}),
    ]:
        with pytest.raises(InputError, match=message):
            engine.prefill(**arguments)
    with pytest.raises(InputError, match="a language model alone"):
        text.prefill(ids, pixel_values=pixels)
    with pytest.raises(InputError, match="max_new_tokens"):
        text.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=0)
    with pytest.raises(InputError, match="tokens: expected shape"):
        text.decode(torch.ones(1, 1, dtype=torch.long), text.prefill(torch.ones(1, 2, dtype=torch.long)).cache)


_ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import vte_compile
from safetensors.torch import load_file

engine, inputs = vte_compile.load_engine(sys.argv[1]), load_file(sys.argv[2])
answer = engine.generate(**inputs, max_new_tokens=5, eos_token_ids=[])
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
print(json.dumps([answer.tokens.tolist(), answer.exit_layer.tolist()]))
"""


def test_in_a_process_without_transformers_and_after_a_move(llava, tmp_path: Path) -> None:
    fast, engine = llava
    shutil.copytree(engine.folder, tmp_path / "moved")
    ids, pixels, mask = image_prompt("titt", "ittt", seed=5)
    save_file({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}, tmp_path / "inputs.safetensors")
    process = subprocess.run(
        [sys.executable, "-c", _ALONE, tmp_path / "moved", tmp_path / "inputs.safetensors"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    known = fast.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, **GREEDY)
    assert json.loads(process.stdout) == [known[:, ids.shape[1] :].tolist(), known.exit_layer.tolist()]


# ---------------------------------------------------------------- the folder


@pytest.fixture
def folder(llama, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama[1].folder, tmp_path / "engine"))


def rewritten(folder: Path, **changes: object) -> None:
    """A manifest that was written like this, rather than damaged."""
    manifest = replace(Manifest.from_body(decode((folder / MANIFEST).read_bytes())), **changes)
    (folder / MANIFEST).write_bytes(encode(manifest))


@pytest.mark.parametrize("name", ["pieces/prefill_0.pt2", "weights-00001.safetensors", "plan/vte_plan.json"])
def test_damaged_files(folder: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr("vte_compile.export.aoti.load_piece", lambda file: pytest.fail("code was loaded"))
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(EngineError, match=rf"{file.name}: has {len(content) - 1} bytes instead of"):
        load_engine(folder)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineError, match=f"{file.name}: was altered"):
        load_engine(folder)
    file.unlink()
    with pytest.raises(EngineError, match=f"{file.name}: is missing"):
        load_engine(folder)


def test_damaged_manifest(folder: Path) -> None:
    file = folder / MANIFEST
    content = file.read_text()
    for changed, message in [
        (content[:100], "damaged"),
        ("[]", "not of an engine"),
        (
            content.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 1'),
            "schema_version 1, but this",
        ),
        (content.replace('"threshold": 0.5', '"threshold": 0.4'), "altered"),
    ]:
        assert changed != content
        file.write_text(changed)
        with pytest.raises(EngineError, match=message):
            load_engine(folder)
    file.unlink()
    with pytest.raises(EngineError, match=r"manifest\.json: No such file"):
        load_engine(folder)


def test_made_for_something_else(folder: Path, llama) -> None:
    built = llama[1].manifest.built
    for name, value, message in [
        ("torch", "2.1.0", "for torch 2.1.0, this is torch"),
        ("processor", "AVX9", "processor AVX9, this one has"),
        ("machine", "abacus", "machine abacus"),
    ]:
        rewritten(folder, built=replace(built, **{name: value}))
        with pytest.raises(EngineError, match=f"{message}.*: export the model again here"):
            load_engine(folder)
    if not torch.cuda.is_available():
        rewritten(folder, built=replace(built, device="cuda"))
        with pytest.raises(EngineError, match="finds no CUDA GPU"):
            load_engine(folder)
    rewritten(folder, built=built, target="abacus")
    with pytest.raises(EngineError, match="target 'abacus'"):
        load_engine(folder)
    rewritten(folder, target="aoti", files={"../outside": llama[1].manifest.files["plan/vte_plan.json"]})
    with pytest.raises(EngineError, match="outside the engine"):
        load_engine(folder)


def test_export_replaces_an_engine_and_nothing_else(llama, folder: Path, tmp_path: Path, monkeypatch) -> None:
    fast = llama[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    with pytest.raises(EngineError, match="holds something else than an engine"):
        vte_compile.export(fast, other)
    with pytest.raises(EngineError, match="is no folder"):
        vte_compile.export(fast, other / "thesis.txt")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = (folder / MANIFEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(aoti_target, "_write_weights", interrupted)
        patch.setattr("vte_compile.export.aoti.compile_piece", lambda module, key, examples, file, *_: file.touch())
        for target in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                vte_compile.export(fast, target, target="aoti")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["engine", "other"]
    assert (folder / MANIFEST).read_bytes() == before
    (folder / "left over").touch()
    exported(fast, folder)  # from the cache
    assert not (folder / "left over").exists()
