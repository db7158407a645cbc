"""The part of a model that becomes one graph."""

from __future__ import annotations

from torch import Tensor, nn

from vte_compile.capture.attention import DecodeLayer, DecodeStep, TraceLayer, decode_step, prompt_blocks, trace_cache
from vte_compile.families.cache_name import cache_name
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.deepstack import adding, given
from vte_compile.families.logits import capped
from vte_compile.module_tree import with_stand_ins
from vte_compile.runtime.steps import Phase


def decoder_module(spec: DecoderSpec) -> nn.Module:
    """The decoder, with stand-ins for weights that were freed."""
    if not spec.freed:
        return spec.decoder
    return with_stand_ins(spec.decoder, spec.freed, spec.lm_head.get_parameter("weight"))


class DecoderWithHead(nn.Module):
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
        cache = trace_cache(past, DecodeLayer if decode else TraceLayer)
        token = decode_step.set(DecodeStep(cache.layers, kv_start) if decode else None)
        blocks = prompt_blocks.set(token_inputs[-1] if self.has_blocks and token_inputs else None)
        try:
            with given(token_inputs):
                hidden = self.decoder(
                    inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=True, **{self.cache_name: cache}
                ).last_hidden_state
        finally:
            decode_step.reset(token)
            prompt_blocks.reset(blocks)
        logits = capped(self.lm_head(hidden), self.logit_softcap)
        return logits, *[t for layer in cache.layers for t in (layer.keys, layer.values)]
