"""The decoder as ONNX graphs: stages between exits, and the whole of it as one graph with the exits inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from vte_compile.errors import CaptureError
from vte_compile.export.onnx_compact import compact
from vte_compile.export.onnx_glue import gate_function
from vte_compile.export.onnx_graph import OnnxGraph
from vte_compile.export.onnx_manifest import CacheFacts, PromptFacts
from vte_compile.export.onnx_ops import ORT, Operators, replace_ops, windows_of
from vte_compile.export.onnx_pieces import check, convert
from vte_compile.families.token_blocks import NAME as BLOCKS
from vte_compile.passes.lower_piecewise import Piece, PiecewiseGraph
from vte_compile.plan import GateExit, StaticExit

_Exit = GateExit | StaticExit


@dataclass
class Stage:
    """Layers between two exits."""

    layers: list[int]
    pieces: list[Piece]
    stream: str
    """The value that enters: the residual stream."""
    exit: _Exit | None


class OnnxDecoder:
    """A decoder's pieces, converted, and what graphs are made of them.

    Args:
        lowered: Of the phase "chunk".
        exits: Of the plan, in order.
        layers: How many the decoder has.
        token_inputs: Names of what it takes of each token besides embedding and position.
        operators: Of the target.
        companion: Whether a token goes along with each prompt, at the place behind its last.
    """

    def __init__(
        self,
        lowered: PiecewiseGraph,
        exits: Sequence[_Exit],
        layers: int,
        token_inputs: Sequence[str] = (),
        operators: Operators = ORT,
        companion: bool = False,
    ) -> None:
        self.lowered, self.operators, self.token_inputs = lowered, operators, token_inputs
        self.behind = int(companion)
        """So many places behind a row's last token are not padding."""
        pieces = [step for step in lowered.steps if isinstance(step, Piece)]
        self._preamble = [p for p in pieces if p.layer < 0]
        self.stages = _stages(pieces, exits, layers)
        self._converted: dict[str, ir.Model] = {}
        self._gate_weights: dict[tuple[int, str], Tensor] = {}
        self._placeholders = dict(zip(lowered.inputs, lowered.input_examples, strict=True))

    @property
    def distinct(self) -> list[Piece]:
        """Pieces to convert, each once."""
        known = {p.key: p for stage in self.stages for p in stage.pieces}
        return list({p.key: p for p in self._preamble}.values()) + list(known.values())

    def convert_all(self) -> None:
        """Convert all pieces, with a progress bar.

        Raises:
            CaptureError: One cannot be converted.
        """
        for piece in tqdm(self.distinct, desc="convert pieces", leave=False):
            self.convert(piece)

    def convert(self, piece: Piece) -> None:
        """Convert a piece, and compare the result with it.

        Raises:
            CaptureError: It cannot be converted.
        """
        with torch.no_grad():
            parameters = [read().detach() for read in piece.parameters]
        inputs = piece.examples[: len(piece.inputs)]
        values = [*(torch.zeros([_hint(s) for s in e.shape], dtype=e.dtype) for e in inputs), *parameters]
        dynamic: list[set[int]] = [{d for d, s in enumerate(e.shape) if not isinstance(s, int)} for e in inputs]
        dynamic += [set() for _ in parameters]
        outputs = [f"result_{i}" for i in range(len(piece.outputs))]
        model = convert(replace_ops(piece.module, self.operators.lowered), values, dynamic, outputs, self.operators)
        expected = replace_ops(piece.module, self.operators.expected)
        # Behind a window, its edge shows.
        sizes = [(3, 3, 2), (1, 1, 0), *((3, 3, window) for window in windows_of(piece.module))]
        if self.behind:
            sizes.append((3, 2, 0))
        for places, tokens, past in sizes:
            tried = [self._value(n, e, places, tokens, past) for n, e in zip(piece.inputs, inputs, strict=True)]
            check(model, expected, [*tried, *parameters])
        self._converted[piece.key] = model

    def _value(self, name: str, example: Tensor, places: int, tokens: int, past: int) -> Tensor:
        """Numbers for a piece's input: one row, whose cache is full, or has room where that is needed; its chunk has so
        many places, of which the last are padding if there are fewer tokens."""
        lengths = {"new_lengths": tokens, "past_lengths": past}
        if name in lengths:
            return torch.tensor([lengths[name]])
        batch, length = (_expression(size) for size in self._placeholders["inputs_embeds"].shape[:2])
        sizes = {batch: 1, length: places}
        if name == BLOCKS:
            return torch.arange(places)[None] // 2
        past += places if self.operators.needs_room else 0
        shape = [sizes.get(_expression(size), size if isinstance(size, int) else past) for size in example.shape]
        if not example.dtype.is_floating_point:
            counted = torch.arange(shape[-1]).expand(shape).to(example.dtype)
            # Rows of multimodal positions differ.
            return counted + torch.arange(shape[0])[:, None, None] if len(shape) == 3 else counted.contiguous()
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=generator).to(example.dtype)

    def pieces(self, stage: Stage, env: Mapping[str, Any]) -> Iterator[Piece]:
        """What a stage runs, in order, where ``env`` has the values that there are when a piece's turn comes."""
        # What stands before the layers and reads positions only is computed anew in each stage.
        for piece in [*self._preamble, *stage.pieces]:
            if piece.layer >= 0 or all(name in env for name in piece.inputs):
                yield piece

    def caches(self, stage: Stage) -> list[CacheFacts]:
        """The keys and values of a stage."""
        facts = []
        for layer in stage.layers:
            if (key := self._placeholders.get(f"past_key_{layer}")) is not None:
                value = self._placeholders[f"past_value_{layer}"]
                facts.append(CacheFacts(layer, int(key.shape[1]), int(key.shape[3]), int(value.shape[3])))
        return facts

    def prompt(self, stage: Stage) -> list[PromptFacts]:
        """What a stage's adapters know of the prompt."""
        read = {name for piece in stage.pieces for name in piece.inputs}
        values = [value for value in self.lowered.prompt_state if value.name in read]
        return [PromptFacts(v.name, [int(s) for s in self._placeholders[v.name].shape[1:]]) for v in values]

    @property
    def hidden_size(self) -> int:
        """C."""
        return int(self._placeholders["inputs_embeds"].shape[-1])

    # ------------------------------------------------------------ graphs

    def add_stage(self, graph: OnnxGraph, index: int) -> None:
        """One stage as a graph."""
        stage, last = self.stages[index], index == len(self.stages) - 1
        hidden = self.hidden_size
        entering = "hidden_states" if index else "inputs_embeds"
        stream = graph.input(entering, ["batch", "tokens", hidden])
        kept = "tokens"
        if index:
            kept = "kept_tokens"
            stream = graph.op("Gather", [stream, graph.input("keep", [kept], ir.DataType.INT64)], "keep", axis=1)
        env = {stage.stream: stream}
        env["position_ids"] = graph.input("position_ids", [*self._position_rows, "batch", kept], ir.DataType.INT64)
        for name in ("new_lengths", "past_lengths"):
            env[name] = graph.input(name, ["batch"], ir.DataType.INT64)
        env |= self._add_token_inputs(graph, [stage], kept)
        self._add_past(graph, stage, env)
        self._run(graph, stage, env)
        if last:
            graph.output("logits", env[self.lowered.outputs[0]], ["batch", 1, self._vocabulary])
        else:
            graph.output("next_hidden_states", env[self.stages[index + 1].stream], ["batch", kept, hidden])
        self._add_present(graph, stage, env, kept)

    def add_single(self, graph: OnnxGraph) -> None:
        """All stages as one graph, with the exits inside."""
        hidden = self.hidden_size
        integer = ir.DataType.INT64
        stream = graph.input("inputs_embeds", ["batch", "tokens", hidden])
        visual = graph.input("visual_mask", ["batch", "tokens"], ir.DataType.BOOL)
        positions = graph.input("position_ids", [*self._position_rows, "batch", "tokens"], integer)
        lengths = graph.input("new_lengths", ["batch"], integer)
        past_lengths = graph.input("past_lengths", [len(self.stages), "batch"], integer)
        more = self._add_token_inputs(graph, self.stages, "tokens")
        exit_layer: ir.Value | None = None
        present_lengths = []
        envs = []
        for index, stage in enumerate(self.stages):
            own = graph.op("Gather", [past_lengths, graph.constant(index)], f"exits.{index}", axis=0)
            env = {stage.stream: stream, "position_ids": positions, "new_lengths": lengths, "past_lengths": own, **more}
            self._add_past(graph, stage, env)
            self._run(graph, stage, env)
            envs.append(env)
            present_lengths.append(graph.op("Add", [own, lengths], f"exits.{index}"))
            if stage.exit is None:
                continue
            layer, prefix = stage.exit.layer, f"exits.{stage.exit.layer}"
            stream = env[self.stages[index + 1].stream]
            fire = self.add_gate(graph, stage.exit, stream, visual, lengths)
            reached = graph.op("Where", [fire, graph.constant(layer), graph.constant(-1)], prefix)
            exit_layer = reached if exit_layer is None else graph.op("Max", [exit_layer, reached], prefix)
            leaving = graph.op("And", [visual, graph.op("Unsqueeze", [fire, graph.constant([1])], prefix)], prefix)
            # Where positions are multimodal, [3, B, T].
            turned = graph.op("Transpose", [positions], prefix, perm=[1, 2, 0]) if self._position_rows else positions
            more = {name: value for name, value in more.items() if self._reads(self.stages[index + 1 :], name)}
            moved = [stream, turned, visual, *more.values()]
            values, lengths, real = compact(graph, prefix, moved, lengths, leaving, self.behind)
            stream, positions, visual = values[:3]
            positions = graph.op("Transpose", [positions], prefix, perm=[2, 0, 1]) if self._position_rows else positions
            more = dict(zip(more, values[3:], strict=True))
            # What is padding now is no visual token, and in no block.
            visual = graph.op("And", [visual, real], prefix)
            if BLOCKS in more:
                more[BLOCKS] = graph.op("Where", [real, more[BLOCKS], graph.constant(-1)], prefix)
        graph.output("logits", envs[-1][self.lowered.outputs[0]], ["batch", 1, self._vocabulary])
        rows = [graph.op("Unsqueeze", [row, graph.constant([0])], "exits") for row in present_lengths]
        graph.output("present_lengths", graph.op("Concat", rows, "exits", axis=0), [len(self.stages), "batch"], integer)
        if exit_layer is None:
            never = graph.op("Mul", [lengths, graph.constant(0)], "exits")
            exit_layer = graph.op("Sub", [never, graph.constant(1)], "exits")
        graph.output("exit_layer", exit_layer, ["batch"], integer)
        for stage, env in zip(self.stages, envs, strict=True):
            self._add_present(graph, stage, env)

    def add_gate(
        self, graph: OnnxGraph, exit_: _Exit, stream: ir.Value, visual: ir.Value, lengths: ir.Value
    ) -> ir.Value:
        """Whether the visual tokens leave, [B] bool."""
        gated, prefix = isinstance(exit_, GateExit), f"exits.{exit_.layer}"
        weights: list[tuple[str, Callable[[], Tensor]]] = []
        examples = [self._hidden_example(), torch.ones(3, 5, dtype=torch.bool), torch.full((3,), 5)]
        if isinstance(exit_, GateExit):
            weights = [
                (f"{prefix}.{name}", partial(self._gate_weight, exit_, name)) for name in ("w1", "w2", "threshold")
            ]
            examples += [read() for _, read in weights]
        key = f"gate {[list(e.shape) for e in examples[3:]]}"
        if key not in self._converted:
            dynamic: list[set[int]] = [{0, 1}, {0, 1}, {0}, set(), set(), set()]
            function = gate_function(gated)
            self._converted[key] = convert(function, examples, dynamic[: len(examples)], ["fire"], self.operators)
            check(self._converted[key], function, examples)
        [fire] = graph.add(self._converted[key], prefix, [stream, visual, lengths, *weights])
        return fire

    def _gate_weight(self, exit_: GateExit, name: str) -> Tensor:
        """In float32, in which gates compute; the same object each time, so that it is written once."""
        key = (exit_.layer, name)
        if key not in self._gate_weights:
            self._gate_weights[key] = torch.as_tensor(getattr(exit_, name)).detach().float()
        return self._gate_weights[key]

    def _hidden_example(self) -> Tensor:
        example = self._placeholders["inputs_embeds"]
        return torch.randn(3, 5, int(example.shape[-1]), generator=torch.Generator().manual_seed(0)).to(example.dtype)

    @property
    def _position_rows(self) -> list[int]:
        """[3] in front of [B, T] if positions are multimodal."""
        return [int(size) for size in self._placeholders["position_ids"].shape[:-2]]

    @property
    def _vocabulary(self) -> int:
        return int(self.lowered.logits_example.shape[-1])

    def _run(self, graph: OnnxGraph, stage: Stage, env: dict[str, ir.Value]) -> None:
        """Add the stage's pieces; ``env`` has, and gets, values by their name in the traced graph."""
        for piece in self.pieces(stage, env):
            if missing := [name for name in piece.inputs if name not in env]:
                raise CaptureError(f"layer {piece.layer} reads {missing[0]} of a layer before an exit.")
            weights = [
                (name.removeprefix("decoder."), read)
                for name, read in zip(piece.weights, piece.parameters, strict=True)
            ]
            results = graph.add(
                self._converted[piece.key],
                _prefix(piece),
                [*(env[name] for name in piece.inputs), *weights],
                quantize=True,
            )
            for name, value in zip(piece.outputs, results, strict=True):
                env.setdefault(name, value)

    def _reads(self, stages: Sequence[Stage], name: str) -> bool:
        return any(name in piece.inputs for stage in stages for piece in stage.pieces)

    def _add_token_inputs(self, graph: OnnxGraph, stages: Sequence[Stage], tokens: str) -> dict[str, ir.Value]:
        """Inputs [B, tokens, ...] that some of these stages read."""
        added = {}
        for name in self.token_inputs:
            if self._reads(stages, name):
                example = self._placeholders[name]
                dtype = None if example.dtype.is_floating_point else ir.DataType.INT64
                added[name] = graph.input(name, ["batch", tokens, *map(int, example.shape[2:])], dtype)
        return added

    def _add_past(self, graph: OnnxGraph, stage: Stage, env: dict[str, ir.Value]) -> None:
        for cache in self.caches(stage):
            for kind, size in (("key", cache.key_size), ("value", cache.value_size)):
                shape: list[int | str] = ["batch", cache.kv_heads, f"past_columns_{cache.layer}", size]
                name = f"past_key_values.{cache.layer}.{kind}"
                env[f"past_{kind}_{cache.layer}"] = graph.input(name, shape)
        for value in self.prompt(stage):
            env[value.name] = graph.input(f"past_prompt.{value.name}", ["batch", *value.shape])

    def _add_present(self, graph: OnnxGraph, stage: Stage, env: dict[str, ir.Value], kept: str = "tokens") -> None:
        for cache in self.caches(stage):
            at = self.lowered.kv[cache.layer]
            assert at is not None
            for i, (kind, size) in enumerate((("key", cache.key_size), ("value", cache.value_size))):
                name, columns = f"present.{cache.layer}.{kind}", f"present_columns_{cache.layer}"
                if self.operators.new_columns:
                    name, columns = f"new.{cache.layer}.{kind}", kept
                shape: list[int | str] = ["batch", cache.kv_heads, columns, size]
                graph.output(name, env[self.lowered.outputs[1 + 2 * at + i]], shape)
        prompts = self.lowered.prompt_state
        names = self.lowered.outputs[len(self.lowered.outputs) - len(prompts) :]
        outputs = {value.name: name for value, name in zip(prompts, names, strict=True)}
        for fact in self.prompt(stage):
            graph.output(f"present_prompt.{fact.name}", env[outputs[fact.name]], ["batch", *fact.shape])


def _stages(pieces: Sequence[Piece], exits: Sequence[_Exit], layers: int) -> list[Stage]:
    stages = []
    start, entering = 0, "inputs_embeds"
    for exit_ in [*exits, None]:
        end = layers if exit_ is None else exit_.layer + 1
        own = [p for p in pieces if start <= p.layer < end or (exit_ is None and p.layer >= layers)]
        stages.append(Stage(list(range(start, end)), own, entering, exit_))
        later = [p for p in pieces if p.layer >= end]
        if exit_ is not None:
            given = {name for p in own for name in p.outputs}
            crossing = list(dict.fromkeys(name for p in later for name in p.inputs if name in given))
            if len(crossing) != 1:
                raise CaptureError(f"behind layer {exit_.layer}: {len(crossing)} values go on, expected the stream.")
            entering = crossing[0]
        start = end
    return stages


def _prefix(piece: Piece) -> str:
    """What nodes of a piece are named by, where they have no weight."""
    layers = [name.split(".") for name in piece.weights if ".layers." in f".{name}"]
    return f"layers.{piece.layer}" if layers else "decoder"


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr
