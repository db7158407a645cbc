"""What a TensorRT export writes, refuses and reports; its engines, where TensorRT (or that for RTX) is installed."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fake_tensorrt import CPU, build_fake, fake, load_fake
from tiny_families import tiny_family
from tiny_models import (
    IMAGE,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny_llava,
)
from typer.testing import CliRunner

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.cli import app
from vte_compile.errors import EngineError, InputError
from vte_compile.export import tensorrt_target
from vte_compile.export.folder import read_manifest
from vte_compile.export.manifest import MANIFEST, encode
from vte_compile.export.tensorrt_build import build_engine, import_tensorrt
from vte_compile.export.tensorrt_coverage import coverage, refusal
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
    assert facts.sizes == {name: list(sizes) for name, sizes in SIZES.items()}
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
        ({"precision": "fp8"}, "ModelOpt"),
        ({"precision": "int3"}, "'int3' is unknown; there are 'fp32', 'fp16', 'bf16'"),
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
    (folder / MANIFEST).write_bytes(encode(replace(facts, position_rows=3)))
    with pytest.raises(vte_compile.errors.UnsupportedModelError, match="multimodal rotary positions"):
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


# ---------------------------------------------------------------- coverage


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl"])
def test_all_decoder_nodes_are_in_engines(family: str) -> None:
    fast = optimize(tiny_family(family), plan(gate(0), gate(2)), compile=False)
    found = coverage(fast, profiles=SIZES)
    assert found.decoder_nodes == found.decoder_placed > 300
    assert [e.layers for e in found.engines if e.layers] == [[0], [1, 2], [3]]
    assert not [e for engine in found.engines for e in engine.exceptions]
    assert ("image encoder" in found.host) == (family == "qwen2_vl")
    assert "exit decisions" in found.host


def node(kind: str, *inputs: ir.Value, domain: str = "") -> ir.Node:
    return ir.node(kind, list(inputs), domain=domain)


def value(dtype: str, constant: bool = False) -> ir.Value:
    tensor = ir.tensor(np.zeros(1, np.int64)) if constant else None
    return ir.Value(name="x", type=ir.TensorType(ir.DataType[dtype]), const_value=tensor)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (node("Add", value("FLOAT")), None),
        (node("CumSum", value("INT64"), value("INT64", True)), "not for INT64"),
        (node("CumSum", value("FLOAT"), value("INT64")), "wants a constant"),
        (node("CumSum", value("FLOAT"), value("INT64", True)), None),
        (node("Where", value("BOOL"), value("INT64")), None),
        (node("Add", value("DOUBLE")), "x is DOUBLE"),
        (node("NonZero", value("BOOL")), "does not know this operator"),
        (node("GroupQueryAttention", value("FLOAT"), domain="com.microsoft"), "domain com.microsoft"),
        (node("Add", ir.Value(name="x")), "is not known"),
    ],
)
def test_what_tensorrt_does_not_take(found: ir.Node, reason: str | None) -> None:
    why = refusal(found)
    assert why is None if reason is None else why is not None and reason in why


@pytest.mark.slow
def test_dry_run_of_the_command(tmp_path: Path, fast) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    fast.plan.save_pretrained(tmp_path / "plan")
    arguments = ["export", str(tmp_path / "model"), "--plan", str(tmp_path / "plan"), "--target", "tensorrt"]
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--profile", "batch=1,1,2"])
    assert result.exit_code == 0, result.output
    assert "decoder nodes are in engines (100%)" in result.output
    assert "host: exit decisions" in result.output
    assert "trtexec --onnx=stage_0.onnx" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "plan"]
    for more, message in (
        (["--dry-run", "--out", str(tmp_path / "x")], "--dry-run without it"),
        (["--dry-run", "--profile", "batch=a"], "expected NAME=MIN,OPT,MAX"),
        (["--dry-run", "--target", "aoti"], "of target tensorrt only"),
    ):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 1
        assert message in result.output


# ---------------------------------------------------------------- where TensorRT is installed


RTX = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (tensorrt-rtx)")


@RTX
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_for_rtx_builds_all_engines(fast, tmp_path: Path, precision: str) -> None:
    """NVIDIA's own parser and builder take every graph, with these profiles; no GPU is needed for that."""
    folder = tmp_path / "engine"
    options = {"precision": precision, "profiles": SIZES}
    vte_compile.export(fast, folder, target="tensorrt", build="tensorrt_rtx", **options)
    facts = manifest(folder)
    assert facts.builder is not None
    assert facts.builder.package == "tensorrt_rtx"
    for engine in facts.engines:
        assert (folder / engine.engine).stat().st_size > 10_000
        assert (folder / f"{engine.engine}.sha256").is_file()
    assert not [name for name in json.loads((folder / MANIFEST).read_text())["files"] if name.startswith("engines")]


@RTX
def test_a_graph_that_tensorrt_refuses(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abacus", ["x"], ["y"], "first")], "g", [x], [x])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"g\.onnx: TensorRT .* does not take the graph: .*Abacus"):
        build_engine(import_tensorrt("tensorrt_rtx"), tmp_path / "g.onnx", [])


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("tensorrt") is None, reason="TensorRT is not installed")
def test_engines_on_a_gpu(fast, tmp_path: Path) -> None:
    """Built and run by TensorRT: what the optimized model gives, token for token."""
    vte_compile.export(fast, tmp_path / "engine", target="tensorrt", build="tensorrt", profiles=SIZES)
    engine = load_engine(tmp_path / "engine")
    for seed in range(6):
        ids, pixels, mask = image_prompt("titt", "ittt", seed=seed)
        options = {"max_new_tokens": 5, "do_sample": False}
        answer = engine.generate(ids, pixel_values=pixels, attention_mask=mask, eos_token_ids=[], **options)
        known = fast.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, pad_token_id=0, eos_token_id=None, **options
        )
        assert answer.tokens.tolist() == known[:, ids.shape[1] :].tolist()
