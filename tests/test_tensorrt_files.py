"""What a TensorRT export writes and refuses: profiles, command lines, manifests; and what loading an engine refuses."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fake_tensorrt import CPU, build_fake, fake, load_fake
from tiny_models import (
    IMAGE,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny_llava,
)

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.errors import EngineError, InputError
from vte_compile.export import tensorrt_target
from vte_compile.export.folder import read_manifest
from vte_compile.export.manifest import MANIFEST, PatchFacts, VisionCall, encode
from vte_compile.export.tensorrt_build import import_tensorrt
from vte_compile.export.tensorrt_graph import TensorRTGraph
from vte_compile.export.tensorrt_manifest import TensorRTManifest
from vte_compile.export.tensorrt_profiles import DECODE, PREFILL, Profiles, fitting

SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 64), "visual": (1, 8, 32), "columns": (1, 32, 128)}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def fast():
    return optimize(tiny_llava(), plan(gate(0), gate(2)), compile=False)


@pytest.fixture(scope="module")
def exported(fast, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "engine"
    vte_compile.export(fast, folder, target="tensorrt", build=False, profiles=SIZES)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "engine"))


def manifest(folder: Path) -> TensorRTManifest:
    return TensorRTManifest.from_body(read_manifest(folder))


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": (2, 1, 8)}, "profiles.batch: expected"),
        ({"batch": (0, 1, 8)}, "profiles.batch: expected"),
        ({"prompt": (1, 2)}, "profiles.prompt: expected"),
        ({"prompt": (1, 2.0, 3)}, "profiles.prompt: expected"),
        ({"visual": (1, 800, 2880)}, "no room for text"),
        ({"columns": (1, 10, 2000)}, "a prompt of profiles.prompt fills 4096"),
    ],
)
def test_sizes_that_cannot_be(sizes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Profiles(**sizes)


def test_profiles_of_a_stage() -> None:
    shapes = {
        "hidden_states": ["batch", "tokens", 32],
        "keep": ["kept_tokens"],
        "past": ["batch", 2, "past_columns_3", 8],
    }
    prefill, decode = Profiles(**SIZES).of(shapes)
    assert prefill["hidden_states"] == ([1, 1, 32], [1, 16, 32], [1, 64, 32])
    assert prefill["keep"] == ([1], [8], [64])  # what text is usual, behind an exit
    assert prefill["past"] == ([1, 2, 1, 8], [1, 2, 1, 8], [1, 2, 128, 8])
    assert decode["hidden_states"] == ([1, 1, 32], [2, 1, 32], [4, 1, 32])
    assert decode["past"] == ([1, 2, 1, 8], [2, 2, 32, 8], [4, 2, 128, 8])
    assert Profiles().of({"pixel_values": [1, 3, 8, 8]}) == []
    assert len(Profiles().of({"visual_mask": ["batch", "tokens"]})) == 1
    with pytest.raises(InputError, match="its dim 'abacus' is in no profile"):
        Profiles().of({"x": ["abacus"]})


def test_profiles_of_frames() -> None:
    """What is of one size to the encoder's code is so at all of a profile's sizes."""
    shapes = {
        "pixel_values": ["patches", 96],
        "window_index": ["frame_tokens"],
        "windows": ["windows", "longest_window"],
    }
    sizes = Profiles(frame=(1, 10, 40))
    [frames] = sizes.of(shapes, VisionCall("", [], [], patches=PatchFacts(96, 2, 4)))
    assert frames["pixel_values"] == ([4, 96], [40, 96], [160, 96])
    assert frames["window_index"] == ([1], [10], [40])
    assert frames["windows"] == ([1, 4], [1, 64], [40, 64])
    [images] = sizes.of({"pixel_values": [1, 3, "height", "width"]}, VisionCall("", [], [3], unit=28))
    assert images["pixel_values"] == ([1, 3, 28, 28], [1, 3, 84, 84], [1, 3, 168, 168])


def test_which_profile_fits() -> None:
    profiles = Profiles(**SIZES).of({"x": ["batch", "tokens"], "past": ["batch", "past_columns_0"]})
    assert fitting(profiles, {"x": (1, 20), "past": (1, 1)}) == PREFILL
    assert fitting(profiles, {"x": (3, 1), "past": (3, 128)}) == DECODE
    assert fitting(profiles, {"x": (1, 1), "past": (1, 1)}) == DECODE
    assert fitting([], {"x": (1, 3)}) == 0
    with pytest.raises(InputError, match=r"profile 0 takes x from \[1, 1\] to \[1, 64\], got \[1, 65\]: export"):
        fitting(profiles, {"x": (1, 65), "past": (1, 1)})


# ---------------------------------------------------------------- what is written


def test_every_graph_has_a_line_that_builds_it(exported: Path) -> None:
    graphs = {file.name for file in exported.glob("*.onnx")}
    assert graphs == {"vision.onnx", "embedding.onnx", "stage_0.onnx", "stage_1.onnx", "stage_2.onnx", "gate_0.onnx",
                      "gate_2.onnx"}  # fmt: skip
    facts = manifest(exported)
    assert {engine.graph for engine in facts.engines} == graphs
    assert facts.builder is None
    assert facts.sizes == {name: list(sizes) for name, sizes in asdict(Profiles(**SIZES)).items()}
    script = (exported / "build.sh").read_text()
    for engine in facts.engines:
        assert f"\n{shlex.join(engine.trtexec)}\n" in script
        options = [option.partition("=") for option in engine.trtexec[1:]]
        assert dict((name, value) for name, _, value in options)["--onnx"] == engine.graph
        assert "--stronglyTyped" in engine.trtexec
        count = [name for name, _, _ in options].count("--minShapes")
        assert (
            count == len(engine.profiles) == {"vision": 0, "gate": 1}.get(engine.graph.split(".")[0].split("_")[0], 2)
        )
        inputs = {value.name: value.shape for value in ir.load(exported / engine.graph).graph.inputs}
        for profile in engine.profiles:
            named = {name for name, shape in inputs.items() if any(not isinstance(d, int) for d in shape)}
            assert set(profile) == named
    assert subprocess.run(["sh", "-n", exported / "build.sh"]).returncode == 0


def test_build_script_runs_trtexec(folder: Path, tmp_path: Path) -> None:
    """With a trtexec that only writes what it was told to: the engines and their checksums are where they belong."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "trtexec").write_text(
        f"#!{sys.executable}\nimport sys\nfile = [a for a in sys.argv if a.startswith('--saveEngine=')][0][13:]\n"
        "open(file, 'w').write(' '.join(sys.argv[1:]))\n"
    )
    (bin_ / "trtexec").chmod(0o755)
    process = subprocess.run(
        [folder / "build.sh"], env={"PATH": f"{bin_}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for engine in manifest(folder).engines:
        assert f"--onnx={engine.graph}" in (folder / engine.engine).read_text()
        assert (folder / f"{engine.engine}.sha256").read_text().split()[1] == Path(engine.engine).name


def test_graphs_are_standard_onnx(exported: Path) -> None:
    for file in exported.glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert {node.domain for node in model.graph.node} == {""}
    names = [node.name for node in onnx.load(exported / "stage_1.onnx", load_external_data=False).graph.node]
    assert any(name.startswith("layers.1.self_attn.q_proj/MatMul") for name in names)


def test_weights_are_written_once(fast, exported: Path) -> None:
    size = sum(file.stat().st_size for file in exported.glob("weights-*.data"))
    needed = sum(p.nbytes for p in fast.parameters())
    assert size < 1.3 * needed + 4096 * len(list(fast.parameters()))


def test_stripped_engines_are_asked_for(fast, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_target, "write_graphs", lambda *_: ([], None, None))
    vte_compile.export(fast, tmp_path / "e", target="tensorrt", build=False, strip_weights=True)
    shutil.copy(tmp_path / "e" / "manifest.json", tmp_path)
    assert manifest(tmp_path / "e").engines == []
    monkeypatch.setattr(tensorrt_target, "import_tensorrt", lambda _: fake)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="only where a GPU is"):
            vte_compile.export(fast, tmp_path / "f", target="tensorrt", build="tensorrt_rtx", strip_weights=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "pass calibration="),
        ({"precision": "fp16", "calibration": []}, "calibration: goes with precision='fp8'"),
        ({"precision": "fp8", "calibration": []}, "samples: there are none"),
        ({"precision": "int3"}, "'int3' is unknown; there are 'fp32', 'fp16', 'bf16', 'fp8'"),
        ({"profiles": {"abacus": (1, 2, 3)}}, "profiles: expected batch, prompt, visual, columns"),
        ({"profiles": {"batch": 3}}, "profiles: expected batch"),
        ({"build": "abacus"}, "build: 'abacus' is unknown"),
        ({"forms": ("single",)}, "'forms' is no option of target 'tensorrt'"),
    ],
)
def test_options_that_cannot_be(fast, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vte_compile.export(fast, tmp_path / "engine", target="tensorrt", **options)
    assert not list(tmp_path.iterdir())


def test_interrupted_export_leaves_nothing(fast, folder: Path, monkeypatch) -> None:
    before = (folder / MANIFEST).read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_target, "write_stages", interrupted)
    monkeypatch.setattr("vte_compile.export.onnx_decoder.OnnxDecoder.convert", lambda *_: None)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            vte_compile.export(fast, target, target="tensorrt", build=False)
    assert (folder / MANIFEST).read_bytes() == before
    assert [file.name for file in folder.parent.iterdir()] == ["engine"]


