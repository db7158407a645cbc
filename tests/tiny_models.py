"""What the tests of the oracle and of optimize() share: tiny random models, prompts as strings, gates, golden data.

Layouts of prompts are strings: t text, v visual, . padding. (tests/helpers.py has the same for captured graphs.)
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vte_compile import optimize
from vte_compile.adapters import PIA, PlainAdapter, Projection, Router, StaticRouter
from vte_compile.plan import GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit

AdapterT = TypeVar("AdapterT", PIA, PlainAdapter)

DATA = Path(__file__).parent / "data"
CASES = ["exit_layer0", "exit_layer2", "exit_layer5_last", "never", "natural_seed100", "natural_seed101"]
C, LAYERS, VOCAB, IMAGE = 32, 4, 61, 60
IMAGE_TOKENS = 4
TINY = dict(
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
GEMMA2 = dict(
    attn_implementation="eager",  # which transformers 5.17 does not take by itself
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=3,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0,
)
"""Every other layer has a window; caps are low enough to matter."""
NEVER = 1e9  # a threshold no gate reaches


# ---------------------------------------------------------------- true float64


class Norm64(nn.Module):
    """RMSNorm without Hugging Face's detour through float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Rotary64(nn.Module):
    """Default rotary embedding in float64."""

    def __init__(self, theta: float, dim: int) -> None:
        super().__init__()
        self.inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x, position_ids):
        angles = (position_ids[..., None].double() * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def to_float64(model):
    """A copy of a Llama that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    for layer in model.model.layers:
        layer.input_layernorm = Norm64(layer.input_layernorm)
        layer.post_attention_layernorm = Norm64(layer.post_attention_layernorm)
    model.model.norm = Norm64(model.model.norm)
    config = model.config
    model.model.rotary_emb = Rotary64(
        config.rope_parameters["rope_theta"], config.hidden_size // config.num_attention_heads
    )
    return model


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small run many times faster on one thread when the machine's cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str = "llama", **options):
    """A random language model of four layers, the same at every call."""
    torch.manual_seed(0)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }[name]
    if name == "gemma":
        options.setdefault("head_dim", 8)
    if name == "gemma2":
        options = GEMMA2 | options
    if name == "mistral":
        options.setdefault("sliding_window", None)
    return cls(config(**{**TINY, **options})).eval()


def tiny_llava(layers: int = TINY["num_hidden_layers"], **options):
    """A random LLaVA: images of 8 x 8 pixels give four visual tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    options = {"image_token_id": IMAGE, **options}
    text = LlamaConfig(**TINY | {"num_hidden_layers": layers})
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1, **options)
    return LlavaForConditionalGeneration(config).eval()


@functools.cache
def shared_model(name: str):
    """A model that tests must not change; "llava" or a name of `tiny`. It never stops at an end token."""
    model = tiny_llava() if name == "llava" else tiny(name)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def _shared_optimized(name: str):
    return optimize(shared_model(name), Plan(), compile=False)


def optimized(name: str, *exits):
    """`shared_model(name)` with these exits, uncompiled; what is traced is shared by the whole test run."""
    return optimize(_shared_optimized(name), Plan(exits))


# ---------------------------------------------------------------- prompts and plans


def chunk(*layouts: str, seed: int = 0):
    """inputs_embeds, visual_mask, attention_mask of rows written as strings of t, v and padding."""
    assert len({len(layout) for layout in layouts}) == 1
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(len(layouts), len(layouts[0]), C, generator=generator)
    visual = torch.tensor([[c == "v" for c in layout] for layout in layouts])
    real = torch.tensor([[c != "." for c in layout] for layout in layouts])
    return embeds, visual, real


def image_prompt(*layouts: str, seed: int = 0):
    """input_ids, pixel_values (None without images), attention_mask of a LLaVA; i is a whole image of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    layouts = tuple(layout.replace("i", "v" * IMAGE_TOKENS) for layout in layouts)
    assert len({len(layout) for layout in layouts}) == 1
    ids = torch.randint(3, IMAGE, (len(layouts), len(layouts[0])), generator=generator)
    visual = torch.tensor([[c == "v" for c in layout] for layout in layouts])
    real = torch.tensor([[c != "." for c in layout] for layout in layouts])
    ids = ids.masked_fill(visual, IMAGE).masked_fill(~real, 0)
    count = int(visual.sum()) // IMAGE_TOKENS
    pixels = torch.randn(count, 3, 8, 8, generator=generator) if count else None
    return ids, pixels, real.long()


def gate(layer: int, threshold: float = 0.0, seed: int = 0) -> GateExit:
    """A random gate, for hidden size `C`."""
    generator = torch.Generator().manual_seed(100 * seed + layer)
    w1 = torch.randn(16, 2 * C, generator=generator) * 0.2
    return GateExit(layer, w1, torch.randn(2, 16, generator=generator), threshold)


def random_adapter(
    kind: type[AdapterT],
    seed: int = 0,
    hidden_size: int = C,
    width: int = 6,
    dtype: torch.dtype = torch.float32,
    router: Router | StaticRouter | None = None,
) -> AdapterT:
    """A random PIA or plain adapter, for hidden size `C`; with a router per prompt unless one is given."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def projection(out: int, in_: int) -> Projection:
        return Projection(random(out, in_) * 0.4, random(out) * 0.4)

    downs = [projection(width, hidden_size) for _ in range(2 if kind is PIA else 1)]
    ups = [projection(hidden_size, width // 2) for _ in range(2)]
    # A low temperature: the experts weigh differently from prompt to prompt.
    return kind(*downs, *ups, router or Router(random(2, hidden_size), random(2), 2.0), scale=0.7)


def plan(*parts: GateExit | StaticExit | SkippedAttention | KeptAdapter) -> Plan:
    return Plan(
        exits=[part for part in parts if isinstance(part, GateExit | StaticExit)],
        skips=[part for part in parts if isinstance(part, SkippedAttention)],
        adapters=[part for part in parts if isinstance(part, KeptAdapter)],
    )


def assert_close(actual, expected, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_relative(actual, expected, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest expected magnitude."""
    assert actual.shape == expected.shape
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * scale, f"off by {error:.2e} at a scale of {scale:.2e}, allowed {tolerance:.0e} of it"


# ---------------------------------------------------------------- golden data


@functools.cache
def load_golden():
    """Models by dtype, w1 of the gates, and where the image is, of the golden DyVTE data."""
    data = np.load(DATA / "dyvte_weights.npz")
    cfg = {key[4:]: data[key].item() for key in data.files if key.startswith("cfg.")}
    theta = cfg.pop("rope_theta")
    cfg = {key: value for key, value in cfg.items() if not key.startswith("image_")}
    model = LlamaForCausalLM(
        LlamaConfig(**cfg, rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=2048)
    )
    weights = {k: torch.from_numpy(data[k]).float() for k in data.files if k.endswith("weight") and "router" not in k}
    model.load_state_dict(weights)
    scale = data["router_w1_scale"].item()
    w1 = [torch.from_numpy(data[f"model.visual_gates_router.{i}.w1.weight.q8"]).double() * scale for i in range(6)]
    image = slice(int(data["cfg.image_start"]), int(data["cfg.image_start"] + data["cfg.image_len"]))
    model.eval()
    return {torch.float32: model, torch.float64: to_float64(model)}, w1, image
