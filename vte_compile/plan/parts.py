"""What a plan is made of: exits, skipped attentions, and adapters of attentions that are kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import PlanError
from vte_compile.field_checks import check_pair, check_values, finite, float_tensor, integer
from vte_compile.plan.co_attention import CoAttention


@dataclass(frozen=True, eq=False, repr=False)
class GateExit:
    """Visual tokens leave after `layer` in the samples whose gate says so (DyVTE, arXiv 2411.19628).

    With f = [mean of the question tokens except the last ; last token], taken from the layer's output [2C]::

        z = w2 @ gelu(w1 @ f)        exact (erf) GELU, no biases
        exit after this layer  iff  z[1] - z[0] > threshold      (strict: a tie or a NaN keeps)

    Args:
        layer: decoder layer whose output the gate reads, counted from 0.
        w1: [M, 2C], floating point; C is the decoder's hidden size, M the gate's own width (2048 in the paper).
        w2: [2, M], same dtype and device as `w1`; row 0 is "keep", row 1 is "exit".
        threshold: in units of the logits; 0 is the paper's rule.

    Raises:
        PlanError: a field is of the wrong type, shape or dtype, or is not finite; the message starts with its name.
    """

    layer: int
    w1: Tensor
    w2: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))
        object.__setattr__(self, "threshold", finite("threshold", self.threshold))
        for name in ("w1", "w2"):
            object.__setattr__(self, name, float_tensor(name, getattr(self, name), 2))
        if self.w1.shape[0] == 0 or self.w1.shape[1] == 0 or self.w1.shape[1] % 2:
            raise PlanError(f"w1: expected shape [M, 2C], got {list(self.w1.shape)}")
        check_pair("w2", self.w2, [2, self.width], "w1", self.w1)
        check_values("w1", self.w1)
        check_values("w2", self.w2)

    @property
    def width(self) -> int:
        """M, the gate's own width."""
        return self.w1.shape[0]

    @property
    def hidden_size(self) -> int:
        """C, the hidden size of the decoder the gate reads."""
        return self.w1.shape[1] // 2

    def __repr__(self) -> str:
        return f"GateExit(layer={self.layer}, width={self.width}, threshold={self.threshold:g})"


@dataclass(frozen=True)
class StaticExit:
    """Visual tokens of every sample leave after `layer` (counted from 0).

    Raises:
        PlanError: `layer` is not an integer, or is negative.
    """

    layer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))


Exit = GateExit | StaticExit


@dataclass(frozen=True, eq=False)
class SkippedAttention:
    """The attention of `layer` (counted from 0) is not computed, and caches nothing (EAS, arXiv 2403.15226).

    With the input norm RMS_in, the post-attention norm RMS_post and its weight g, a pre-norm block becomes::

        out = x + MLP(g * PIA(RMS_in x))     with an adapter
        out = x + MLP(RMS_post x)            without: training-free

    Args:
        layer: decoder layer.
        adapter: what propagates information in the attention's place; None: nothing does.

    Raises:
        PlanError: a field is of the wrong type, or `layer` is negative.
    """

    layer: int
    adapter: PIA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))
        if self.adapter is not None and not isinstance(self.adapter, PIA):
            raise PlanError(f"adapter: expected a PIA or None, got {type(self.adapter).__name__}")


@dataclass(frozen=True, eq=False)
class KeptAdapter:
    """`layer` (counted from 0) keeps its attention, with an adapter in front of q, k and v (EAS, arXiv 2403.15226)::

        h = x + MHA(AD(RMS_in x)) ;  out = h + MLP(RMS_post h)

    Raises:
        PlanError: a field is of the wrong type, or `layer` is negative.
    """

    layer: int
    adapter: PlainAdapter

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))
        if not isinstance(self.adapter, PlainAdapter):
            raise PlanError(f"adapter: expected a PlainAdapter, got {type(self.adapter).__name__}")


def place(part: Exit | SkippedAttention | KeptAdapter | CoAttention) -> tuple[int, ...]:
    """By what the parts of one kind are sorted."""
    return part.place if isinstance(part, CoAttention) else (part.layer,)
