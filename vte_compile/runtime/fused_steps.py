"""Attentions of fused graphs, in place: on GPUs the Triton kernels, on CPUs their naive references (for tests)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vte_compile.kernels.decode_attention import decode_attention
from vte_compile.kernels.varlen_attention import varlen_attention
from vte_compile.runtime.growing import with_room
from vte_compile.runtime.steps import AttendStep, PackedAttendStep
from vte_compile.runtime.visual_tokens import PackedRows


class RotaryAppendStep(AttendStep):
    """What ``vte::rotary_append_attention`` says, on keys and values with a free column, the last one mostly."""

    takes_ends = True

    def run(self, arguments: list[Tensor], ends: Tensor | None = None) -> Sequence[Tensor]:
        """Its outputs; ``ends``: [B] int32, behind the column to write; None: it is the last."""
        query, key, value, cos, sin, keys, values, *starts = arguments
        output = decode_attention(
            query[:, 0],
            keys,
            values,
            starts[0] if starts else None,
            ends,
            None,
            keys.shape[2],
            query.shape[3] ** -0.5 if self.scale is None else self.scale,
            self.window,
            self.softcap,
            key[:, 0],
            value[:, 0],
            cos[:, 0],
            sin[:, 0],
        )
        return output[:, None], keys, values


class RotaryPackedStep(PackedAttendStep):
    """What ``vte::rotary_packed_attention`` says, into a new cache. The host waits for nothing."""

    def run(self, arguments: list[Tensor], rows: PackedRows) -> Sequence[Tensor]:
        """Its outputs."""
        query, key, value, cos, sin, cu_queries, cu_keys = arguments
        longest = max(rows.lengths)
        equal = min(rows.lengths) == longest
        shape = (len(rows.lengths), key.shape[2], with_room(longest), key.shape[3])
        with torch.inference_mode(False):  # so that it can be written in and outside of inference mode
            # What is before a row is never attended to, but multiplied by 0, which NaN survives.
            keys, values = (x.new_empty(shape) if equal else x.new_zeros(shape) for x in (key, value))
        output = varlen_attention(
            query[0],
            key[0],
            value[0],
            cos[0],
            sin[0],
            cu_keys,
            None,
            longest - cu_keys.diff(),
            keys,
            values,
            longest,
            query.shape[3] ** -0.5 if self.scale is None else self.scale,
            self.window,
            self.softcap,
            None if query.shape[1] == key.shape[1] else cu_queries,
        )
        return output[None].transpose(1, 2), keys, values
