"""optimize(backend="tensorrt"), with a stand-in for torch_tensorrt that notes what it is asked for and runs in torch.

torch_tensorrt itself wants a GPU to be imported; nothing here says that TensorRT takes these graphs.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import (
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny_llava,
)
from torch import fx, nn
from torch.fx.passes.split_module import split_module

from vte_compile import optimize
from vte_compile.errors import CaptureError, InputError
from vte_compile.runtime import tensorrt_pieces
from vte_compile.runtime.tensorrt_pieces import TensorRTCompiler

PROFILES = {"batch": (1, 2, 4), "prompt": (2, 12, 20), "visual": (1, 4, 8), "columns": (2, 16, 40)}
SILU = torch.ops.aten.silu.default
GREEDY = dict(do_sample=False, max_new_tokens=3, pad_token_id=0, eos_token_id=None)


class Engine(nn.Module):
    """What torch_tensorrt puts in an engine's place; it refuses sizes beyond its profile, as TensorRT does."""

    def __init__(self, graph: nn.Module, calls: list[int]) -> None:
        super().__init__()
        object.__setattr__(self, "graph", graph)  # no submodule, which an engine is not
        self.calls = calls

    def forward(self, *values: Any) -> Any:
        self.calls.append(len(values))
        return self.graph(*values)


class Standin:
    """torch_tensorrt, as far as it is used."""

    Input = staticmethod(lambda **spec: spec)

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.engine_calls: list[int] = []
        self.dynamo = SimpleNamespace(compile=self.compile)

    def compile(self, exported: Any, inputs: list[dict[str, Any]], **settings: Any) -> fx.GraphModule:
        self.compiled.append({"inputs": inputs, **settings})
        left = settings.get("torch_executed_ops", ())
        part = [0]

        def number(node: fx.Node) -> int:
            # Each operator that torch runs is a part of its own, between engines.
            if node.target in left:
                part[0] += 2
                return part[0] - 1
            return part[0]

        whole = exported.module(check_guards=False)
        whole.graph.set_codegen(fx.graph.CodeGen())
        split = split_module(fx.GraphModule(whole, whole.graph), None, number)
        for name, child in list(split.named_children()):
            if not any(node.target in left for node in child.graph.nodes):
                setattr(split, name, Engine(child, self.engine_calls))
        return split


@pytest.fixture(scope="module")
def standin():
    package = Standin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_tensorrt", package)
        patch.setattr(tensorrt_pieces, "_DEVICES", ("cpu",))
        yield package


@pytest.fixture(scope="module")
def fast(standin: Standin) -> Any:
    """Three layers, an exit behind the first two."""
    options = {"profiles": PROFILES, "min_block_size": 3}
    return optimize(tiny_llava(num_hidden_layers=3), plan(gate(1)), backend="tensorrt", backend_options=options)


@pytest.fixture(scope="module")
def plain(fast) -> Any:
    """The same, uncompiled."""
    return uncompiled(fast, None)


def uncompiled(fast: Any, compiler: Any) -> Any:
    """Another model from what was traced, compiled by something else or not at all."""
    other = optimize(fast, plan(gate(1)))
    other._vte_runner.compiler = compiler
    return other


def test_stages_between_exits(standin: Standin, fast, plain, caplog) -> None:
    """Prompts that leave and that stay, in a batch; decode steps. The same numbers as uncompiled."""
    seen = set()
    for seed in range(4):
        ids, pixels, mask = image_prompt("titt", "ittt", seed=seed)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        got, want = fast.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY)
        assert got.tolist() == want.tolist()
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        seen.update(got.exit_layer.tolist())
        got, want = fast(**inputs, logits_to_keep=1), plain(**inputs, logits_to_keep=1)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert seen == {-1, 1}
    compiler = fast._vte_runner.compiler
    assert compiler.compilations == len(standin.compiled)
    assert all(report.in_torch == {} and report.engines == 1 for report in compiler.reports)
    assert "torch runs, not TensorRT" not in caplog.text
    first = standin.compiled[0]
    assert (first["min_block_size"], first["device"], first["disable_tf32"]) == (3, torch.device("cpu"), True)
    [embeds] = [i for i in first["inputs"] if i["dtype"] == torch.float32 and len(i["opt_shape"]) == 3]
    assert [embeds[f"{which}_shape"][1] for which in ("min", "opt", "max")] == [2, 12, 20]
    # Prompts: two layers and what is before them; the last layer and what is behind it.
    assert [report.layer for report in compiler.reports][:2] == [-1, 2]
    again = copy.deepcopy(compiler)
    assert (again.compilations, again._profiles, again._settings) == (0, compiler._profiles, compiler._settings)


