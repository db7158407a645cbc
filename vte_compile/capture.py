"""Trace a decoder into FX graphs: prefill, extend (a chunk that continues a cache) and decode.

Each graph has flat tensors in and out, with lengths that stay symbolic:

    prefill  (inputs_embeds [1, S, C], position_ids [1, S], more ...)               -> logits, key_0, value_0, key_1 ...
    extend   (inputs_embeds [1, T, C], position_ids [1, T], more ..., past ...)     -> the same, keys and values grown
    decode   (inputs_embeds [B, 1, C], position_ids [B, 1], past ..., kv_start ...) -> the same

``more`` is what else a decoder is told of each token of a prompt (``DecoderSpec.token_inputs``); mostly nothing.
Where positions are multimodal, position_ids have a leading dim of 3 rows: [3, 1, S], [3, B, 1].
A layer's keys and values are [B, key/value heads, length of that layer, head size]; lengths differ from layer to layer.
Prefill and extend take one row at a time (rows leave at different layers); decode takes the batch, with rows aligned at
the end and ``kv_start_i`` [B] the first real column of each row in layer i (absent for B = 1).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from vte_compile.errors import CaptureError
from vte_compile.families.cache_name import cache_name
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.deepstack import adding, given
from vte_compile.families.logits import capped
from vte_compile.families.token_blocks import allowed, same_block
from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.causal_attention import causal_attention
from vte_compile.module_tree import with_stand_ins
from vte_compile.repeated_layers import (
    NotRepeatable,
    layer_kinds,
    layers_to_trace,
    repeat_layers,
    with_first_layers,
)
from vte_compile.runtime.prompt_value import PromptValue
from vte_compile.runtime.steps import Phase

logger = logging.getLogger(__name__)
Parameter = Callable[[], Tensor]

_ATTENTION = "vte_capture"
# Example lengths: any numbers do that are neither 0 nor 1 and differ, so that no two dims are taken for one.
_EXAMPLE_TOKENS, _EXAMPLE_BATCH, _EXAMPLE_PAST = 11, 5, 17


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
        wrapper = _DecoderWithHead(spec, self.phase)
        other = replace(self.clone(), spec=spec)
        other.parameters = {target: _reader(wrapper, other.module, target) for target in self.parameters}
        for target, read in other.parameters.items():
            path, _, name = target.rpartition(".")
            setattr(other.module.get_submodule(path), name, read())
        return other

    def placeholder(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)


class _TraceLayer(DynamicLayer):
    """A cache layer that leaves one plain concatenation in the graph (or none, in prefill)."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        # Contiguous, since compiled graphs are specialized to the strides of their inputs and this is one later.
        self.keys, self.values, self.is_initialized = key_states.contiguous(), value_states.contiguous(), True
        self.dtype, self.device = key_states.dtype, key_states.device
        return self.keys, self.values


class _DecodeLayer(_TraceLayer):
    """A cache layer that leaves appending to the attention behind it (``vte::append_attention``)."""

    new: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return self.new


def _trace_cache(past: list[Tensor], layer_class: type[_TraceLayer]) -> Any:
    cache: Any = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = layer_class()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    cache.layer_class_to_replicate = layer_class
    return cache


@dataclass
class _DecodeStep:
    """What the attentions of a decode step take besides their arguments: of each layer, its cache and its rows."""

    layers: list[_DecodeLayer]
    starts: list[Tensor]
    """kv_start; none of one row alone."""


_decode_step: contextvars.ContextVar[_DecodeStep | None] = contextvars.ContextVar("vte_decode_step", default=None)


_blocks: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("vte_blocks", default=None)
"""What the attentions of a prompt take besides, where tokens are in blocks: [1, S]."""


def refuse_extras(module: nn.Module, arguments: Mapping[str, Any], taken: Sequence[str] = ()) -> None:
    """Refuse attention that is more than a softmax of scaled products.

    Args:
        module: The attention.
        arguments: Those beyond queries, keys, values, mask and scale.
        taken: Names of what is taken nevertheless.

    Raises:
        CaptureError: It has a window, soft-capping, a bias or sinks.
    """
    for name in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if name not in taken and arguments.get(name) is not None:
            raise CaptureError(f"layer {module.layer_idx}: attention with {name} is not supported yet.")


