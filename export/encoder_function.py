"""An image encoder with its projector, cut out of a model, for all targets: a function that torch.export can trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, fx, nn
from torch.export import Dim

from vte_compile.capture.model_state import attention_implementation, evaluating
from vte_compile.errors import CaptureError
from vte_compile.export.manifest import VisionCall


@dataclass
class EncoderFunction:
    """Inputs (image_features.py names them) and weights in, visual tokens' embeddings [n, C] out."""

    function: Callable[..., tuple[Tensor]]
    examples: list[list[Tensor]]
    """Of its inputs: what it is traced with, then of other sizes, if there are any."""
    dims: list[dict[int, str]]
    """Of each input: names of the dims of any size."""
    weights: dict[str, Tensor]
    """By name, in the order of the last arguments."""
    facts: VisionCall
    """What runners have to know; no file and no weights yet."""


class _Call(nn.Module):
    """torch.export takes modules."""

    def __init__(self, function: Callable[..., tuple[Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        return self.function(*values)


def traced(encoder: EncoderFunction) -> tuple[fx.GraphModule, list[Tensor], dict[str, Tensor]]:
    """The function as a graph; examples of its arguments, fake ones where sizes are symbolic; and its weights.

    Raises:
        CaptureError: torch.export cannot trace it.
    """
    weights = list(encoder.weights.values())
    if isinstance(encoder.function, fx.GraphModule):
        return encoder.function, [*encoder.examples[0], *weights], encoder.weights
    dims = tuple({d: Dim.AUTO for d in named} for named in (*encoder.dims, *({} for _ in weights)))
    # Sizes 0 and 1 are otherwise other programs to torch.export; here one has to do for all.
    oblivious = symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    arguments = (*encoder.examples[0], *weights)
    try:
        with torch.no_grad(), oblivious:
            program = torch.export.export(
                _Call(encoder.function), arguments, dynamic_shapes=(dims,), strict=False
            ).module(check_guards=False)
    except Exception as error:  # whatever code of the model's author torch.export cannot trace
        raise CaptureError(f"torch.export could not trace the image encoder: {error}") from error
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"][: len(encoder.dims)]
    module, constants = lifted(program)
    named = encoder.weights | {f"constant.{name}": value for name, value in constants.items()}
    return module, [*values, *weights, *constants.values()], named


def lifted(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A graph with its weights and constants as inputs behind the others; and these, by name."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    for i, node in enumerate([n for n in nodes if n.op == "placeholder"]):
        env[node] = graph.placeholder(f"value_{i}")
    weights: dict[str, Tensor] = {}
    by_target: dict[str, fx.Node] = {}
    for node in [n for n in nodes if n.op == "get_attr" and n.users]:
        target = str(node.target)
        if target not in by_target:
            by_target[target] = graph.placeholder(f"weight_{len(weights)}")
            path, _, name = target.rpartition(".")
            weights[target] = getattr(module.get_submodule(path), name)
        env[node] = by_target[target]
    for node in nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(tuple(torch.utils._pytree.tree_leaves(node.args)), lambda n: env[n]))
        elif node.op not in ("placeholder", "get_attr"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.eliminate_dead_code()
    return fx.GraphModule({}, graph), weights


def of_module(
    module: nn.Module, inputs: int, config: Any, attention: str
) -> tuple[Callable[..., tuple[Tensor]], dict[str, Tensor]]:
    """A module as a function of its first so many arguments and then its weights; and these, by name.

    ``config``, of the modules that attend, says how they do, and so does ``attention`` while the function runs.
    """
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def function(*values: Tensor) -> tuple[Tensor]:
        own = dict(zip(weights, values[inputs:], strict=True))
        with evaluating(module), attention_implementation(config, attention):
            features: tuple[Tensor] = torch.func.functional_call(module, own, values[:inputs])
            return features

    return function, weights
