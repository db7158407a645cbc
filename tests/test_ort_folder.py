"""ONNX engines: their folders, what load_engine() refuses, and what a process needs to run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from test_packaging import modules_after
from tiny_models import gate, one_thread, plan, tiny  # noqa: F401

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.errors import EngineError, InputError
from vte_compile.export.engine import Engine
from vte_compile.export.manifest import MANIFEST, SCHEMA_VERSION, decode, encode
from vte_compile.export.onnx_manifest import ExitFacts, OnnxManifest
from vte_compile.export.ort_engine import OnnxEngine

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of two layers with a gate between them, and its engine."""
    fast = optimize(tiny(num_hidden_layers=2), plan(gate(0)), compile=False)
    return fast, vte_compile.export(fast, tmp_path_factory.mktemp("llama") / "engine", target="onnxruntime")


@pytest.fixture
def folder(exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[1], tmp_path / "engine"))


@pytest.fixture
def nothing_loaded(monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a graph was loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


def manifest_of(folder: Path) -> OnnxManifest:
    return OnnxManifest.from_body(decode((folder / MANIFEST).read_bytes()))


def rewritten(folder: Path, **changes: object) -> None:
    """A manifest that was written like this, rather than damaged."""
    (folder / MANIFEST).write_bytes(encode(replace(manifest_of(folder), **changes)))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["stage_1.onnx", "decoder.onnx", "weights-00001.data", "generation_config.json"])
@pytest.mark.usefixtures("nothing_loaded")
def test_damaged_files(folder: Path, name: str) -> None:
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


@pytest.mark.usefixtures("nothing_loaded")
def test_damaged_manifest(folder: Path) -> None:
    file = folder / MANIFEST
    content = file.read_text()
    for changed, message in [
        (content[:100], "damaged"),
        (content.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 0'), "schema_version 0, but this"),
        (content.replace('"dtype": "float32"', '"dtype": "float16"'), "altered"),
    ]:
        assert changed != content
        file.write_text(changed)
        with pytest.raises(EngineError, match=message):
            load_engine(folder)
    file.unlink()
    with pytest.raises(EngineError, match=r"manifest\.json: No such file"):
        load_engine(folder)


@pytest.mark.usefixtures("nothing_loaded")
def test_manifests_that_name_what_is_not_theirs(folder: Path) -> None:
    known = manifest_of(folder)
    stages = known.stages
    for changes, message in [
        ({"embedding": "../embedding.onnx"}, r"\.\./embedding\.onnx is not among its files"),
        ({"decoder": "/decoder.onnx"}, "/decoder.onnx is not among its files"),
        ({"stages": [replace(stages[0], exit=ExitFacts(0, "gate_9.onnx")), stages[1]]}, "gate_9.onnx is not among"),
        ({"files": {**known.files, "../outside": known.files["decoder.onnx"]}}, "outside the engine"),
        ({"model": replace(known.model, dtype="bfloat16")}, "dtype 'bfloat16', but the runner takes float32, float16"),
        ({"provider": "abacus"}, "provider: 'abacus' is unknown"),
        ({"runtime": "1000.1"}, "counts sliding windows in another way: install 1000.1 or a later one"),
    ]:
        rewritten(folder, **changes)
        with pytest.raises((EngineError, InputError), match=message):
            load_engine(folder)
        (folder / MANIFEST).write_bytes(encode(known))


def test_graphs_that_are_not_what_the_manifest_says(folder: Path) -> None:
    known = manifest_of(folder)
    stages = known.stages
    for changes, message in [
        ({"embedding": "gate_0.onnx"}, r"gate_0\.onnx: its inputs are not those of this schema"),
        ({"stages": stages[:1]}, "stages do not end with the only one without exit"),
        ({"stages": [stages[0], replace(stages[1], file="decoder.onnx")]}, r"decoder\.onnx: its inputs are not"),
        ({"stages": [], "decoder": "stage_1.onnx"}, "stage_1.onnx: .*no fixed number of stages"),
        ({"stages": [], "decoder": None}, "names no decoder"),
        ({"embedding": "plan/vte_plan.json"}, r"vte_plan\.json: ONNX Runtime .* cannot load it"),
    ]:
        rewritten(folder, **changes)
        with pytest.raises(EngineError, match=message):
            load_engine(folder)
        (folder / MANIFEST).write_bytes(encode(known))


# ---------------------------------------------------------------- options


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "tpu"}, "provider: 'tpu' is unknown; there are 'cpu', 'cuda'"),
        ({"threads": 0}, "threads: expected a number of at least 1"),
        ({"threads": True}, "threads: expected a number of at least 1"),
        ({"form": "liquid"}, "form: 'liquid' is unknown; there are 'staged', 'single'"),
    ],
)
def test_impossible_options(exported, options, message) -> None:
    with pytest.raises(InputError, match=message):
        load_engine(exported[1], **options)


