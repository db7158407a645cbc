"""target="onnxruntime": an engine of ONNX graphs, which ONNX Runtime runs. docs/onnx.md says what is in the folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from vte_compile.errors import CaptureError, InputError, UnsupportedModelError
from vte_compile.export.folder import check_target_folder, facts_of, whole_folder
from vte_compile.export.fp8_numbers import Fp8
from vte_compile.export.image_features import vision_inputs
from vte_compile.export.manifest import MANIFEST, VisionCall, encode
from vte_compile.export.onnx_decoder import OnnxDecoder
from vte_compile.export.onnx_glue import embedding_function
from vte_compile.export.onnx_graph import OnnxGraph
from vte_compile.export.onnx_manifest import ExitFacts, OnnxManifest, StageFacts, Tools
from vte_compile.export.onnx_ops import OPSET, ORT, ORT_BLOCKS, ORT_COMPANION, WINDOWS_SINCE, Operators
from vte_compile.export.onnx_pieces import check, convert
from vte_compile.export.onnx_quantize import check_quantize
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.export.staged import check_experts, check_optimized, embedding_table, model_facts
from vte_compile.export.vision import image_encoder
from vte_compile.plan import GateExit
from vte_compile.version import __version__

logger = logging.getLogger(__name__)
DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}
FORMS = ("staged", "single")
_KINDS = {torch.int64: ir.DataType.INT64, torch.bool: ir.DataType.BOOL, torch.float32: ir.DataType.FLOAT}
"""Of inputs that are no numbers of the engine's dtype."""


def write(
    fast: Any, path: Path, *, processor: Any = None, forms: tuple[str, ...] = FORMS, quantize: str | None = None
) -> None:
    """See :func:`vte_compile.export`."""
    check_target_folder(path)
    _check(fast, forms)
    check_quantize(quantize)
    facts = model_facts(fast)
    # (Both at once is refused: passes/companion_token.py.)
    operators = ORT_COMPANION if facts.companion else ORT_BLOCKS if fast._vte_spec.has_blocks else ORT
    dtype, decoder, table = DTYPES[fast._vte_spec.dtype], trace_decoder(fast, operators), embedding_table(fast)
    with whole_folder(path) as folder:
        decoder.convert_all()
        weights = WeightFiles(folder)
        write_embedding(OnnxGraph("embedding", weights, dtype), fast, table, folder / "embedding.onnx")
        vision, vision_missing = write_vision(OnnxGraph("vision", weights, dtype), fast, folder / "vision.onnx")
        stages = write_stages(decoder, weights, dtype, quantize, folder) if "staged" in forms else []
        if "single" in forms:
            graph = OnnxGraph("decoder", weights, dtype, quantize, operators)
            decoder.add_single(graph)
            graph.save(folder / "decoder.onnx")
        write_companions(fast, processor, folder)
        manifest = OnnxManifest(
            target="onnxruntime",
            built=tools(),
            opset=OPSET,
            runtime=WINDOWS_SINCE if fast._vte_spec.has_windows and not fast._vte_spec.has_blocks else None,
            provider="cpu",
            precision=quantize or str(fast._vte_spec.dtype).removeprefix("torch."),
            model=facts,
            plan=fast.plan.describe(),
            embedding="embedding.onnx",
            vision=vision,
            vision_missing=vision_missing,
            stages=stages,
            decoder="decoder.onnx" if "single" in forms else None,
            files=facts_of(folder),
        )
        (folder / MANIFEST).write_bytes(encode(manifest))


def _check(fast: Any, forms: tuple[str, ...]) -> None:
    check_optimized(fast)
    if not forms or not set(forms) <= set(FORMS):
        raise InputError(f"forms: expected one or both of {', '.join(map(repr, FORMS))}, got {forms!r}.")
    check_experts(fast)
    if (dtype := fast._vte_spec.dtype) not in DTYPES:
        raise UnsupportedModelError(
            f"ONNX Runtime's CPU kernels do not take {dtype}: load the model in float32 or float16 before optimize()."
        )


def trace_decoder(fast: Any, operators: Operators) -> OnnxDecoder:
    """The decoder of an optimized model, traced and rewritten; nothing is converted yet.

    Raises:
        CaptureError: It cannot be traced, or a pass refused something the plan asks for.
    """
    lowered = fast._vte_runner.lowered("chunk", batched=True)
    if refused := fast._vte_runner.refused("chunk"):
        raise CaptureError(f"export: {refused}")
    spec, companion = fast._vte_spec, fast.plan.companion is not None
    return OnnxDecoder(lowered, fast.plan.exits, spec.num_layers, spec.token_inputs, operators, companion)


def write_companions(fast: Any, processor: Any, folder: Path) -> None:
    """What stands beside the graphs: plan, generation config, and the processor's files if there is one."""
    fast.plan.save_pretrained(folder / "plan")
    fast.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder / "processor")