# ---------------------------------------------------------------- loading


def test_missing_tensorrt_says_what_to_install(folder: Path, monkeypatch) -> None:
    for package, remedy in (("tensorrt", "pip install tensorrt "), ("tensorrt_rtx", "pip install tensorrt-rtx")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(EngineError, match=f"{package} cannot be imported.*{remedy}"):
                import_tensorrt(package)
            if package == "tensorrt":
                with pytest.raises(EngineError, match=remedy):
                    load_engine(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1", Builder=None))
    with pytest.raises(EngineError, match=r"8\.6\.1 is installed, but 10\.0 or later"):
        import_tensorrt("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    with pytest.raises(EngineError, match="type stubs"):
        import_tensorrt("tensorrt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0", Builder=None))
    with pytest.raises(EngineError, match="torch finds none"):
        load_engine(folder)
    with pytest.raises(InputError, match="runs on an NVIDIA GPU"):
        load_engine(folder, provider="cpu")


def test_engines_that_are_missing_altered_or_of_another_version(folder: Path) -> None:
    facts = next(engine for engine in manifest(folder).engines if engine.graph == "stage_1.onnx")
    with pytest.raises(EngineError, match=r"stage_1\.engine: No such file.*run build\.sh"):
        TensorRTGraph(fake, folder, facts, CPU)
    build_fake(folder)
    file = folder / facts.engine
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"stage_1\.engine: was altered"):
        TensorRTGraph(fake, folder, facts, CPU)
    file.with_name(file.name + ".sha256").unlink()
    with pytest.raises(EngineError, match=r"for another version.*run build\.sh"):
        TensorRTGraph(fake, folder, facts, CPU)


def test_manifest_that_names_other_graphs(folder: Path) -> None:
    facts = manifest(folder)
    (folder / MANIFEST).write_bytes(encode(replace(facts, engines=facts.engines[1:])))
    with pytest.raises(EngineError, match=r"vision\.onnx is not among"):
        load_engine(folder)
    (folder / MANIFEST).write_bytes(encode(facts))
    (folder / "stage_1.onnx").unlink()
    with pytest.raises(EngineError, match=r"stage_1\.onnx: is missing"):
        load_engine(folder)


def test_inputs_that_no_profile_takes(folder: Path) -> None:
    engine, graphs = load_fake(folder)
    with pytest.raises(InputError, match=r"65 new tokens.*takes 64.*profiles\.prompt"):
        engine.prefill(np.ones((1, 65), np.int64))
    ids, *_ = image_prompt("tttt")
    rows = engine.prefill(np.ones((5, 2), np.int64))
    with pytest.raises(InputError, match=r"5 rows.*decodes 4.*profiles\.batch"):
        engine.decode(np.ones(5, np.int64), rows.cache)
    with pytest.raises(InputError, match=r"130 tokens of a row.*takes 128.*profiles\.columns"):
        engine.prefill(ids, room=130 - ids.shape[1])
    with pytest.raises(InputError, match="profile 0 takes image_features"):
        graphs["embedding.onnx"].run(
            {"input_ids": np.full((1, 40), IMAGE), "image_features": np.zeros((40, 32), np.float32)}, ["inputs_embeds"]
        )