def test_a_form_that_is_not_there(folder: Path) -> None:
    rewritten(folder, stages=[])
    with pytest.raises(InputError, match="form: 'staged' is not in this engine, which has 'single'"):
        load_engine(folder, form="staged")
    assert load_engine(folder).generate([[3, 4]], max_new_tokens=1).tokens.shape == (1, 1)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_provider_that_is_not_there(exported, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AbacusProvider", "CPUExecutionProvider"])
    message = r"provider 'cuda': .* only AbacusProvider, CPUExecutionProvider: pass provider='cpu', or install"
    with pytest.raises(EngineError, match=message):
        load_engine(exported[1], provider="cuda")
    rewritten(folder, provider="cuda")
    with pytest.raises(EngineError, match=message):
        load_engine(folder)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA may well start here")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start(exported, monkeypatch) -> None:
    """ONNX Runtime then goes on with another one, and only logs it."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(EngineError, match="CUDAExecutionProvider could not be started, ONNX Runtime chose CPU"):
        load_engine(exported[1], provider="cuda")


def test_an_explicit_cpu_runs_what_was_made_for_a_gpu(folder: Path) -> None:
    rewritten(folder, provider="cuda")
    assert load_engine(folder, provider="cpu", threads=1).device.kind == "cpu"


@pytest.mark.usefixtures("nothing_loaded")
def test_without_onnxruntime(exported, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"need onnxruntime .*: pip install 'vte-compile\[onnx\]'"):
        load_engine(exported[1])


def test_compiled_engines_take_no_such_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="provider, threads: options of ONNX engines"):
        Engine.load(tmp_path, {}, provider="cpu", threads=2)


def test_text_needs_a_tokenizer(exported) -> None:
    engine = load_engine(exported[1], threads=1)
    assert isinstance(engine, OnnxEngine)
    with pytest.raises(EngineError, match="has no tokenizer: export the model with processor="):
        engine.chat("hello")
    with pytest.raises(EngineError, match="has no tokenizer"):
        engine.generate([[3]], stop_strings="x")


# ---------------------------------------------------------------- what a process needs

BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "onnx"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import vte_compile
"""


def test_in_a_process_without_torch_and_after_a_move(exported, folder: Path, tmp_path: Path) -> None:
    code = (
        f"{BLOCKED}\n"
        "engine = vte_compile.load_engine(sys.argv[1], threads=1)\n"
        "answer = engine.generate([[3, 4, 5], [6, 7]], max_new_tokens=5, eos_token_ids=[])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps(answer.tokens.tolist()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    known = load_engine(exported[1]).generate([[3, 4, 5], [6, 7]], max_new_tokens=5, eos_token_ids=[])
    assert np.array_equal(json.loads(process.stdout), known.tokens)


def test_what_manifests_and_errors_load(tmp_path: Path) -> None:
    modules = "errors export export.folder export.manifest export.onnx_manifest export.ort_engine".split()
    loaded = modules_after("".join(f"import vte_compile.{name}\n" for name in modules), tmp_path)
    assert not loaded & {"torch", "transformers", "onnxruntime", "onnx", "PIL", "jinja2", "tokenizers"}