def tools() -> Tools:
    """What writes here."""
    return Tools(__version__, *(version(name) for name in ("torch", "transformers", "onnx", "onnxscript")))


def write_embedding(graph: OnnxGraph, fast: Any, table: Tensor, file: Path) -> None:
    """embedding.onnx: embeddings and the visual mask, of token ids and image features."""
    spec = fast._vte_spec
    integer = ir.DataType.INT64
    ids = graph.input("input_ids", ["batch", "tokens"], integer)
    features = graph.input("image_features", ["features", spec.hidden_size])
    function = embedding_function(list(spec.visual_token_ids))
    examples = [torch.zeros(3, 5, dtype=torch.long), torch.zeros(7, spec.hidden_size, dtype=spec.dtype), table.detach()]
    dims: list[set[int]] = [{0, 1}, {0}, set()]
    piece = convert(function, examples, dims, ["inputs_embeds", "visual_mask"], graph.operators)
    check(piece, function, examples)
    embeds, visual = graph.add(piece, "embedding", [ids, features, ("embed_tokens.weight", lambda: table)])
    graph.output("inputs_embeds", embeds, ["batch", "tokens", spec.hidden_size])
    graph.output("visual_mask", visual, ["batch", "tokens"], ir.DataType.BOOL)
    graph.save(file)


def write_vision(graph: OnnxGraph, fast: Any, file: Path) -> tuple[VisionCall | None, str | None]:
    """vision.onnx, for one image, tile, or frame; or why there is none. None, None: the model takes no images."""
    if not fast._vte_spec.is_multimodal:
        return None, None
    try:
        encoder = image_encoder(fast)
    except (CaptureError, UnsupportedModelError) as error:
        logger.warning("export: the engine has no image encoder and takes image_features: %s", error)
        return None, str(error)
    first, weights = encoder.examples[0], [weight.detach() for weight in encoder.weights.values()]
    inputs = [
        graph.input(
            name,
            [dims.get(d, size) for d, size in enumerate(example.shape)],
            _KINDS.get(example.dtype),
        )
        for name, example, dims in zip(vision_inputs(encoder.facts), first, encoder.dims, strict=True)
    ]
    dims = [*map(set, encoder.dims), *(set[int]() for _ in weights)]
    piece = convert(encoder.function, [*first, *weights], dims, ["image_features"], graph.operators)
    for example in encoder.examples:
        check(piece, encoder.function, [*example, *weights])
    named: list[tuple[str, Callable[[], Tensor]]] = [
        (f"vision.{name}", partial(_same, tensor)) for name, tensor in encoder.weights.items()
    ]
    [features] = graph.add(piece, "vision", [*inputs, *named])
    width = (1 + fast._vte_spec.deepstack) * fast._vte_spec.hidden_size
    graph.output("image_features", features, ["visual_tokens", width])
    graph.save(file)
    return replace(encoder.facts, piece=file.name), None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def write_stages(
    decoder: OnnxDecoder, weights: WeightFiles, dtype: ir.DataType, quantize: str | Fp8 | None, folder: Path
) -> list[StageFacts]:
    """stage_0.onnx and so on, with the gates between them; for the manifest, what they are."""
    facts = []
    for index, stage in enumerate(decoder.stages):
        graph = OnnxGraph(f"stage_{index}", weights, dtype, quantize, decoder.operators)
        decoder.add_stage(graph, index)
        graph.save(folder / f"stage_{index}.onnx")
        exit_ = None
        if stage.exit is not None:
            gate = f"gate_{stage.exit.layer}.onnx" if isinstance(stage.exit, GateExit) else None
            if gate is not None:
                gate_graph = OnnxGraph(f"gate_{stage.exit.layer}", weights, dtype, operators=decoder.operators)
                _write_gate(decoder, gate_graph, index, folder / gate)
            exit_ = ExitFacts(stage.exit.layer, gate)
        caches, prompt = decoder.caches(stage), decoder.prompt(stage)
        facts.append(StageFacts(f"stage_{index}.onnx", stage.layers, caches, prompt, exit_))
    return facts


def _write_gate(decoder: OnnxDecoder, graph: OnnxGraph, index: int, file: Path) -> None:
    exit_ = decoder.stages[index].exit
    assert exit_ is not None
    stream = graph.input("hidden_states", ["batch", "tokens", decoder.hidden_size])
    visual = graph.input("visual_mask", ["batch", "tokens"], ir.DataType.BOOL)
    lengths = graph.input("new_lengths", ["batch"], ir.DataType.INT64)
    graph.output("fire", decoder.add_gate(graph, exit_, stream, visual, lengths), ["batch"], ir.DataType.BOOL)
    graph.save(file)
