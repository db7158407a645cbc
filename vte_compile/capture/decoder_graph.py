"""What tracing gives and the passes rewrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from vte_compile.capture.decoder_with_head import DecoderWithHead
from vte_compile.families.decoder import DecoderSpec
from vte_compile.runtime.prompt_value import PromptValue
from vte_compile.runtime.steps import Phase

Parameter = Callable[[], Tensor]


@dataclass
class DecoderGraph:
    """A traced decoder and what the passes learn and decide about it."""

    module: fx.GraphModule
    phase: Phase
    batched: bool
    """Whether the batch size is symbolic (else 1)."""
    spec: DecoderSpec
    parameters: dict[str, Parameter]
    """get_attr target -> how to read the tensor now (the model may have been moved since)."""
    layer_of: dict[fx.Node, int] = field(default_factory=dict)
    """Filled by annotate_layers: -1 before the layers, 0 .. L-1, L after them."""
    kv_layers: list[int] = field(default_factory=list)
    """Layers with keys and values; skip_attention takes some away."""
    streams: list[fx.Node] = field(default_factory=list)
    """Filled by annotate_layers: the residual stream behind each layer."""
    adapted: set[int] = field(default_factory=set)
    """Filled by fold_adapters: the layers that have their adapter."""
    prompt_state: list[PromptValue] = field(default_factory=list)
    """Filled by fold_adapters: what adapters know of the prompt. Prefill's outputs behind the keys and values, and the
    last inputs of the other graphs."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def clone(self) -> DecoderGraph:
        """A copy for the passes to rewrite; it refers to the same weights."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, val_map={}, return_output_node=False))
        return replace(
            self,
            module=fx.GraphModule(self.module, graph),
            parameters=dict(self.parameters),
            kv_layers=list(self.kv_layers),
            adapted=set(self.adapted),
            prompt_state=list(self.prompt_state),
        )

    def rebound(self, spec: DecoderSpec) -> DecoderGraph:
        """A copy that refers to the weights of `spec`: the same decoder, of which some weights were freed."""
        wrapper = DecoderWithHead(spec, self.phase)
        other = replace(self.clone(), spec=spec)
        other.parameters = {target: reader(wrapper, other.module, target) for target in self.parameters}
        for target, read in other.parameters.items():
            path, _, name = target.rpartition(".")
            setattr(other.module.get_submodule(path), name, read())
        return other

    def placeholder(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)


def reader(wrapper: nn.Module, module: fx.GraphModule, target: str) -> Parameter:
    """Read through the owning module: ``.to()`` and friends may replace the tensor objects."""
    path, _, name = target.rpartition(".")
    try:
        owner = wrapper.get_submodule(path)
        getattr(owner, name)
    except AttributeError:  # a constant that tracing lifted, which lives on the graph module alone
        owner = module.get_submodule(path)

    def read() -> Tensor:
        # A decode step reads hundreds of them, and Module.__getattr__ takes five times as long as its dict.
        value = owner._parameters.get(name)
        return getattr(owner, name) if value is None else value

    return read
