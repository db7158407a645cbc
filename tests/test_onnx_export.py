"""The ONNX graphs of an engine: their numbers against the oracle, their names, weights and files."""

from __future__ import annotations

import collections
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from marks import thorough
from onnx_single import SingleGraph
from tiny_models import (
    NEVER,
    chunk,
    gate,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    tiny,
    tiny_llava,
)

import vte_compile
from vte_compile import KeptAdapter, Oracle, SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter
from vte_compile.errors import EngineError, InputError, UnsupportedModelError
from vte_compile.export import ort_target
from vte_compile.export.folder import read_manifest
from vte_compile.export.onnx_manifest import OnnxManifest
from vte_compile.export.onnx_ops import ORT_BLOCKS
from vte_compile.export.onnx_pieces import check, convert
from vte_compile.passes.last_layer_queries import CACHED

STATIC = StaticRouter((0.3, 0.7))
PLANS = {
    "no exit": plan(),
    "exit 0": plan(StaticExit(0)),
    "exit last": plan(StaticExit(3)),
    "never": plan(gate(1, NEVER)),
    "gates": plan(gate(0, 0.3), gate(1, 0.2), gate(2, -0.1)),
    "skips": plan(StaticExit(1), SkippedAttention(0), SkippedAttention(2)),
    "all attentions skipped above": plan(gate(0), SkippedAttention(2), SkippedAttention(3)),
    "constant adapters": plan(
        StaticExit(1),
        SkippedAttention(2, random_adapter(PIA, router=STATIC)),
        KeptAdapter(0, random_adapter(PlainAdapter, router=STATIC)),
    ),
    "routed adapters": plan(
        gate(1, -1.0), SkippedAttention(0, random_adapter(PIA)), KeptAdapter(2, random_adapter(PlainAdapter, 1))
    ),
}
LIKE_OTHERS = ("exit last", "never", "all attentions skipped above", "constant adapters")
LAYOUTS = {
    "one row": ("ttvvvvttt",),
    "text alone": ("ttttt",),
    "one token": ("t",),
    "image last": ("ttvvvv",),
    "several images": ("tvvtvvvtt", "vvtttvvtt"),
    "batch of four, padded": ("ttvvvvttt", "..tvvvvtt", "tttttt...", "vvvvt...."),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Engines of a Llama with each plan, made when first asked for."""
    made: dict[str, Path] = {}
    model = tiny()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("engines") / "engine"
            vte_compile.export(optimize(model, PLANS[name], compile=False), made[name], target="onnxruntime")
        return made[name]

    return folder


def manifest(folder: Path) -> OnnxManifest:
    return OnnxManifest.from_body(read_manifest(folder))


def close(ours, theirs, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def last(logits, real):
    """Of each row's last token."""
    return torch.stack([row[int(mask.nonzero()[-1])] for row, mask in zip(logits, real, strict=True)])


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", [thorough(name) if name in LIKE_OTHERS else name for name in PLANS])
@pytest.mark.shows("ONNX Runtime", "llama")
def test_single_graph_is_the_oracle(folders, name: str, layouts) -> None:
    """A prompt, and three tokens more of each row."""
    oracle, graph = Oracle(tiny(), PLANS[name]), SingleGraph(folders(name))
    embeds, visual, real = chunk(*layouts)
    want, got = oracle(embeds, visual, real), graph.run(embeds, visual, real)
    assert got["exit_layer"].tolist() == want.exit_layer.tolist()
    close(got["logits"][:, 0], last(want.logits, real))
    for step in range(3):
        embeds, visual, real = chunk(*["t"] * len(layouts), seed=10 + step)
        want, got = oracle(embeds, visual, real, cache=want.cache), graph.run(embeds, visual, real)
        close(got["logits"], want.logits)
        assert got["exit_layer"].tolist() == [-1] * len(layouts)


@pytest.mark.parametrize("name", ["gates", "routed adapters"])
def test_single_graph_goes_on_with_another_chunk(folders, name: str) -> None:
    """A second turn with an image of its own; GroupQueryAttention takes such a chunk one row at a time."""
    oracle, graph = Oracle(tiny(), PLANS[name]), SingleGraph(folders(name))
    cache = None
    for seed, layout in enumerate(("ttvvvvttt", "tvvvtt", "ttt")):
        embeds, visual, real = chunk(layout, seed=seed)
        want, got = oracle(embeds, visual, real, cache=cache), graph.run(embeds, visual, real)
        assert got["exit_layer"].tolist() == want.exit_layer.tolist()
        close(got["logits"][:, 0], want.logits[:, -1])
        cache = want.cache


@pytest.mark.parametrize("name", ["qwen2", thorough("gemma"), thorough("mistral")])
@pytest.mark.shows("ONNX Runtime")
def test_other_decoders(name: str, tmp_path: Path) -> None:
    """Biases, scaled embeddings, and a head size that is not hidden size / heads."""
    model = tiny(name, **({"head_dim": 16} if name == "mistral" else {}))
    parts = plan(gate(0), StaticExit(2))
    vte_compile.export(optimize(model, parts, compile=False), tmp_path / "engine", target="onnxruntime")
    embeds, visual, real = chunk("tvvvvttt", "tttt....")
    want, got = Oracle(model, parts)(embeds, visual, real), SingleGraph(tmp_path / "engine").run(embeds, visual, real)
    close(got["logits"][:, 0], last(want.logits, real))


def test_norms_that_multiply_in_float32() -> None:
    """Gemma's, in float16: values and weights of an operator are of one type in ONNX Runtime."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return ((wide * (1.0 + weight.float())).type_as(x),)

    values = [torch.randn(3, 5, 8).half(), torch.randn(8).half()]
    model = convert(norm, values, [{0, 1}, set()], ["normed"])
    assert [node.op_type for node in model.graph].count("RMSNormalization") == 1
    check(model, norm, [torch.randn(1, 2, 8).half(), values[1]])


def test_capped_scores_of_blocks() -> None:
    """With a window: two rows that have something cached, and room for more than the chunk."""
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: int, tokens: int) -> list[torch.Tensor]:
        shapes = [(rows, tokens, 32), *[(rows, tokens, 16)] * 2, *[(rows, 2, 3 + tokens, 8)] * 2]
        floats = [torch.randn(shape, generator=generator) for shape in shapes]
        blocks = torch.arange(tokens).expand(rows, -1) // 3 - 1
        return [*floats, torch.arange(rows), torch.full((rows,), tokens), blocks.contiguous()]

    def of(function):
        return lambda *values: function(*values[:7], 4, 2, 0.3, 2, values[7], 0.5)

    dims = [*[{0, 1}] * 3, *[{0, 2}] * 2, {0}, {0}, {0, 1}]
    model = convert(of(ORT_BLOCKS.lowered[CACHED]), inputs(3, 5), dims, ["output", "keys", "values"], ORT_BLOCKS)
    assert "Attention" not in [node.op_type for node in model.graph]
    check(model, of(ORT_BLOCKS.expected[CACHED]), inputs(2, 7))


@pytest.mark.thorough
def test_half_precision(tmp_path: Path) -> None:
    model = tiny().half()
    vte_compile.export(optimize(model, PLANS["gates"], compile=False), tmp_path / "engine", target="onnxruntime")
    assert manifest(tmp_path / "engine").precision == "float16"
    embeds, visual, real = chunk("ttvvvvttt")
    got = SingleGraph(tmp_path / "engine").run(embeds, visual, real)
    assert got["logits"].dtype == torch.float16
    want = Oracle(tiny(), PLANS["gates"])(embeds, visual, real)
    torch.testing.assert_close(got["logits"][:, 0].float(), want.logits[:, -1], rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(("kind", "bits"), [thorough("int8", 8), ("int4", 4)])
def test_quantized_weights(kind: str, bits: int, tmp_path: Path) -> None:
    """The engine computes what the model does with weights that were rounded block by block."""
    model = tiny()
    vte_compile.export(
        optimize(model, PLANS["exit 0"], compile=False), tmp_path / "engine", target="onnxruntime", quantize=kind
    )
    assert manifest(tmp_path / "engine").precision == kind
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx").graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 4 * 7 + 1
    assert not [n for n in graph.node if n.op_type == "MatMul"]
    assert {a.i for n in nodes for a in n.attribute if a.name == "bits"} == {bits}
    rounded = tiny()
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(_rounded(module.weight, bits))
    embeds, visual, real = chunk("ttvvvvttt")
    got = SingleGraph(tmp_path / "engine").run(embeds, visual, real)["logits"][:, 0]
    want = Oracle(rounded, PLANS["exit 0"])(embeds, visual, real).logits[:, -1]
    exact = Oracle(model, PLANS["exit 0"])(embeds, visual, real).logits[:, -1]
    # Activations are rounded to 8 bits as well.
    assert float((got - want).abs().max()) < 0.15 * float(want.abs().max())
    assert float((got - want).norm()) < float((got - exact).norm()) or kind == "int8"


def _rounded(weight, bits: int, block: int = 32):
    """Symmetric round-to-nearest in blocks, as ONNX Runtime's quantizer does it."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block)).reshape(rows, -1, block)
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    scale = largest / -(2 ** (bits - 1))
    codes = (padded / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(rows, -1)[:, :columns]


def test_graphs_are_valid_and_readable(folders) -> None:
    folder = folders("gates")
    stages = manifest(folder).stages
    assert [s.layers for s in stages] == [[0], [1], [2], [3]]
    assert [s.exit and (s.exit.layer, s.exit.gate) for s in stages[:3]] == [(i, f"gate_{i}.onnx") for i in range(3)]
    assert stages[3].exit is None
    files = sorted(p.name for p in folder.glob("*.onnx"))
    assert files == ["decoder.onnx", "embedding.onnx", *(f"gate_{i}.onnx" for i in range(3))] + [
        f"stage_{i}.onnx" for i in range(4)
    ]
    for file in files:
        onnx.checker.check_model(folder / file, full_check=True)
    graph = onnx.load(folder / "stage_2.onnx", load_external_data=False).graph
    assert {"layers.2.mlp.up_proj.weight", "layers.2.self_attn.q_proj.weight"} <= {i.name for i in graph.initializer}
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    assert {"layers.2.mlp.up_proj/MatMul", "layers.2/GroupQueryAttention"} <= set(names)
    counted = collections.Counter(n.op_type for n in graph.node)
    assert counted["RMSNormalization"] == counted["RotaryEmbedding"] == 2
    assert counted["GroupQueryAttention"] == 1
    assert not [n for n in graph.node if n.op_type == "Transpose" and n.name.startswith("layers.")]
    assert not counted["Softmax"]


def test_skipped_attentions_leave_no_trace(folders) -> None:
    folder = folders("skips")
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    everything = [i.name for i in graph.initializer] + [i.name for i in graph.input] + [o.name for o in graph.output]
    everything += [n.name for n in graph.node]
    for layer in (0, 2):
        assert not [name for name in everything if f"layers.{layer}.self_attn" in name or f".{layer}.key" in name]
        assert not [name for name in everything if name.startswith(f"layers.{layer}/GroupQuery")]
    assert sum(n.op_type == "GroupQueryAttention" for n in graph.node) == 2
    assert [c.layer for s in manifest(folder).stages for c in s.caches] == [1, 3]
    size = sum(file.stat().st_size for file in folder.glob("weights-*.data"))
    assert size < sum(file.stat().st_size for file in folders("no exit").glob("weights-*.data"))


def test_weights_are_written_once(folders, tmp_path: Path) -> None:
    """All graphs refer to the same bytes; tied weights too, but for the transposed copy that a MatMul wants."""
    folder = folders("no exit")

    def places(file: str) -> dict[str, tuple[str, str]]:
        graph = onnx.load(folder / file, load_external_data=False).graph
        external = [i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        facts = {i.name: {e.key: e.value for e in i.external_data} for i in external}
        return {name: (fact["location"], fact["offset"]) for name, fact in facts.items()}

    assert places("decoder.onnx") == places("stage_0.onnx")
    weights = sum(p.numel() * 4 for p in tiny().parameters())
    size = sum(file.stat().st_size for file in folder.glob("weights-*.data"))
    assert weights <= size <= weights + 4096 * (len(places("decoder.onnx")) + 2)


def test_shards(folders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vte_compile.export.onnx_weights._SHARD", 30_000)
    vte_compile.export(optimize(tiny(), PLANS["gates"], compile=False), tmp_path / "engine", target="onnxruntime")
    files = sorted(p.name for p in (tmp_path / "engine").glob("weights-*.data"))
    assert files == [f"weights-{i:05d}.data" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    embeds, visual, real = chunk("ttvvvvttt")
    got = SingleGraph(tmp_path / "engine").run(embeds, visual, real)
    close(got["logits"], SingleGraph(folders("gates")).run(embeds, visual, real)["logits"])


def test_folder_can_be_moved(folders, tmp_path: Path) -> None:
    shutil.copytree(folders("gates"), tmp_path / "elsewhere")
    embeds, visual, real = chunk("ttvvvvttt")
    got = SingleGraph(tmp_path / "elsewhere").run(embeds, visual, real)
    close(got["logits"], SingleGraph(folders("gates")).run(embeds, visual, real)["logits"])
    text = (tmp_path / "elsewhere" / "manifest.json").read_text()
    assert str(folders("gates").parent) not in text


def test_image_encoder_and_embedding(tmp_path: Path) -> None:
    import onnxruntime

    model = tiny_llava()
    vte_compile.export(optimize(model, plan(), compile=False), tmp_path / "engine", target="onnxruntime")
    assert manifest(tmp_path / "engine").vision.image == [3, 8, 8]

    def run(file: str, **feeds):
        session = onnxruntime.InferenceSession(tmp_path / "engine" / file, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)

    pixels = torch.randn(1, 3, 8, 8)
    [features] = run("vision.onnx", pixel_values=pixels.numpy())
    with torch.no_grad():
        want = model.get_image_features(pixels)
    want = torch.cat(tuple(getattr(want, "pooler_output", want))).flatten(0, -2)
    close(torch.from_numpy(features), want)
    ids = np.array([[5, 60, 60, 7], [60, 60, 8, 9]])
    embeds, visual = run("embedding.onnx", input_ids=ids, image_features=features)
    assert visual.tolist() == (ids == 60).tolist()
    assert np.array_equal(embeds[ids == 60], features)
    table = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(embeds[ids != 60], table[ids[ids != 60]])
    text, none = run("embedding.onnx", input_ids=ids[:, 2:][1:], image_features=features[:0])
    assert np.array_equal(text[0], table[[8, 9]])
    assert not none.any()


def test_refusals(tmp_path: Path, monkeypatch) -> None:
    model = tiny()
    fast = optimize(model, plan(), compile=False)
    with pytest.raises(InputError, match="forms: expected"):
        vte_compile.export(fast, tmp_path / "a", target="onnxruntime", forms=("triple",))
    with pytest.raises(InputError, match="quantize: expected one of 'int4', 'int8'"):
        vte_compile.export(fast, tmp_path / "a", target="onnxruntime", quantize="int3")
    with pytest.raises(InputError, match="'speed' is no option of target 'onnxruntime'"):
        vte_compile.export(fast, tmp_path / "a", target="onnxruntime", speed=1)
    with pytest.raises(InputError, match="got a LlamaForCausalLM: call optimize"):
        vte_compile.export(model, tmp_path / "a", target="onnxruntime")
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        vte_compile.export(optimize(tiny().bfloat16(), plan(), compile=False), tmp_path / "a", target="onnxruntime")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(EngineError, match="holds something else"):
        vte_compile.export(fast, tmp_path / "full", target="onnxruntime")

    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ort_target, "write_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vte_compile.export(fast, tmp_path / "half", target="onnxruntime")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_missing_package(tmp_path: Path, monkeypatch) -> None:
    for name in [n for n in sys.modules if n == "onnx_ir" or n.startswith("vte_compile.export.o")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(EngineError, match=r"needs onnx_ir, which is not installed: pip install 'vte-compile\[onnx\]'"):
        vte_compile.export(optimize(tiny(), plan(), compile=False), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_manifest(folders) -> None:
    body = json.loads((folders("routed adapters") / "manifest.json").read_text())
    assert body["target"] == "onnxruntime"
    assert body["opset"] == 23
    assert set(body["built"]) == {"vte_compile", "torch", "transformers", "onnx", "onnxscript"}
    first = body["stages"][0]
    assert [value["name"] for value in first["prompt"]]
    assert first["caches"] == [{"layer": 1, "kv_heads": 2, "key_size": 8, "value_size": 8}]
    assert body["decoder"] == "decoder.onnx"
