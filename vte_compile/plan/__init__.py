"""Plans: what to do to a model, the files they are stored in, and the authors' checkpoints they are read from."""

from vte_compile.plan.co_attention import CoAttention
from vte_compile.plan.parts import Exit, GateExit, KeptAdapter, SkippedAttention, StaticExit
from vte_compile.plan.plan import Plan

__all__ = ["CoAttention", "Exit", "GateExit", "KeptAdapter", "Plan", "SkippedAttention", "StaticExit"]
