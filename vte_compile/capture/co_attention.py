"""Trace one co-attention layer of BridgeTower into an FX graph without state, for the passes to rewrite.

    (weights ..., hidden_states [B, T, C], encoder_hidden_states [B, S, C], attention_mask [B, 1, 1, T],
     encoder_attention_mask [B, 1, 1, S])  ->  (output [B, T, C],)

B, T and S stay symbolic. Masks are added to scores. Each attention is one scaled_dot_product_attention, whatever
implementation the model has.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from transformers import AttentionInterface

from vte_compile.capture.model_state import attention_implementation, evaluating
from vte_compile.errors import CaptureError
from vte_compile.passes.dead_code import remove_dead_nodes
from vte_compile.passes.residual import SDPA

INPUTS = ("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask")
MASKS = INPUTS[2:]

_ATTENTION = "vte_capture_co_attention"
# Any sizes do that are neither 0 nor 1 and differ, so that no two are taken for one.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_OTHER_TOKENS = 3, 11, 13


@dataclass
class CoAttentionGraph:
    """A traced co-attention layer: a graph whose weights are inputs, and the weights."""

    phase: ClassVar[str] = "co-attention"

    module: fx.GraphModule
    """Placeholders are named as in ``INPUTS``, or by :func:`placeholder_of` a weight."""
    weights: dict[str, Tensor]
    """By path in the layer, such as ``attention.self.query.weight``. The tensors themselves may be the model's."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def clone(self, layer: nn.Module) -> CoAttentionGraph:
        """A copy to rewrite, with the weights of a layer that is built like the traced one."""
        return CoAttentionGraph(copy_graph(self.module), {path: _tensor(layer, path) for path in self.weights})

    def placeholder(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)

    def path_of(self, node: fx.Node) -> str | None:
        """The path of the weight that a node is; None if it is no weight."""
        return next((path for path in self.weights if placeholder_of(path) == node.name), None)

    def add_weight(self, path: str, value: Tensor) -> fx.Node:
        """A new weight, to be used in the graph."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(placeholder_of(path))
        self.weights[path] = value
        return node

    def remove_dead(self) -> None:
        """Drop nodes, weights and inputs that nothing uses any more."""
        remove_dead_nodes(self.graph)
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and not n.users]:
            if (path := self.path_of(node)) is not None:
                del self.weights[path]
            self.graph.erase_node(node)
        self.graph.lint()
        self.module.recompile()


def placeholder_of(path: str) -> str:
    """The name of a weight's placeholder."""
    return path.replace(".", "__")


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Another module of the same graph, which has no weights."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, val_map={}, return_output_node=False))
    return fx.GraphModule({}, graph)


def without_mask(module: fx.GraphModule, mask: str) -> fx.GraphModule:
    """A copy of a graph for calls that give no such mask ("attention_mask" or "encoder_attention_mask")."""
    copied = copy_graph(module)
    for node in [n for n in copied.graph.nodes if n.op == "placeholder" and n.name == mask]:
        for user in list(node.users):
            user.replace_input_with(node, None)
        copied.graph.erase_node(node)
    copied.recompile()
    return copied


def _capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of all tokens to all tokens: BridgeTower is no decoder."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _capture_attention)


class _Layer(nn.Module):
    """The layer's output alone, with all arguments by position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, other: Tensor, mask: Tensor, other_mask: Tensor) -> Tensor:
        output: Tensor = self.layer(hidden, other, attention_mask=mask, encoder_attention_mask=other_mask)[0]
        return output


def capture_co_attention(layer: nn.Module) -> CoAttentionGraph:
    """Trace a BridgeTowerBertCrossLayer. The layer is not modified; its weights are referred to, not copied.

    Raises:
        CaptureError: torch.export could not trace the layer, or it does with its masks what only its attention may do.
    """
    wrapper = _Layer(layer)
    name = type(layer).__name__
    weight = next(layer.parameters())
    hidden_size = weight.shape[-1]
    batch, tokens, other = _EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_OTHER_TOKENS
    shapes = ((batch, tokens, hidden_size), (batch, other, hidden_size), (batch, 1, 1, tokens), (batch, 1, 1, other))
    examples = tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes)
    lengths, masks = {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 3: Dim.AUTO}
    with contextlib.ExitStack() as stack:
        for config in {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}.values():
            stack.enter_context(attention_implementation(config, _ATTENTION))
        stack.enter_context(evaluating(wrapper))
        stack.enter_context(torch.no_grad())
        try:
            exported = torch.export.export(
                wrapper, examples, dynamic_shapes=(lengths, lengths, masks, masks), strict=False
            )
        except Exception as error:
            raise CaptureError(f"torch.export could not trace {name}: {error}") from error
    graph = exported.graph
    inputs = list(INPUTS)
    weights: dict[str, Tensor] = {}
    for node, spec in zip(list(graph.nodes), exported.graph_signature.input_specs, strict=False):
        new_name = inputs.pop(0) if spec.kind == InputKind.USER_INPUT else None
        if new_name is None:
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                raise CaptureError(f"{name}: its traced graph has the constant {spec.target}, which is no weight.")
            path = str(spec.target).removeprefix("layer.")
            weights[path], new_name = _tensor(layer, path), placeholder_of(path)
        node._rename(new_name)
        node.target = node.name
    _read_sizes_from_tokens(graph)
    captured = CoAttentionGraph(fx.GraphModule({}, graph), weights)
    for mask in MASKS:
        for user in captured.placeholder(mask).users:
            if user.target is not SDPA or user.args[3].name != mask:  # type: ignore[union-attr]
                raise CaptureError(
                    f"{name}: {user.name} uses {mask}, which only scaled_dot_product_attention should: the layer does "
                    "not attend through transformers' AttentionInterface."
                )
    for node in captured.graph.nodes:
        node.meta = {}  # it describes the example, and holds on to it
    return captured


def _read_sizes_from_tokens(graph: fx.Graph) -> None:
    """Read B, T and S from the token inputs: tracing may take them from a mask, which need not be given."""
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    hidden, other = placeholders["hidden_states"], placeholders["encoder_hidden_states"]
    dims = {str(n.meta["val"].shape[dim]): (n, dim) for n, dim in ((other, 1), (hidden, 1), (hidden, 0))}
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.args = dims[str(node.meta["val"])]


def built_alike(layer: nn.Module, other: nn.Module) -> bool:
    """Whether two layers do the same with their weights: same modules with the same settings, same shapes."""
    return _description(layer) == _description(other)


def _description(layer: nn.Module) -> list[Any]:
    described: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: value if isinstance(value, bool | int | float | str | tuple) else id(value)
            for key, value in vars(module).items()
            if key not in vars(nn.Module())
        }
        weights = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(key, weight.shape, weight.dtype, weight.device) for key, weight in weights]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]  # tracing runs them
        described.append((name, type(module), settings, shapes, hooks))
    return described


def _tensor(layer: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(layer.get_submodule(owner), name)
    return tensor
