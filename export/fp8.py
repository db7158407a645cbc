"""float8 linear layers: the ranges of their inputs over samples, and what stands for them in a graph.

TensorRT's networks are strongly typed: a matrix product is of float8 (E4M3) numbers if both its factors are quantized
and dequantized in the graph. Weights carry their scale along. The scale of what meets them has to be known beforehand;
it is the largest number seen over prompts and answers, which go through the graph's own pieces here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import length_hint
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tqdm import tqdm

from vte_compile.errors import InputError
from vte_compile.export.fp8_numbers import Fp8
from vte_compile.export.onnx_decoder import OnnxDecoder, Stage
from vte_compile.export.onnx_glue import gate_function
from vte_compile.passes.lower_piecewise import Piece
from vte_compile.plan import GateExit
from vte_compile.tuning.answered import Answered, embed_answered
from vte_compile.tuning.samples import Sample, read_samples


def calibrate(fast: Any, decoder: OnnxDecoder, samples: object, processor: Any = None) -> Fp8:
    """Send prompts, and their answers where they have one, through the decoder, and note what its linear layers read.

    Visual tokens leave as the plan has it: by the gates' decisions on these samples.

    Args:
        fast: The optimized model.
        decoder: Its traced pieces.
        samples: As :func:`vte_compile.calibrate` takes them; a few dozen do.
        processor: For samples that are conversations.

    Returns:
        Ranges of the layers' linear layers. lm_head, gates, and the narrow products of adapters are not among them.

    Raises:
        InputError: The samples cannot be used, or a layer reads NaN or infinity.
    """
    found = read_samples(samples, processor)
    ranges: dict[str, float] = {}
    for sample in tqdm(found, total=length_hint(found) or None, desc="calibrate float8", leave=False):
        # The last token of an answer is read by nothing: of a sample without one, the prompt alone is left.
        answered = embed_answered(fast, fast._vte_spec, replace(sample, answer=sample.answer or (0,)))
        _note(decoder, answered, ranges, sample)
    return Fp8(ranges)


@torch.no_grad()
def _note(decoder: OnnxDecoder, answered: Answered, ranges: dict[str, float], sample: Sample) -> None:
    # Where a companion token goes along, it takes the last place.
    places = (0, decoder.behind)
    stream, positions = F.pad(answered.embeds, (0, 0, *places)), F.pad(answered.positions, places)
    visual = F.pad(answered.visual[None], places)
    more = dict(zip(decoder.token_inputs, answered.token_inputs, strict=True))
    for index, stage in enumerate(decoder.stages):
        env = _run(decoder, stage, stream, positions, more, ranges)
        if stage.exit is None:
            break
        stream = env[decoder.stages[index + 1].stream]
        weights = []
        if isinstance(stage.exit, GateExit):
            numbers = (stage.exit.w1, stage.exit.w2, stage.exit.threshold)
            weights = [torch.as_tensor(n).detach().float().to(stream.device) for n in numbers]
        tokens = torch.tensor([stream.shape[1] - decoder.behind])
        [fires] = gate_function(bool(weights))(stream, visual, tokens, *weights)
        if bool(fires):
            keep = (~visual[0]).nonzero()[:, 0]
            stream, positions, visual = stream[:, keep], positions[..., keep], visual[:, keep]
            more = {name: value[:, keep] for name, value in more.items()}
    for name, largest in ranges.items():
        if not largest < float("inf"):
            raise InputError(f"{sample.name}: {name} reads numbers up to {largest}: no scale for float8 follows.")


def _run(
    decoder: OnnxDecoder,
    stage: Stage,
    stream: Tensor,
    positions: Tensor,
    more: Mapping[str, Tensor],
    ranges: dict[str, float],
) -> dict[str, Tensor]:
    """One row without a past through a stage; the values of its pieces, by name."""
    tokens = torch.tensor([stream.shape[1] - decoder.behind], device=stream.device)
    env = {stage.stream: stream, "position_ids": positions, "new_lengths": tokens, "past_lengths": tokens * 0, **more}
    for cache in decoder.caches(stage):
        for kind, size in (("key", cache.key_size), ("value", cache.value_size)):
            env[f"past_{kind}_{cache.layer}"] = stream.new_zeros(1, cache.kv_heads, stream.shape[1], size)
    for value in decoder.prompt(stage):
        env[value.name] = stream.new_zeros(1, *value.shape)
    for piece in decoder.pieces(stage, env):
        given = [*(env[name] for name in piece.inputs), *(read() for read in piece.parameters)]
        run = (
            _Noting(piece, ranges, decoder.hidden_size) if piece.layer in stage.layers else fx.Interpreter(piece.module)
        )
        env |= dict(zip(piece.outputs, run.run(*given), strict=True))
    return env


class _Noting(fx.Interpreter):
    """Runs a piece, and keeps the largest number that each of its wide linear layers reads."""

    def __init__(self, piece: Piece, ranges: dict[str, float], hidden: int) -> None:
        super().__init__(piece.module)
        placeholders = [node for node in piece.module.graph.nodes if node.op == "placeholder"]
        shapes = [example.shape for example in piece.examples[len(piece.inputs) :]]
        # The model's own are named by their layer. Folded adapters have wide ones, too; what they add is narrow.
        self._wide = {
            node: name.removeprefix("decoder.")
            for node, name, shape in zip(placeholders[len(piece.inputs) :], piece.weights, shapes, strict=True)
            if ".layers." in f".{name}" or min(shape) >= hidden
        }
        self._ranges = ranges

    def run_node(self, node: fx.Node) -> Any:
        name = self._wide.get(cast(fx.Node, node.args[1])) if node.target is torch.ops.aten.linear.default else None
        if name is not None:
            largest = float(self.env[cast(fx.Node, node.args[0])].abs().max())
            # (max() of Python would lose NaN.)
            self._ranges[name] = largest if not largest <= self._ranges.get(name, 0.0) else self._ranges[name]
        return super().run_node(node)
