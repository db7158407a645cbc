"""target="onnxruntime" of a model with co-attention layers (METER, BridgeTower): texts and images in, logits out.

The whole model is one graph: its encoders as they are, the co-attention layers as the plan left them. What is skipped
has no node and no weight in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from vte_compile.capture.co_attention import copy_graph
from vte_compile.errors import CaptureError, UnsupportedModelError
from vte_compile.export.co_attention_manifest import TARGET, CoAttentionFacts, CoAttentionManifest
from vte_compile.export.folder import check_target_folder, facts_of, whole_folder
from vte_compile.export.manifest import MANIFEST, encode
from vte_compile.export.onnx_graph import OnnxGraph
from vte_compile.export.onnx_ops import OPSET
from vte_compile.export.onnx_pieces import check, convert
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.export.ort_target import DTYPES, tools
from vte_compile.families.co_attention import example_inputs
from vte_compile.passes.residual import SDPA

_GRAPH = "model.onnx"
_DYNAMIC = {"input_ids": {0, 1}, "attention_mask": {0, 1}, "pixel_values": {0}}
_SIZES = ((3, 11), (2, 5), (1, 7))
"""Texts and tokens with which the graph is made (the first) and compared with the model."""


@dataclass
class _Traced:
    """A model as a graph: inputs and then weights in, outputs out."""

    module: fx.GraphModule
    weights: dict[str, Tensor]
    outputs: dict[str, list[int | str]]
    """Shapes by name, with "batch" and "tokens" where they are of any size."""


def write(fast: Any, path: Path) -> None:
    """See :func:`vte_compile.export`."""
    check_target_folder(path)
    if (dtype := next(fast.parameters()).dtype) not in DTYPES:
        raise UnsupportedModelError(
            f"ONNX Runtime's CPU kernels do not take {dtype}: load the model in float32 or float16 before optimize()."
        )
    examples = example_inputs(fast, *_SIZES[0])
    traced = _trace(fast, examples)
    weights = [tensor.detach() for tensor in traced.weights.values()]
    dims = [*(_DYNAMIC[name] for name in examples), *(set() for _ in weights)]
    piece = convert(traced.module, [*examples.values(), *weights], dims, list(traced.outputs))
    for sizes in _SIZES:
        check(piece, partial(_run, fast, traced), [*example_inputs(fast, *sizes).values(), *weights])
    with whole_folder(path) as folder:
        graph = OnnxGraph("model", WeightFiles(folder), DTYPES[dtype])
        ids = graph.input("input_ids", ["batch", "tokens"], ir.DataType.INT64)
        mask = graph.input("attention_mask", ["batch", "tokens"], ir.DataType.INT64)
        image = [int(size) for size in examples["pixel_values"].shape[1:]]
        pixels = graph.input("pixel_values", ["batch", *image])
        named = [(name, partial(_same, tensor)) for name, tensor in traced.weights.items()]
        results = graph.add(piece, "model", [ids, mask, pixels, *named])
        for (name, shape), value in zip(traced.outputs.items(), results, strict=True):
            graph.output(name, value, shape)
        graph.save(folder / _GRAPH)
        fast.plan.save_pretrained(folder / "plan")
        text: Any = fast.config.text_config
        manifest = CoAttentionManifest(
            target=TARGET,
            built=tools(),
            opset=OPSET,
            provider="cpu",
            model=CoAttentionFacts(
                name=type(fast).__name__,
                dtype=str(dtype).removeprefix("torch."),
                vocab_size=text.vocab_size,
                # RoBERTa numbers tokens from behind the padding's id.
                max_tokens=text.max_position_embeddings - text.pad_token_id - 1,
                image=image,
            ),
            plan=fast.plan.describe(),
            graph=_GRAPH,
            outputs=list(traced.outputs),
            files=facts_of(folder),
        )
        (folder / MANIFEST).write_bytes(encode(manifest))


class _Whole(nn.Module):
    """The model's outputs as a tuple, for inputs by position."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self._inputs, self._outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self._inputs, values, strict=True)))
        return tuple(output[name] for name in self._outputs)


@torch.no_grad()
def _trace(fast: Any, examples: dict[str, Tensor]) -> _Traced:
    names = [name for name, value in fast(**examples).items() if isinstance(value, Tensor)]
    whole = _Whole(fast, list(examples), names).eval()
    dims = tuple(dict.fromkeys(_DYNAMIC[name], torch.export.Dim.AUTO) for name in examples)
    try:
        exported = torch.export.export(whole, tuple(examples.values()), dynamic_shapes=(dims,), strict=False)
        module = exported.module(check_guards=False)
    except Exception as error:  # whatever code of the encoders torch.export cannot trace
        raise CaptureError(f"torch.export could not trace {type(fast).__name__}: {error}") from error
    graph = module.graph
    _widen_masks(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = inputs[0].meta["val"].shape
    if any(isinstance(size, int) for size in sizes):
        raise CaptureError(f"{type(fast).__name__}: its code works for one number of texts or tokens only when traced.")
    symbols = dict(zip(map(str, sizes), ("batch", "tokens"), strict=True))
    [output] = [node for node in graph.nodes if node.op == "output"]
    results = torch.utils._pytree.tree_leaves(output.args)
    shapes: dict[str, list[int | str]] = {
        name: [size if isinstance(size, int) else symbols.get(str(size), str(size)) for size in node.meta["val"].shape]
        for name, node in zip(names, results, strict=True)
    }
    output.args = (tuple(results),)
    weights = _lift_weights(module, inputs[-1])
    return _Traced(copy_graph(module), weights, shapes)  # the copy takes inputs by position


def _widen_masks(graph: fx.Graph) -> None:
    """ONNX Runtime's Attention takes masks with a row for each query, not one that is spread over them."""
    aten: Any = torch.ops.aten
    for node in [n for n in graph.nodes if n.target is SDPA]:
        place = next((i for i, a in enumerate(node.args) if i == 3 and isinstance(a, fx.Node)), None)
        mask: Any = node.args[3] if place is not None else node.kwargs.get("attn_mask")
        if mask is None or mask.meta["val"].shape[-2] != 1:
            continue
        with graph.inserting_before(node):
            queries = graph.call_function(aten.sym_size.int, (node.args[0], 2))
            wide = graph.call_function(aten.expand.default, (mask, [-1, -1, queries, -1]))
        node.replace_input_with(mask, wide)


def _lift_weights(module: fx.GraphModule, last_input: fx.Node) -> dict[str, Tensor]:
    """Make the graph's weights its inputs, in the order of what is given back."""
    graph = module.graph
    weights: dict[str, Tensor] = {}
    lifted: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        target = str(node.target)
        if target not in lifted:
            owner, _, name = target.rpartition(".")
            with graph.inserting_after(last_input):
                last_input = lifted[target] = graph.placeholder(f"weight_{len(weights)}")
            weights[target.removeprefix("model.")] = getattr(module.get_submodule(owner), name)
        node.replace_all_uses_with(lifted[target])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return weights


def _run(fast: Any, traced: _Traced, *values: Tensor) -> tuple[Tensor, ...]:
    """What the model itself gives, uncompiled."""
    return tuple(fast(**dict(zip(_DYNAMIC, values, strict=False)))[name] for name in traced.outputs)


def _same(tensor: Tensor) -> Tensor:
    return tensor
