"""A tiny decoder with InternLM2-type blocks: its names, and q, k and v as one packed linear layer (wqkv).

The weights of a Llama's blocks in InternLM2's layout: per key/value head its queries, its key and its value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward


class InternAttention(nn.Module):
    """Grouped-query attention with a packed wqkv."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = llama.config, llama.layer_idx, True
        self.head_dim, self.scaling = llama.head_dim, llama.scaling
        self.num_key_value_groups, self.attention_dropout = llama.num_key_value_groups, 0.0
        groups = [p.weight.detach().unflatten(0, (-1, n, self.head_dim)) for p, n in self._packed(llama)]
        packed = torch.cat(groups, 1).flatten(0, 2)
        self.wqkv = nn.Linear(packed.shape[1], packed.shape[0], bias=False)
        self.wqkv.weight = nn.Parameter(packed)
        self.wo = llama.o_proj

    @staticmethod
    def _packed(llama: nn.Module) -> list[tuple[nn.Linear, int]]:
        return [(llama.q_proj, llama.num_key_value_groups), (llama.k_proj, 1), (llama.v_proj, 1)]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: object = None,
        past_key_values: object = None,  # its name before transformers 5.24
        **kwargs: object,
    ) -> tuple[Tensor, object]:
        batch, tokens = hidden_states.shape[:2]
        qkv = self.wqkv(hidden_states).view(batch, tokens, -1, self.num_key_value_groups + 2, self.head_dim)
        query = qkv[..., : self.num_key_value_groups, :].flatten(2, 3).transpose(1, 2)
        key, value = (qkv[..., i, :].transpose(1, 2) for i in (-2, -1))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.wo(output.reshape(batch, tokens, -1).contiguous()), weights


class InternFeedForward(nn.Module):
    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = llama.gate_proj, llama.up_proj, llama.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class InternBlock(nn.Module):
    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.attention = InternAttention(llama.self_attn)
        self.feed_forward = InternFeedForward(llama.mlp)
        self.attention_norm, self.ffn_norm = llama.input_layernorm, llama.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        hidden_states = hidden_states + self.attention(hidden_states=self.attention_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


def with_intern_blocks(model: nn.Module) -> nn.Module:
    """A Llama, with its blocks as InternLM2 has them; in place."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = InternBlock(layer)
    return model