def test_what_torch_runs_is_said(standin: Standin, fast, plain, caplog) -> None:
    options = {"profiles": PROFILES, "torch_executed_ops": {SILU}}
    partly = uncompiled(fast, TensorRTCompiler(standin, options))
    inputs: dict[str, Any] = {"input_ids": torch.arange(5, 14)[None], "logits_to_keep": 1}
    torch.testing.assert_close(partly(**inputs).logits, plain(**inputs).logits)
    report = partly._vte_runner.compiler.reports[0]
    assert report.in_torch == {"aten.silu.default": 2}  # of two layers
    assert report.engines == 3
    assert "from layer -1 on, torch runs, not TensorRT: aten.silu.default (2)" in caplog.text
    # Longer than any engine takes, and what is too short for one.
    calls = len(standin.engine_calls)
    inputs["input_ids"] = torch.arange(5, 30)[None]
    torch.testing.assert_close(partly(**inputs).logits, plain(**inputs).logits)
    assert "is [1, 25, 32], beyond what the engine takes" in caplog.text
    inputs["input_ids"] = torch.full((1, 1), 5)
    partly(**inputs)
    assert len(standin.engine_calls) == calls


def test_an_engine_that_computes_something_else(standin: Standin, fast, monkeypatch) -> None:
    inputs: dict[str, Any] = {"input_ids": torch.arange(5, 14)[None], "logits_to_keep": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "forward", lambda self, *values: [value + 1 for value in self.graph(*values)])
        with pytest.raises(CaptureError, match="does not compute what its graph does"):
            optimize(fast, plan(gate(1)))(**inputs)

    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(standin.dynamo, "compile", fail)
    with pytest.raises(CaptureError, match=r"could not compile the stage from layer -1 on: no kernel"):
        optimize(fast, plan(gate(1)))(**inputs)


def test_what_is_missing_is_said_before_anything_is_traced(monkeypatch, fast) -> None:
    model = tiny_llava()
    monkeypatch.setattr("vte_compile.optimizer.check_independence", None)  # the first work there is
    monkeypatch.setattr(tensorrt_pieces, "_DEVICES", ("cuda",))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(
        CaptureError, match=r"needs torch_tensorrt, which cannot be imported .*pip install torch-tensorrt"
    ):
        optimize(model, plan(), backend="tensorrt")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Standin())
    with pytest.raises(CaptureError, match="the model is on cpu, and TensorRT runs on NVIDIA GPUs"):
        optimize(model, plan(), backend="tensorrt")
    monkeypatch.setattr(tensorrt_pieces, "_DEVICES", ("cpu",))
    for options, message in (
        ({"backend": "abacus"}, "'abacus' is unknown; there are 'inductor', 'tensorrt'"),
        ({"backend_options": {}}, "are of backend='tensorrt' alone"),
        ({"backend": "tensorrt", "compile": False}, "compile=False"),
        ({"backend": "tensorrt", "backend_options": {"speed": 1}}, "'speed' is unknown; there are 'profiles'"),
        ({"backend": "tensorrt", "backend_options": {"profiles": {"prompt": 3}}}, "profiles: expected batch, prompt"),
        ({"backend": "tensorrt", "backend_options": {"profiles": {"prompt": (3, 2, 1)}}}, "profiles.prompt: expected"),
    ):
        with pytest.raises(InputError, match=message):
            optimize(model, plan(), **options)
    with pytest.raises(InputError, match="a new plan cannot change that"):
        optimize(fast, plan(), backend="tensorrt")
