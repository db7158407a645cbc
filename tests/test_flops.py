"""FLOPs and bytes: against torch's own counter while a model runs, with and without exits and skips, and by hand."""

import copy

import pytest
import torch
from tiny_models import random_adapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MixtralConfig,
    Qwen2Config,
    Starcoder2Config,
)

import vte_compile
from vte_compile import GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter, apply_pia, apply_plain, route
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.flops import decode_flops, gate_flops, kv_bytes, prefill_flops, weight_bytes

LAYERS, C, HEADS, KV_HEADS, D, VOCAB = 4, 32, 4, 2, 12, 50  # heads that do not fill the hidden size, grouped queries
SEQ, VISUAL = 23, 13
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=C,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=D,
    attn_implementation="eager",
)
PAIR = 4 * HEADS * D


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def traced(model):
    """Plans for this one share its traces."""
    return vte_compile.optimize(model, Plan(), compile=False)


def prompt():
    mask = torch.zeros(1, SEQ, dtype=torch.bool)
    mask[:, 4 : 4 + VISUAL] = True
    return {"inputs_embeds": torch.randn(1, SEQ, C), "visual_mask": mask, "logits_to_keep": 1}


def counted(run):
    """FLOPs that torch counted: of linear layers (mm), and of everything in batches (attention and rotations)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    counts = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    batched = counts.pop("aten.bmm", 0)
    attention = sum(counts.pop(op) for op in list(counts) if "attention" in op)
    return sum(counts.values()), batched + attention


def lengths(exit_layer):
    before = LAYERS if exit_layer < 0 else exit_layer + 1
    return [SEQ] * before + [SEQ - VISUAL] * (LAYERS - before)


def test_prefill_of_the_model_itself(model):
    inputs = {**prompt()}
    del inputs["visual_mask"]
    linear, batched = counted(lambda: model(**inputs))
    causal = LAYERS * SEQ * (SEQ + 1) // 2 * PAIR
    assert prefill_flops(CONFIG, SEQ, VISUAL, -1) - causal == linear
    # torch counts all pairs, masked or not, and perhaps the rotary angles, a product of D/2 frequencies and positions.
    assert batched - LAYERS * SEQ**2 * PAIR in (0, SEQ * D)


@pytest.mark.parametrize("window", [1, 5, 10, 12, 40])
def test_sliding_windows(window):
    """Above an exit they count what is left; keys outside of them are kept all the same."""
    types = ["sliding_attention", "full_attention"] * 2
    config = Qwen2Config(
        **CONFIG.to_dict() | {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
    )
    fewer_in_prefill = fewer_in_decode = 0
    for n, kind in zip(lengths(1), types, strict=True):
        seen = [min(token + 1, window) if kind == "sliding_attention" else token + 1 for token in range(n + 3)]
        fewer_in_prefill += sum(range(1, n + 1)) - sum(seen[:n])
        fewer_in_decode += sum(range(n + 1, n + 4)) - sum(seen[n:])
    sizes = SEQ, VISUAL, 1
    assert prefill_flops(config, *sizes) == prefill_flops(CONFIG, *sizes) - fewer_in_prefill * PAIR
    assert decode_flops(config, *sizes, 3) == decode_flops(CONFIG, *sizes, 3) - fewer_in_decode * PAIR
    assert kv_bytes(config, *sizes, torch.float32) == kv_bytes(CONFIG, *sizes, torch.float32)


@pytest.mark.parametrize("exit_layer", [-1, 0, 2, 3])
def test_prefill_and_decode_with_exits(traced, exit_layer):
    fast = vte_compile.optimize(traced, Plan() if exit_layer < 0 else Plan([StaticExit(exit_layer)]))
    inputs = prompt()
    fast(**inputs)  # traces
    linear, _ = counted(lambda: fast(**inputs))
    causal = sum(n * (n + 1) // 2 for n in lengths(exit_layer)) * PAIR
    # optimize() spares all tokens but the last the last layer's output projection and FFN; the formula counts layers
    # as wholes, so that it says what exits save and nothing else.
    spared = 0
    if exit_layer != LAYERS - 1:
        output = CONFIG.num_attention_heads * CONFIG.head_dim
        spared = 2 * (lengths(exit_layer)[-1] - 1) * CONFIG.hidden_size * (output + 3 * CONFIG.intermediate_size)
    assert prefill_flops(CONFIG, SEQ, VISUAL, exit_layer) - causal == linear + spared

    cache = fast(**inputs).past_key_values
    steps = 3

    def decode(cache):
        for _ in range(steps):
            fast(input_ids=torch.tensor([[1]]), past_key_values=cache)

    decode(fast(**inputs).past_key_values)  # traces
    linear, _ = counted(lambda: decode(cache))
    pairs = sum(n + step for n in lengths(exit_layer) for step in (1, 2, 3))
    assert decode_flops(CONFIG, SEQ, VISUAL, exit_layer, tokens=steps) - pairs * PAIR == linear


@pytest.mark.parametrize("exit_layer", [-1, 1])
def test_kv_bytes_are_those_of_the_cache(traced, exit_layer):
    fast = vte_compile.optimize(traced, Plan([StaticExit(1)] if exit_layer == 1 else []))
    cache = fast(**prompt()).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_bytes(CONFIG, SEQ, VISUAL, exit_layer, torch.float32) == held
    assert kv_bytes(CONFIG, SEQ, VISUAL, exit_layer, torch.bfloat16) == held // 2


def test_gates_up_to_the_exit_are_counted():
    width = 6
    exits = [GateExit(k, torch.zeros(width, 2 * C), torch.zeros(2, width)) for k in (0, 2)]
    plan = Plan([*exits, StaticExit(3)])
    one = 2 * width * 2 * C + 2 * 2 * width
    assert [gate_flops(plan, k) for k in (0, 2, 3, -1)] == [one, 2 * one, 2 * one, 2 * one]
    assert prefill_flops(CONFIG, SEQ, VISUAL, 2, plan) - prefill_flops(CONFIG, SEQ, VISUAL, 2) == 2 * one
    # No gate is asked in a prompt without visual tokens.
    assert prefill_flops(CONFIG, SEQ, 0, -1, plan) == prefill_flops(CONFIG, SEQ, 0, -1)


class WithoutAttention(nn.Module):
    """A decoder block whose attention is gone."""

    def __init__(self, layer):
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states, **_):
        return hidden_states + self.mlp(self.norm(hidden_states))


SKIPS = Plan(skips=[SkippedAttention(1), SkippedAttention(3)])


@pytest.fixture(scope="module")
def skipping(model):
    """The model without the attentions that SKIPS skips, all weights of them included."""
    model = copy.deepcopy(model)
    for skip in SKIPS.skips:
        model.model.layers[skip.layer] = WithoutAttention(model.model.layers[skip.layer])
    return model


def matrix_bytes(model):
    """Of all matrices but the token embedding."""
    return sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name)


def test_skipped_attentions_cost_nothing(skipping):
    inputs = {**prompt()}
    del inputs["visual_mask"]
    linear, batched = counted(lambda: skipping(**inputs))
    kept = LAYERS - len(SKIPS.skips)
    assert prefill_flops(CONFIG, SEQ, VISUAL, -1, SKIPS) - kept * SEQ * (SEQ + 1) // 2 * PAIR == linear
    assert batched - kept * SEQ**2 * PAIR in (0, SEQ * D)

    cache = skipping(**inputs).past_key_values
    linear, batched = counted(lambda: skipping(input_ids=torch.tensor([[1]]), past_key_values=cache))
    decode = decode_flops(CONFIG, SEQ, VISUAL, -1, plan=SKIPS)
    assert decode - kept * (SEQ + 1) * PAIR == linear
    assert batched - kept * (SEQ + 1) * PAIR in (0, D)


@pytest.mark.parametrize("exit_layer", [-1, 1, 2])
def test_skips_and_an_exit(exit_layer):
    """By hand: what a skip saves is an attention's, of the tokens that its layer sees."""
    attention = 2 * 2 * C * (HEADS + KV_HEADS) * D
    seen = [lengths(exit_layer)[skip.layer] for skip in SKIPS.skips]
    saved = prefill_flops(CONFIG, SEQ, VISUAL, exit_layer) - prefill_flops(CONFIG, SEQ, VISUAL, exit_layer, SKIPS)
    assert saved == sum(n * attention + n * (n + 1) // 2 * PAIR for n in seen)
    where = (CONFIG, SEQ, VISUAL, exit_layer)
    saved = decode_flops(*where, tokens=2) - decode_flops(*where, tokens=2, plan=SKIPS)
    assert saved == sum(2 * attention + (n + 1 + n + 2) * PAIR for n in seen)


@pytest.mark.parametrize("exit_layer", [-1, 1])
def test_kv_bytes_of_a_plan_that_skips(traced, exit_layer):
    exits = [StaticExit(1)] if exit_layer == 1 else []
    fast = vte_compile.optimize(traced, Plan(exits, skips=SKIPS.skips))
    layers = [layer for layer in fast(**prompt()).past_key_values.layers if layer.is_initialized]
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert kv_bytes(CONFIG, SEQ, VISUAL, exit_layer, torch.float32, SKIPS) == held


def test_weight_bytes(model, skipping):
    assert weight_bytes(CONFIG, None, torch.float32) == matrix_bytes(model)
    assert weight_bytes(CONFIG, SKIPS, torch.float32) == matrix_bytes(skipping)
    assert weight_bytes(CONFIG, SKIPS, torch.bfloat16) == matrix_bytes(skipping) // 2


WIDTH = 6
PIA_BIASES = 2 * 2 * CONFIG.intermediate_size * WIDTH  # of gate and up, for one expert


@pytest.mark.parametrize(
    ("kind", "router", "folded"),
    [
        (PIA, None, 2 * PIA_BIASES),
        (PIA, StaticRouter((0.25, 0.75)), PIA_BIASES),
        (PlainAdapter, None, 0),
        (PlainAdapter, StaticRouter((0.25, 0.75)), 0),
    ],
)
def test_adapters(kind, router, folded):
    """Unfolded, against torch's counter; folded, nothing per token is left."""
    adapter = random_adapter(kind, hidden_size=C, width=WIDTH, router=router)
    if kind is PIA:
        without, plan = Plan(skips=[SkippedAttention(2)]), Plan(skips=[SkippedAttention(2, adapter)])
    else:
        without, plan = Plan(), Plan(adapters=[KeptAdapter(2, adapter)])
    x, mean = torch.randn(1, SEQ, C), torch.randn(1, C)
    w, p = route(adapter.router, x), torch.randn(1, WIDTH)

    def apply(x):
        return sum(counted(lambda: apply_pia(adapter, x, w, p) if kind is PIA else apply_plain(adapter, x, w)))

    once = sum(counted(lambda: route(adapter.router, mean[None])))
    if kind is PIA:
        once += sum(counted(lambda: mean @ adapter.pool.weight.mT))
    where = (CONFIG, SEQ, VISUAL, -1)
    base = prefill_flops(*where, without)
    assert prefill_flops(*where, plan, fold=False) - base == apply(x) + once
    assert prefill_flops(*where, plan) - base == folded + once
    decode = decode_flops(*where, tokens=3, plan=without)
    assert decode_flops(*where, tokens=3, plan=plan, fold=False) - decode == 3 * apply(x[:, :1])
    assert decode_flops(*where, tokens=3, plan=plan) == decode
    # An exit below the adapter takes tokens from it.
    left = prefill_flops(CONFIG, SEQ, VISUAL, 1, plan, fold=False) - prefill_flops(CONFIG, SEQ, VISUAL, 1, without)
    assert left == apply(x[:, VISUAL:]) + once
    assert kv_bytes(*where, torch.float32, plan) == kv_bytes(*where, torch.float32, without)

    read = sum(projection.weight.nbytes for name, projection in adapter.projections().items() if name != "pool")
    weights = weight_bytes(CONFIG, without, torch.float32)
    assert weight_bytes(CONFIG, plan, torch.float32, fold=False) - weights == read
    assert weight_bytes(CONFIG, plan, torch.float32) == weights


def test_a_plan_for_more_layers():
    plan = Plan(skips=[SkippedAttention(LAYERS)])
    with pytest.raises(InputError, match="layer 4, but the decoder only 4"):
        prefill_flops(CONFIG, 10, 5, -1, plan)


def test_config_of_an_mllm_means_its_decoder():
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(vision_config=vision, text_config=CONFIG)
    assert prefill_flops(config, SEQ, VISUAL, 1) == prefill_flops(CONFIG, SEQ, VISUAL, 1)


@pytest.mark.parametrize(
    ("seq", "visual", "exit_layer", "message"),
    [
        (10, 11, -1, "visual=11"),
        (10, -1, -1, "visual=-1"),
        (0, 0, -1, "seq=0"),
        (10, 5, LAYERS, "0..3"),
        (10, 5, -2, "exit_layer=-2"),
    ],
)
def test_contradicting_numbers(seq, visual, exit_layer, message):
    with pytest.raises(InputError, match=message):
        prefill_flops(CONFIG, seq, visual, exit_layer)


@pytest.mark.parametrize(("config", "message"), [(MixtralConfig(), "experts"), (Starcoder2Config(), "gated")])
def test_decoders_of_another_form_are_refused(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        prefill_flops(config, 10, 5, -1)
