"""Where adapters go: what they read and what reads them is found by structure, or refused with the reason."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import C, captured, nodes_of, tiny
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from vte_compile import Plan
from vte_compile.capture import capture
from vte_compile.families.decoder import describe
from vte_compile.passes import PassSettings
from vte_compile.passes.adapter_sites import AdapterSite, site_before_attention, site_before_ffn
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.manager import Refusal

aten = torch.ops.aten


def annotated(graph):
    annotate_layers(graph, PassSettings(Plan()))
    return graph


def traced(model):
    return annotated(capture(describe(model), "prefill"))


def names(nodes) -> list[str]:
    """Of the weights that linear layers read."""
    return [str(node.args[1].target).removeprefix("decoder.layers.") for node in nodes]


# ---------------------------------------------------------------- found


@pytest.mark.parametrize(
    ("family", "phase", "batched"),
    [("llama", "prefill", False), ("llama", "extend", False), ("llama", "decode", True), ("gemma", "prefill", False)],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_sites(family, phase, batched, layer):
    graph = annotated(captured(phase, batched, family))
    attention, ffn = site_before_attention(graph, layer), site_before_ffn(graph, layer)
    assert isinstance(attention, AdapterSite)
    assert isinstance(ffn, AdapterSite)
    assert names(attention.readers) == [f"{layer}.self_attn.{n}_proj.weight" for n in "qkv"]
    assert names(ffn.readers) == [f"{layer}.mlp.{n}_proj.weight" for n in ("gate", "up")]
    assert attention.source is ffn.source
    assert all(reader.args[0] is attention.source for reader in attention.readers)
    weights = dict(graph.spec.decoder.named_parameters())
    for site in (attention, ffn):
        for name, linear in zip(names(site.readers), site.linears, strict=True):
            assert torch.equal(linear.weight, weights[f"layers.{name}"])
            assert linear.bias is None
    assert attention.gain is None
    weight = weights[f"layers.{layer}.post_attention_layernorm.weight"].double()
    assert torch.equal(ffn.gain, 1 + weight if family == "gemma" else weight)


def test_own_biases():
    graph = annotated(captured(family="qwen2"))
    weights = dict(graph.spec.decoder.named_parameters())
    for name, linear in zip("qkv", site_before_attention(graph, 1).linears, strict=True):
        assert torch.equal(linear.bias, weights[f"layers.1.self_attn.{name}_proj.bias"])


class FusedAttention(nn.Module):
    """q, k and v as one layer, in front of an attention whose own are identities on their parts."""

    class Part(nn.Module):
        def __init__(self, start: int, stop: int) -> None:
            super().__init__()
            self.start, self.stop = start, stop

        def forward(self, x):
            return x[..., self.start : self.stop]

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        weights = [getattr(attention, f"{n}_proj").weight.detach() for n in "qkv"]
        self.qkv = nn.Linear(C, sum(map(len, weights)), bias=False)
        self.qkv.weight = nn.Parameter(torch.cat(weights))
        self.attention, start = attention, 0
        for name, weight in zip("qkv", weights, strict=True):
            setattr(attention, f"{name}_proj", self.Part(start, start + len(weight)))
            start += len(weight)

    def forward(self, hidden_states, **kwargs):
        # The attention takes the batch and the length from its input's shape, not the width.
        return self.attention(hidden_states=self.qkv(hidden_states), **kwargs)


def test_q_k_and_v_as_one_layer():
    model = tiny(num_hidden_layers=2)
    layer = model.model.layers[1]
    layer.self_attn = FusedAttention(layer.self_attn)
    site = site_before_attention(traced(model), 1)
    assert names(site.readers) == ["1.self_attn.qkv.weight"]
    assert torch.equal(site.linears[0].weight, layer.self_attn.qkv.weight)


# ---------------------------------------------------------------- refused


@functools.cache
def refusing(name: str):
    """Traced models of two layers that are no pre-norm blocks of two RMSNorms, or whose FFN is more than that."""
    config, model, own = {
        "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
        "parallel": (StableLmConfig, StableLmForCausalLM, {"use_parallel_residual": True}),
        "layer norm": (StableLmConfig, StableLmForCausalLM, {}),
        "experts": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 2, "sliding_window": None}),
    }[name]
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return traced(model(config(**sizes, **tokens, num_key_value_heads=2, **own)).eval())


@pytest.mark.parametrize(
    ("name", "before_attention", "before_ffn"),
    [
        # Post-norm: q and k have norms of their own, and attention reads the residual stream itself.
        ("olmo2", "reads the attention's input besides q, k and v.", "reads the attention's input besides q, k and v."),
        ("parallel", "reads the attention's input besides q, k and v.", "reads the attention's input besides"),
        ("layer norm", None, "the FFN's input, is no RMSNorm of the residual stream."),
        # The router is a linear layer, but the experts are none: they read the tokens that go to them.
        ("experts", None, "reads the FFN's input besides its linear layers."),
    ],
)
def test_other_blocks(name, before_attention, before_ffn):
    graph = refusing(name).clone()
    annotate_layers(graph, PassSettings(Plan()))
    for find, reason in ((site_before_attention, before_attention), (site_before_ffn, before_ffn)):
        found = find(graph, 1)
        if reason is None:
            assert isinstance(found, AdapterSite)
        else:
            assert isinstance(found, Refusal)
            assert reason in found.reason
            assert found.layer == 1
            assert found.node in {n.name for n in graph.graph.nodes}


def insert(graph, after, target, *args, layer=1):
    """A node of a layer, behind another and of its shape."""
    with graph.graph.inserting_after(after):
        node = graph.graph.call_function(target, args)
    node.meta["val"], graph.layer_of[node] = after.meta["val"], layer
    return node


def of_layer(graph, target, layer=1):
    return [n for n in nodes_of(graph, target) if graph.layer_of[n] == layer]


def refusal(found) -> str:
    assert isinstance(found, Refusal)
    assert found.layer == 1
    return found.reason


def test_ffn_input_read_elsewhere():
    """Directly, or as a view of it that was taken before (as experts do)."""
    graph = annotated(captured())
    gate = of_layer(graph, aten.linear.default)[4]
    normed = gate.args[0]
    spy = insert(graph, normed, aten.neg.default, normed)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], spy),)
    assert refusal(site_before_ffn(graph, 1)) == f"{spy.name} reads the FFN's input besides its linear layers."
    assert isinstance(site_before_attention(graph, 1), AdapterSite)

    graph = annotated(captured())
    gate, up = of_layer(graph, aten.linear.default)[4:6]
    normed = gate.args[0]
    alias = insert(graph, normed, aten.alias.default, normed)
    for linear in (gate, up):
        linear.update_arg(0, alias)
    assert isinstance(site_before_ffn(graph, 1), AdapterSite)
    spy = insert(graph, normed, aten.neg.default, normed)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], spy),)
    assert refusal(site_before_ffn(graph, 1)) == f"{spy.name} reads the FFN's input besides its linear layers."


def test_ffn_of_flattened_tokens():
    """What reads its linear layers expects them flat, as the adapter's input is not."""
    graph = annotated(captured())
    linears = of_layer(graph, aten.linear.default)[4:6]
    normed = linears[0].args[0]
    flat = insert(graph, normed, aten.view.default, normed, [-1, C])
    flat.meta["val"] = normed.meta["val"][0]
    for linear in linears:
        linear.update_arg(0, flat)
    assert refusal(site_before_ffn(graph, 1)) == f"{flat.name}, the FFN's input, is no RMSNorm of the residual stream."


