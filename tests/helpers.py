"""Tiny random models and graphs of them, shared by the tests of capture, passes and kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import GEMMA2
from torch import Tensor, fx
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vte_compile.capture import DecoderGraph, capture, capture_chunk
from vte_compile.families.decoder import describe
from vte_compile.oracle import RowCache
from vte_compile.plan import GateExit, Plan
from vte_compile.runtime.steps import Phase

torch.set_num_threads(1)  # matrices this small run many times faster on one thread when the machine's cores are busy

C, LAYERS, VOCAB, HEAD_SIZE = 32, 3, 61, 8
NEVER, ALWAYS = 1e9, -1e9
"""Thresholds that no gate, and that every gate reaches."""

_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": HEAD_SIZE, "num_key_value_heads": 1}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA2),
}


def tiny(family: str = "llama", **options: Any) -> Any:
    """A random causal language model in eval mode; the same for the same arguments."""
    config, model, own = _FAMILIES[family]
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=C,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # large enough for attention to matter
        pad_token_id=None,
    )
    torch.manual_seed(0)
    built = model(config(**(settings | own | options))).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide that they are used
                parameter += 0.3 * torch.randn_like(parameter)
    return built


_tiny_once = functools.cache(tiny)


def shared(family: str = "llama", **options: Any) -> Any:
    """The same model object for all tests that do not change it."""
    return _tiny_once(family, **options)


@functools.cache
def _captured(phase: Phase, batched: bool, family: str, **options: Any) -> DecoderGraph:
    spec = describe(shared(family, **options))
    return capture_chunk(spec) if phase == "chunk" else capture(spec, phase, batched=batched)


def captured(phase: Phase = "prefill", batched: bool = False, family: str = "llama", **options: Any) -> DecoderGraph:
    """A graph to rewrite, of ``shared(family, **options)``; traced once per session."""
    return _captured(phase, batched, family, **options).clone()


def run_graph(graph: DecoderGraph, *inputs: Tensor) -> list[Tensor]:
    """The whole graph as it stands, uncompiled; parameters come from its own attributes."""
    graph.module.recompile()
    with torch.no_grad():
        return list(graph.module(*inputs))


def embeddings(tokens: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, T, C]."""
    return torch.randn(batch, tokens, C, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positions(tokens: int, start: int = 0) -> Tensor:
    """[1, T]."""
    return torch.arange(start, start + tokens)[None]


def chunk_inputs(lengths: Sequence[int], past: Sequence[int], columns: int = 9, seed: int = 0) -> list[Tensor]:
    """What a graph of the phase "chunk" takes: rows of so many tokens, behind caches of which so much is filled."""
    tokens, batch = max(lengths), len(lengths)
    counted = torch.tensor(past)[:, None] + torch.arange(tokens)
    kv = random_kv([columns + layer for layer in range(LAYERS)], batch, seed=seed + 7)
    return [embeddings(tokens, batch, seed), counted, torch.tensor(lengths), torch.tensor(past), *kv]


def layout(cells: str) -> Tensor:
    """A visual mask [1, T] from a string of t (text) and v (visual)."""
    return torch.tensor([[cell == "v" for cell in cells]])


def random_kv(lengths: Sequence[int], batch: int = 1, heads: int = 2, seed: int = 7) -> list[Tensor]:
    """key_0, value_0, key_1 ... [B, heads, the layer's length, head size]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, HEAD_SIZE) for length in lengths for _ in range(2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def row_cache(kv: Sequence[Tensor], next_position: int) -> RowCache:
    """The oracle's cache of one row."""
    return RowCache(tuple(zip(kv[::2], kv[1::2], strict=True)), next_position)


def gate(layer: int, threshold: float = 0.0, seed: int = 0) -> GateExit:
    """A random gate of width 5."""
    generator = torch.Generator().manual_seed(100 * seed + layer)
    w1 = torch.randn(5, 2 * C, generator=generator) * 0.2
    return GateExit(layer, w1, torch.randn(2, 5, generator=generator), threshold)


def plan(*exits: Any) -> Plan:
    return Plan(exits=exits)


def nodes_of(graph: DecoderGraph | fx.Graph, *targets: Any) -> list[fx.Node]:
    """Nodes that call one of the targets, in order."""
    nodes = graph.nodes if isinstance(graph, fx.Graph) else graph.graph.nodes
    return [node for node in nodes if node.op == "call_function" and node.target in targets]


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
