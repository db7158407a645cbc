"""Decoders that are built alike are traced once per test process: tracing is most of what `optimize()` of tiny models
costs, and most tests are about what comes behind it. Tests of tracing itself are marked `traces`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from vte_compile.capture import DecoderGraph
from vte_compile.families.decoder import DecoderSpec

_SIMPLE = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> Hashable:
    """What a module is, beside its weights: its class, and all simple attributes."""
    simple = {k: v for k, v in vars(module).items() if isinstance(v, _SIMPLE)}
    own = sorted(k for k, v in vars(module).items() if callable(v))  # a forward of its own, say
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return type(module), tuple(sorted(simple.items())), tuple(own), hooks


def built_like(spec: DecoderSpec) -> Hashable:
    """Equal for decoders that are traced to the same graph."""
    names: dict[int, str] = {}  # of weights that are shared, the first
    found: list[Hashable] = []
    for root in (spec.decoder, spec.lm_head):
        for path, module in root.named_modules():
            found.append((path, _settings(module)))
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    first = names.setdefault(id(tensor), f"{path}.{name}")
                    found.append((name, first, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad))
    config = spec.config
    described = (config.to_json_string(), getattr(config, "_attn_implementation", None))
    others = (spec.path, spec.visual_token_ids, spec.position_rows, spec.deepstack, spec.has_blocks, spec.logit_softcap)
    return tuple(found), described, others, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def remembered(capture: Callable[..., DecoderGraph]) -> Callable[..., DecoderGraph]:
    """A capture that hands out copies of what it traced before, bound to the weights of the decoder at hand."""
    known: dict[Hashable, DecoderGraph] = {}

    def captured(spec: DecoderSpec, *args: Any, **kwargs: Any) -> DecoderGraph:
        if spec.freed or any(not isinstance(x, (str, bool)) for x in (*args, *kwargs.values())):
            return capture(spec, *args, **kwargs)
        key = (args, tuple(sorted(kwargs.items())), built_like(spec))
        if key not in known:
            known[key] = capture(spec, *args, **kwargs)
        return known[key].rebound(spec)

    return captured
