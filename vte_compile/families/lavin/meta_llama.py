"""LLaMA in the layout in which Meta published it: params.json and consolidated.*.pth, rotary on interleaved pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vte_compile.errors import InputError
from vte_compile.families.torch_file import read_torch_file

_WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_KEY = re.compile(rf"(?:layers\.(\d+)\.)?({'|'.join(map(re.escape, [*_WHOLE, *_PARTS]))})\.weight")
_ALONG_INPUTS = ("attention.wo", "feed_forward.w2", "tok_embeddings")
"""What is cut along its second dimension where there are several files; norms are in each, all else along the first."""


def load_meta_llama(folder: str | Path) -> LlamaForCausalLM:
    """A LLaMA of Meta's as transformers', in eval mode, with the dtype of its files.

    Args:
        folder: With params.json and consolidated.00.pth, and further files where there are several.

    Raises:
        InputError: A file is missing, or is something else; the message says which.
    """
    folder = Path(folder)
    try:
        params = json.loads((folder / "params.json").read_text())
        layers, heads, eps = int(params["n_layers"]), int(params["n_heads"]), float(params["norm_eps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'params.json'}: expected Meta's n_layers, n_heads and norm_eps: {error}"
        ) from error
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{folder}: no consolidated.00.pth: expected a LLaMA in Meta's layout")
    shards = [read_torch_file(path, "weights of LLaMA") for path in paths]
    state_dict: dict[str, Tensor] = {}
    try:
        for key in shards[0]:
            if match := _KEY.fullmatch(key):
                layer, name = match.groups()
                prefix, ours = (f"model.layers.{layer}.", _PARTS[name]) if layer else ("", _WHOLE[name])
                state_dict[f"{prefix}{ours}.weight"] = _joined(name, [shard[key] for shard in shards])
            elif key != "rope.freqs":
                raise InputError(f"{paths[0]}: {key}: nothing that a LLaMA has")
        vocabulary, size = state_dict["model.embed_tokens.weight"].shape
        head = size // heads
        kv_heads = len(state_dict["model.layers.0.self_attn.k_proj.weight"]) // head
        for name in state_dict:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state_dict[name] = _in_halves(state_dict[name], head)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size,
            intermediate_size=len(state_dict["model.layers.0.mlp.gate_proj.weight"]),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        model.load_state_dict(state_dict, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder}: its weights are not those of a LLaMA with {layers} layers: {error}") from error
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its numbers are in no file
    loaded: LlamaForCausalLM = model.eval()
    return loaded


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1 or name.endswith("norm"):
        return parts[0]
    return torch.cat(parts, dim=1 if name in _ALONG_INPUTS else 0)


def _in_halves(weight: Tensor, head: int) -> Tensor:
    """Rows of queries or keys, from pairs that rotate being neighbours to their being half a head apart."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)
