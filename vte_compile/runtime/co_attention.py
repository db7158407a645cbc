"""Run a rewritten co-attention layer: a module with the layer's weights, and its graph, compiled on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from vte_compile.capture.co_attention import INPUTS, MASKS, CoAttentionGraph, copy_graph, placeholder_of, without_mask
from vte_compile.errors import InputError
from vte_compile.passes import PassResult
from vte_compile.passes.lower_piecewise import structure_key
from vte_compile.runtime.inductor import Function, PieceCompiler

_Key = tuple[tuple[str, ...], bool, torch.dtype, torch.device]
"""The masks given, whether there is one row, and the inputs' dtype and device."""


@dataclass
class _Program:
    """A graph for calls with certain masks."""

    module: fx.GraphModule
    arguments: list[str]
    """What it takes, in order: names of ``INPUTS``, and paths of weights."""

    @property
    def masks(self) -> tuple[str, ...]:
        return tuple(name for name in self.arguments if name in MASKS)

    def without(self, mask: str) -> _Program:
        return _Program(without_mask(self.module, mask), [name for name in self.arguments if name != mask])


class RewrittenCoAttentionLayer(nn.Module):
    """What stands in a model in the place of a co-attention layer, with its arguments and results.

    Weights have the paths that they have in the layer; those that are unchanged are the layer's own. There are no
    guards: a graph is compiled for any number of rows above one and one for one row, each for all lengths above 1.
    """

    def __init__(self, graph: CoAttentionGraph, passes: list[PassResult], compiler: PieceCompiler | None) -> None:
        super().__init__()
        self.passes = passes
        """What the passes did to this layer."""
        self._compiler = compiler
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        paths = {placeholder_of(path): path for path in graph.weights}
        program = _Program(graph.module, [paths.get(name, name) for name in names])
        self._masks = program.masks
        """Those that the kept attentions take."""
        self._programs = {program.masks: program}
        for mask in program.masks:
            fewer = [known.without(mask) for known in self._programs.values()]
            self._programs.update({known.masks: known for known in fewer})
        self._functions: dict[_Key, Function] = {}
        for path, tensor in graph.weights.items():
            owner: nn.Module = self
            *parents, name = path.split(".")
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            owner.register_parameter(name, own)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, None, None]:
        """The layer's output [B, T, C], and no attention weights.

        Args:
            hidden_states: [B, T, C].
            encoder_hidden_states: The other side's tokens [B, S, C].
            attention_mask: [B, 1, 1, T], added to the self attention's scores.
            encoder_attention_mask: [B, 1, 1, S], added to the cross attention's scores.

        Raises:
            InputError: Misshaped arguments; the message says which.
        """
        given = (hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask)
        values: dict[str, Any] = dict(zip(INPUTS, given, strict=True))
        _check_shapes(values)
        program = self._programs[tuple(mask for mask in self._masks if values[mask] is not None)]
        arguments = [values[n].contiguous() if n in INPUTS else self.get_parameter(n) for n in program.arguments]
        return self._function(program, arguments, values)(*arguments)[0], None, None

    def _function(self, program: _Program, arguments: list[Tensor], values: dict[str, Any]) -> Function:
        """The program, compiled if it can be."""
        hidden = values["hidden_states"]
        # While the model itself is traced or compiled, it is the graph that should be seen; and autocast, which
        # chooses the dtype op by op, sees nothing of what is compiled.
        if self._compiler is None or torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type):
            return program.module
        # Sizes 0 and 1 are other programs to Inductor. One row is common; the others run uncompiled.
        if not len(hidden) or min(hidden.shape[1], values["encoder_hidden_states"].shape[1]) < 2:
            return program.module
        key = (program.masks, len(hidden) == 1, hidden.dtype, hidden.device)
        if key not in self._functions:
            # A copy: the examples stay out of what is kept (and copied, and pickled) with the model.
            module = copy_graph(program.module)
            examples = _examples(program.arguments, arguments, len(hidden))
            for node, example in zip(module.graph.nodes, examples, strict=False):
                node.meta["val"] = example
            self._functions[key] = self._compiler.compile(module, structure_key(module.graph, examples), examples)
        return self._functions[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}}  # which can be neither copied nor pickled


def _check_shapes(values: dict[str, Any]) -> None:
    """Compiled graphs have no guards, so this is where wrong shapes are found."""
    hidden, other = values["hidden_states"], values["encoder_hidden_states"]
    if hidden.ndim != 3 or other.ndim != 3 or hidden.shape[::2] != other.shape[::2]:
        raise InputError(
            "hidden_states and encoder_hidden_states: expected shapes [B, T, C] and [B, S, C], got "
            f"{list(hidden.shape)} and {list(other.shape)}."
        )
    for name, tokens in zip(MASKS, (hidden, other), strict=True):
        expected = (tokens.shape[0], 1, 1, tokens.shape[1])
        if values[name] is not None and values[name].shape != expected:
            raise InputError(f"{name}: expected shape {list(expected)}, got {list(values[name].shape)}.")


def _examples(names: list[str], arguments: list[Tensor], rows: int) -> list[Tensor]:
    """Fake tensors like the arguments, with symbolic lengths and, for more than one row, a symbolic batch size."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 3)
    # Any numbers do that are neither 0 nor 1, and differ.
    batch, tokens, other = mode.from_tensor(torch.empty(3, 11, 13, device="meta"), symbolic_context=sizes).shape
    batch = batch if rows > 1 else 1
    lengths = {"hidden_states": tokens, "attention_mask": tokens}
    examples: list[Tensor] = []
    for name, value in zip(names, arguments, strict=True):
        if name not in INPUTS:
            examples.append(mode.from_tensor(value.detach(), static_shapes=True))
            continue
        length = lengths.get(name, other)
        shape = (batch, 1, 1, length) if name in MASKS else (batch, length, value.shape[2])
        with mode:
            examples.append(torch.empty(shape, dtype=value.dtype, device=value.device))
    return examples
