"""Graph passes, one file each, and the pass manager; installed as `vte_compile.passes`.

``PASSES``, for decoders, and ``CO_ATTENTION_PASSES``, for co-attention layers, are the one place that says which passes
run, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.attention_layout import attention_layout
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.companion_token import companion_token
from vte_compile.passes.fold_adapters import fold_adapters
from vte_compile.passes.fold_co_adapters import fold_co_adapters
from vte_compile.passes.fuse_attention import fuse_attention
from vte_compile.passes.fuse_rotary import fuse_rotary
from vte_compile.passes.insert_exits import insert_exits
from vte_compile.passes.last_layer_queries import last_layer_queries
from vte_compile.passes.last_token_logits import last_token_logits
from vte_compile.passes.manager import Pass, PassResult, PassSettings, Refusal, run_passes
from vte_compile.passes.pack_rows import pack_rows
from vte_compile.passes.plain_causal import plain_causal
from vte_compile.passes.skip_attention import skip_attention
from vte_compile.passes.skip_co_attention import skip_co_attention

if TYPE_CHECKING:
    from vte_compile.capture.co_attention import CoAttentionGraph
    from vte_compile.plan.co_attention import CoAttention

PASSES: tuple[Pass, ...] = (
    annotate_layers,
    fold_adapters,  # before skip_attention: a PIA reads what the attention that goes would read
    skip_attention,
    plain_causal,  # before insert_exits, so that a mask it drops need not be cut at every exit
    pack_rows,  # behind plain_causal: a packed attention masks by itself
    insert_exits,
    last_layer_queries,
    last_token_logits,
    companion_token,  # behind last_layer_queries, which expects one attention in a layer
    fuse_rotary,
    fuse_attention,  # behind last_layer_queries, which looks for torch's own attentions
    attention_layout,  # behind fuse_rotary, which looks for rotated heads
    cleanup,
)

CO_ATTENTION_PASSES: tuple[Callable[[CoAttentionGraph, CoAttention], PassResult], ...] = (
    fold_co_adapters,  # before skip_co_attention: both tell self from cross attention by there being two
    skip_co_attention,
)

__all__ = ["CO_ATTENTION_PASSES", "PASSES", "Pass", "PassResult", "PassSettings", "Refusal", "run_passes"]