def test_ffn_of_two_inputs():
    graph = annotated(captured())
    gate = of_layer(graph, aten.linear.default)[4]
    gate.update_arg(0, insert(graph, gate.args[0], aten.neg.default, gate.args[0]))
    assert refusal(site_before_ffn(graph, 1)) == "2 inputs of linear layers behind the attention, expected 1."


def test_q_k_and_v_of_two_inputs():
    graph = annotated(captured())
    q = of_layer(graph, aten.linear.default)[0]
    q.update_arg(0, insert(graph, q.args[0], aten.neg.default, q.args[0]))
    reason = "q, k and v are computed by linear layers of 2 inputs, expected 1 (quantized weights?)."
    for find in (site_before_attention, site_before_ffn):
        assert refusal(find(graph, 1)) == reason


def test_norm_that_is_none():
    """Another factor between the norm and the FFN, or a norm of something besides the stream."""
    graph = annotated(captured())
    gate, up = of_layer(graph, aten.linear.default)[4:6]
    normed = gate.args[0]
    scaled = insert(graph, normed, aten.mul.Tensor, normed, 1.01)
    for linear in (gate, up):
        linear.update_arg(0, scaled)
    want = f"{scaled.name}, the FFN's input, is no RMSNorm of the residual stream."
    assert refusal(site_before_ffn(graph, 1)) == want
    scaled.update_arg(1, 1.0)
    assert isinstance(site_before_ffn(graph, 1), AdapterSite)
    scaled.update_arg(1, graph.streams[0])
    assert refusal(site_before_ffn(graph, 1)) == want


def test_tokens_without_a_batch():
    """The adapter's means are over the second dim."""
    graph = annotated(captured())
    linears = of_layer(graph, aten.linear.default)[:3]
    source = linears[0].args[0]
    flat = insert(graph, source, aten.select.int, source, 0, 0)
    flat.meta["val"] = source.meta["val"][0]
    for linear in linears:
        linear.update_arg(0, flat)
    for find in (site_before_attention, site_before_ffn):
        assert refusal(find(graph, 1)) == f"q, k and v read {flat.name}, which is not [B, T, C]."


def test_layer_without_attention():
    graph = annotated(captured())
    (attention,) = of_layer(graph, aten.scaled_dot_product_attention.default)
    attention.replace_all_uses_with(attention.args[0])
    graph.graph.erase_node(attention)
    for find in (site_before_attention, site_before_ffn):
        assert refusal(find(graph, 1)) == "0 attentions in this layer, expected 1."


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_other_kinds_are_not_folded(dtype):
    """Codes say nothing about the weight until they are scaled."""
    graph = annotated(captured())
    name = "decoder.layers.1.self_attn.k_proj.weight"
    graph.parameters[name] = lambda: torch.zeros(16, C).to(dtype)
    assert site_before_attention(graph, 1).linears is None
    assert site_before_attention(graph, 0).linears is not None
