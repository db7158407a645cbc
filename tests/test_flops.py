"""FLOPs and KV bytes: against torch's own counter while a model runs, with and without exits, and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, MixtralConfig, Starcoder2Config

import vte_compile
from vte_compile import GateExit, Plan, StaticExit
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.flops import decode_flops, gate_flops, kv_bytes, prefill_flops

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
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
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
