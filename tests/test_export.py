"""export() before anything is compiled: its name, its errors, its command, and what it needs to import."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from test_cli import _restore_log_level, llava, plan, run  # noqa: F401
from test_packaging import modules_after
from tiny_models import gate, one_thread, tiny, tiny_llava  # noqa: F401
from tiny_models import plan as exits
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import vte_compile
from vte_compile import Plan, optimize
from vte_compile.errors import CaptureError, EngineError, InputError, UnsupportedModelError
from vte_compile.export import aoti, aoti_target, staged
from vte_compile.export.manifest import MANIFEST, Built, Manifest, ModelFacts, decode, encode


@pytest.fixture(scope="module")
def fast():
    return optimize(tiny(num_hidden_layers=2), exits(gate(0)), compile=False)


@pytest.mark.parametrize(
    "imports",
    [
        "import vte_compile.export.manifest",
        "import vte_compile\nvte_compile.export\nimport vte_compile.export.manifest",
        "from vte_compile import export\nassert callable(export)\nimport vte_compile.export.manifest",
        "from vte_compile.export import export as function\nimport vte_compile.export.manifest",
    ],
)
def test_export_is_a_function_and_a_package(imports: str, tmp_path: Path) -> None:
    use = (
        "import vte_compile, vte_compile.errors\n"
        "assert vte_compile.export.manifest.MANIFEST == 'manifest.json'\n"
        "try: vte_compile.export(None, 'x', target='abacus')\n"
        "except vte_compile.errors.InputError as error: assert 'aoti' in str(error)\n"
        "else: assert False"
    )
    loaded = modules_after(f"{imports}\n{use}", tmp_path)
    assert "vte_compile.export.manifest" in loaded
    assert "transformers" not in loaded


def test_the_engine_runner_loads_no_transformers(tmp_path: Path) -> None:
    loaded = modules_after("import vte_compile.export.engine, vte_compile\nvte_compile.load_engine", tmp_path)
    assert "transformers" not in loaded
    assert "vte_compile.capture" not in loaded
    assert not [name for name in loaded if name.startswith("vte_compile.passes")]


def test_the_callable_package_is_the_function() -> None:
    assert inspect.signature(vte_compile.export) == inspect.signature(vte_compile.export.export)
    assert vte_compile.export.__call__.__doc__ == vte_compile.export.export.__doc__


def test_unknown_target_and_other_models(fast, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="target: 'abacus' is unknown; the targets are 'aoti'"):
        vte_compile.export(fast, tmp_path / "engine", target="abacus")
    with pytest.raises(InputError, match="got a LlamaForCausalLM: call optimize"):
        vte_compile.export(tiny(num_hidden_layers=2), tmp_path / "engine", target="aoti")
    monkeypatch.setattr(aoti_target, "missing_compiler", lambda device: "no g++ here")
    with pytest.raises(CaptureError, match=r"export: no g\+\+ here"):
        vte_compile.export(fast, tmp_path / "engine", target="aoti")
    assert not list(tmp_path.iterdir())


def test_embeddings_that_are_more_than_a_table(fast, monkeypatch) -> None:
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    class Numbered(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + torch.arange(ids.shape[-1])[:, None]

    scaled = Scaled(9, 4)
    monkeypatch.setattr(type(fast), "get_input_embeddings", lambda self: scaled)
    assert torch.equal(staged.embedding_table(fast), 2 * scaled.weight)
    monkeypatch.setattr(type(fast), "get_input_embeddings", lambda self: Numbered(9, 4))
    with pytest.raises(UnsupportedModelError, match="Numbered does more than look tokens up"):
        staged.stage(fast)


def test_weights_are_kept_once() -> None:
    fast = optimize(tiny(num_hidden_layers=2, tie_word_embeddings=True), exits(gate(0)), compile=False)
    found = staged.stage(fast)
    expected = {id(tensor) for tensor in (*fast.parameters(), fast.model.rotary_emb.inv_freq)}
    assert {id(t) for name, t in found.weights.items() if not name.startswith("exit_")} == expected
    assert found.embedding == "lm_head.weight"
    assert {name for name in found.weights if name.startswith("exit_")} == {"exit_0_w1", "exit_0_w2"}
    assert found.model.eos_token_ids == [2]


def test_an_image_encoder_that_cannot_be_traced_is_left_out(monkeypatch, caplog) -> None:
    fast = optimize(tiny_llava(), Plan(), compile=False)
    monkeypatch.setattr(fast.config.vision_config, "image_size", None)
    found = staged.stage(fast)
    assert found.vision is None
    assert "names no image size" in found.vision_missing
    assert "takes image_features" in caplog.text
    monkeypatch.undo()
    tower = fast.model.vision_tower
    monkeypatch.setattr(type(tower), "forward", lambda self, *args, **kwargs: pytest.fail("wants more"))
    monkeypatch.setattr(type(fast.model), "get_image_features", lambda self, pixels, **kwargs: int("pixels alone"))
    assert "cannot encode an image from its pixels alone" in staged.stage(fast).vision_missing


def test_no_folder_that_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"manifest.json: No such file or directory: pass a folder"):
        vte_compile.load_engine(tmp_path / "nowhere")


def traced(length: int = 11):
    """x * 2, for any length."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
    example = mode.from_tensor(torch.zeros(1, length), symbolic_context=sizes)
    graph = fx.Graph()
    graph.output((graph.call_function(torch.mul, (graph.placeholder("x"), 2)),))
    return fx.GraphModule({}, graph), [example]


def test_a_piece_that_is_taken_for_another_length_is_refused(tmp_path: Path, monkeypatch) -> None:
    """And what was refused is not kept."""
    compiled = []
    monkeypatch.setattr(aoti, "cache_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(aoti, "_compile", lambda module, examples, file: compiled.append(file.write_bytes(b"code")))
    module, examples = traced()
    monkeypatch.setattr(aoti, "load_piece", lambda file: lambda values: [values[0][:, :11] * 2])
    with pytest.raises(CaptureError, match=r"does not compute what its graph does at lengths \[15\]"):
        aoti.compile_piece(module, "x * 2", examples, tmp_path / "piece.pt2")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(aoti, "load_piece", lambda file: lambda values: [values[0] * 2])
    for _ in range(2):
        aoti.compile_piece(module, "x * 2", examples, tmp_path / "piece.pt2")
        assert (tmp_path / "piece.pt2").read_bytes() == b"code"
    assert len(compiled) == 2  # the last one came from the cache
    aoti.compile_piece(module, "another", examples, tmp_path / "piece.pt2")
    assert len(compiled) == 3


def test_command(llava: Path, plan: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    seen = []

    def write(model, path):
        seen.append(model.plan)
        path.mkdir()
        facts = ModelFacts("LlamaForCausalLM", "float32", 4, 32, 61, [], [2], 0, 1, None)
        built = Built("0", "2", "cpu", "Linux", "x86_64", "AVX2")
        manifest = Manifest("aoti", built, facts, [], False, "table", None, None, {}, [], {})
        (path / MANIFEST).write_bytes(encode(manifest))
        assert Manifest.from_body(decode(encode(manifest))) == manifest

    monkeypatch.setattr(aoti_target, "write", write)
    result = run("export", llava, "--plan", plan, "--out", tmp_path / "engine", "--target", "aoti")
    assert "0 compiled pieces" in result.stdout
    assert "text only" in result.stdout
    assert len(seen[0].exits) == len(Plan.from_pretrained(plan).exits) > 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused = run("export", llava, "--out", tmp_path / "full", code=1)
    assert "something else than an engine" in refused.stderr