def _capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with a mask of its own in each layer: the model makes one for all, and lengths differ."""
    refuse_extras(module, kwargs, ("sliding_window", "softcap"))
    window, softcap = int(kwargs.get("sliding_window") or 0), float(kwargs.get("softcap") or 0)
    if (step := _decode_step.get()) is not None:
        settings = scaling, window, softcap
        return _append_attention(step, int(module.layer_idx), query, key, value, settings), None  # type: ignore[arg-type]
    heads, tokens = query.shape[1:3]
    kv_heads, kv_length = key.shape[1], key.shape[2]
    if (blocks := _blocks.get()) is not None:
        torch._check(blocks.shape[1] == tokens)  # one symbol from here on, by which exits know what to shorten
    if window or softcap:  # a window counts what this layer holds: after an exit it reaches further back
        beside = None if blocks is None else same_block(blocks, kv_length)
        output = causal_attention(query, key, value, beside, scaling, window, softcap)
        return output.transpose(1, 2), None
    if heads != kv_heads:
        key, value = (_repeated(x, heads // kv_heads) for x in (key, value))
    if blocks is not None:
        mask = allowed(blocks, kv_length)
    else:
        rows = torch.arange(tokens, device=query.device)[:, None] + (kv_length - tokens)
        columns = torch.arange(kv_length, device=query.device)[None, :]
        mask = (columns <= rows)[None, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _repeated(x: Tensor, times: int) -> Tensor:
    """Key/value heads, each for the query heads of its group; as transformers writes it, which fuse_attention knows."""
    batch, heads, tokens, size = x.shape
    return x.unsqueeze(2).expand(batch, heads, times, tokens, size).reshape(batch, heads * times, tokens, size)


def _append_attention(
    step: _DecodeStep,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: tuple[float | None, int, float],
) -> Tensor:
    layer = step.layers[index]
    if key is not layer.new[0] or value is not layer.new[1]:
        raise CaptureError(f"layer {index}: keys or values change between cache and attention.")
    starts = step.starts[index] if step.starts else None
    past = layer.keys, layer.values
    output, layer.keys, layer.values = append_attention(query, key, value, *past, starts, *settings)
    return output


AttentionInterface.register(_ATTENTION, _capture_attention)


@contextlib.contextmanager
def attention_implementation(config: Any, implementation: str) -> Iterator[None]:
    """Let the modules of a config attend through another function of AttentionInterface, and then as before."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def traceable_experts(config: Any) -> Iterator[None]:
    """Let the experts of a mixture run as grouped products, and then as before.

    The loop over those that some token chose (``eager``) depends on data, so it cannot be traced. How the model
    computes its experts else is left to it.
    """
    before = getattr(config, "_experts_implementation", None)
    if before == "eager":
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        if before == "eager":
            config._experts_implementation = before


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all below it into eval mode, and back each as it was."""
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, training in before:
            m.training = training


def decoder_module(spec: DecoderSpec) -> nn.Module:
    """The decoder, with stand-ins for weights that were freed."""
    if not spec.freed:
        return spec.decoder
    return with_stand_ins(spec.decoder, spec.freed, spec.lm_head.get_parameter("weight"))


class _DecoderWithHead(nn.Module):
    """The part of the model that becomes one graph."""

    def __init__(self, spec: DecoderSpec, phase: Phase) -> None:
        super().__init__()
        self.decoder, self.lm_head = decoder_module(spec), spec.lm_head
        if spec.deepstack and phase != "decode":  # decode steps are of text
            self.decoder = adding(self.decoder, spec.deepstack)
        self.cache_name, self.has_blocks = cache_name(spec.decoder.forward), spec.has_blocks
        self.logit_softcap = spec.logit_softcap

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        token_inputs: list[Tensor],
        past: list[Tensor],
        kv_start: list[Tensor],
    ) -> tuple[Tensor, ...]:
        decode = bool(past) and isinstance(inputs_embeds.shape[1], int)  # else the number of tokens is symbolic
        cache = _trace_cache(past, _DecodeLayer if decode else _TraceLayer)
        token = _decode_step.set(_DecodeStep(cache.layers, kv_start) if decode else None)
        blocks = _blocks.set(token_inputs[-1] if self.has_blocks and token_inputs else None)
        try:
            with given(token_inputs):
                hidden = self.decoder(
                    inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=True, **{self.cache_name: cache}
                ).last_hidden_state
        finally:
            _decode_step.reset(token)
            _blocks.reset(blocks)
        logits = capped(self.lm_head(hidden), self.logit_softcap)
        return logits, *[t for layer in cache.layers for t in (layer.keys, layer.values)]


def capture(spec: DecoderSpec, phase: Phase, *, batched: bool = False) -> DecoderGraph:
    """Trace one phase of a decoder.

    The model is not modified. Its weights are referred to, not copied.

    Args:
        spec: The decoder, from :func:`vte_compile.families.decoder.describe`.
        phase: ``prefill``, ``extend`` or ``decode``.
        batched: Keep the batch size symbolic (decode only).

    Raises:
        CaptureError: torch.export could not trace the decoder.
    """
    if batched and phase != "decode":
        raise ValueError("prefill and extend run one row at a time")
    # In prefill the model masks by itself, and plain_causal proves what the mask is. Blocks, and what a
    # window counts after an exit, are known here alone; and torch's own attention caps no scores.
    own = spec.has_blocks or spec.has_windows or spec.attention_softcap is not None
    masks_itself = phase == "prefill" and not own
    implementation = "sdpa" if masks_itself else _ATTENTION
    names = ("inputs_embeds", "position_ids", *(() if phase == "decode" else spec.token_inputs))
    wrapper = _DecoderWithHead(spec, phase)
    return trace(spec, wrapper, phase, batched, implementation, names, partial(_examples, spec, phase, batched))


def trace(
    spec: DecoderSpec,
    wrapper: Any,
    phase: Phase,
    batched: bool,
    implementation: str,
    names: Sequence[str],
    examples: Callable[[int], tuple[tuple[Any, ...], tuple[Any, ...]]],
) -> DecoderGraph:
    """Trace a module that has the decoder, each kind of layer once if that is known to be enough.

    Args:
        spec: The decoder.
        wrapper: Has it as ``.decoder``, and all weights.
        phase: What is traced.
        batched: Whether the batch size is symbolic.
        implementation: The attention's, in AttentionInterface.
        names: Of the first inputs; behind them come keys and values of layers, and then ``kv_start_0`` and so on.
        examples: For a number of layers: the arguments, and which of their dims are symbolic.

    Raises:
        CaptureError: torch.export could not trace it.
    """
    kinds = layer_kinds(wrapper.decoder)
    for count in dict.fromkeys((layers_to_trace(kinds), len(kinds))):
        args, dynamic_shapes = examples(count)
        module = with_first_layers(wrapper, count)
        try:
            with (
                attention_implementation(spec.config, implementation),
                traceable_experts(spec.config),
                evaluating(wrapper),
                torch.no_grad(),
            ):
                exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"torch.export could not trace the {phase} of {type(spec.decoder).__name__}: {error}"
            ) from error
        traced = _named(exported, names, count)
        try:
            repeat_layers(traced, wrapper, kinds, count)
        except NotRepeatable as reason:
            logger.debug("%s: all layers are traced: %s", phase, reason)
            continue
        parameters = {n.target: _reader(wrapper, traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}
        traced.recompile()
        if phase == "prefill":
            _check_heads(spec, traced)
        return DecoderGraph(traced, phase, batched, spec, parameters, kv_layers=list(range(spec.num_layers)))
    raise AssertionError("unreachable: with all layers traced, nothing is repeated")


def _check_heads(spec: DecoderSpec, traced: fx.GraphModule) -> None:
    """The other phases take keys and values of these sizes."""
    outputs: Any = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    for index, node in enumerate(outputs[1:]):
        shape = node.meta["val"].shape
        if (shape[1], shape[3]) != (spec.kv_heads, spec.head_size):
            kind = "values" if index % 2 else "keys"
            raise CaptureError(
                f"layer {index // 2} of {type(spec.decoder).__name__} caches {kind} of {shape[1]} heads of {shape[3]}, "
                f"where its config says {spec.kv_heads} of {spec.head_size}: keys and values of sizes of their own "
                "(multi-head latent attention, say) are not supported so far."
            )


def _named(exported: torch.export.ExportedProgram, names: Sequence[str], layers: int) -> fx.GraphModule:
    """What torch.export traced, as a graph whose inputs have the names that passes know."""
    module = exported.module(check_guards=False)
    # Unflattening and checking the argument lists is none of our business: the flat placeholders are the interface.
    module.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(module, module.graph)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(placeholders) > len(names):
        names = [*names, *(f"{kind}_{i}" for i in range(layers) for kind in ("past_key", "past_value"))]
    names = [*names, *(f"kv_start_{i}" for i in range(len(placeholders) - len(names)))]
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)
        node.target = node.name
    return module


def _reader(wrapper: nn.Module, module: fx.GraphModule, target: str) -> Parameter:
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


def example_token_inputs(spec: DecoderSpec, embeds: Tensor) -> list[Tensor]:
    """What a decoder takes of each token beside embeddings [B, T, C], as ``DecoderSpec.token_inputs`` names it."""
    blocks = [torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)] if spec.has_blocks else []
    return [*(torch.zeros_like(embeds) for _ in range(spec.deepstack)), *blocks]


def _examples(spec: DecoderSpec, phase: Phase, batched: bool, layers: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    options: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
    batch = _EXAMPLE_BATCH if batched else 1
    tokens = 1 if phase == "decode" else _EXAMPLE_TOKENS
    embeds = torch.zeros(batch, tokens, spec.hidden_size, **options)
    rows = (spec.position_rows,) if spec.position_rows > 1 else ()
    positions = torch.arange(tokens, device=spec.device).expand(*rows, batch, -1).contiguous()
    dims = ({0: Dim.AUTO} if batched else {}) | ({} if phase == "decode" else {1: Dim.AUTO})
    position_dims = {dim + len(rows): kind for dim, kind in dims.items()}
    past: list[Tensor] = []
    kv_start: list[Tensor] = []
    if phase != "prefill":
        for layer in range(layers):
            past += [
                torch.zeros(batch, spec.kv_heads, _EXAMPLE_PAST + layer, spec.head_size, **options) for _ in range(2)
            ]
            if batched:
                kv_start.append(torch.zeros(batch, dtype=torch.long, device=spec.device))
    past_dims = ({0: Dim.AUTO} if batched else {}) | {2: Dim.AUTO}
    more = [] if phase == "decode" else example_token_inputs(spec, embeds)
    shapes = (dims, position_dims, [dims] * len(more), [past_dims] * len(past), [{0: Dim.AUTO}] * len(kv_start))
    return (embeds, positions, more, past, kv_start), shapes
