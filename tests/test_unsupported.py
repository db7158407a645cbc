"""Architectures in which no visual token could leave soundly: optimize() and the oracle refuse them, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.errors import CaptureError, UnsupportedModelError

FULL = ["full_attention"] * 4


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def _bart() -> Any:
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    return BartForConditionalGeneration(
        BartConfig(vocab_size=61, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **sizes)
    )


def _mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=2))


def _jamba() -> Any:
    """Layers with attention and with a state in turn."""
    layers = dict(attn_layer_period=2, attn_layer_offset=0, expert_layer_period=2, num_experts=1, num_experts_per_tok=1)
    return JambaForCausalLM(JambaConfig(**TINY, **layers, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False))


def _lfm2() -> Any:
    return Lfm2ForCausalLM(Lfm2Config(**TINY, layer_types=["full_attention", "conv", "full_attention", "conv"]))


def _mllama() -> Any:
    text = dict(TINY, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=8,
        patch_size=4,
        vision_output_dim=32,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]],
        max_num_tiles=1,
    )
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))


def _gpt_oss() -> Any:
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    return GptOssForCausalLM(GptOssConfig(**TINY, **experts, head_dim=8, layer_types=FULL))


def _deepseek_v3() -> Any:
    sizes = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(TINY | sizes | experts | {"num_key_value_heads": 4})))


REFUSED = {
    "t5": (_t5, r"^T5ForConditionalGeneration is an encoder-decoder: .* cross-attention, and no visual token"),
    "bart": (_bart, r"^BartForConditionalGeneration is an encoder-decoder"),
    "mamba": (_mamba, r"^MambaForCausalLM: decoder layer 0 \(MambaBlock\) is a state-space layer: its state sums up"),
    "jamba": (_jamba, r"^JambaForCausalLM: decoder layer 1 \(JambaMambaDecoderLayer\) is a state-space layer"),
    "lfm2": (_lfm2, r"^Lfm2ForCausalLM: decoder layer 1 is of type conv: only layers that attend"),
    "mllama": (_mllama, r"decoder layer 1 \(MllamaCrossAttentionDecoderLayer\) has cross_attn: .* beside the sequence"),
    "gpt_oss": (_gpt_oss, r"^GptOssForCausalLM: decoder layer 0 \(GptOssDecoderLayer\) has attention sinks"),
}


@pytest.mark.shows("refused")
@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name, record_property):
    build, reason = REFUSED[name]
    torch.manual_seed(0)
    model = build().eval()
    for use in (Oracle, lambda model, plan: optimize(model, plan, compile=False)):
        with pytest.raises(UnsupportedModelError, match=reason) as refusal:
            use(model, Plan([StaticExit(0)]))
    record_property("refused", [name, str(refusal.value)])


def test_keys_and_values_of_other_sizes():
    """Multi-head latent attention: graphs that take a cache would not fit what prefill gives."""
    model = _deepseek_v3().eval()
    with pytest.raises(CaptureError, match=r"layer 0 of DeepseekV3Model caches keys of .* heads of 16, .* latent"):
        optimize(model, Plan(), compile=False)
