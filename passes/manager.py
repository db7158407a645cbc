"""What a pass is, what it reports, and how the list of passes is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from vte_compile.errors import CaptureError
from vte_compile.folded_weights import FoldedWeights

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph
    from vte_compile.plan import Plan


@dataclass(frozen=True)
class PassSettings:
    """What the passes are to do."""

    plan: Plan
    last_token_logits: bool = True
    """Compute the logits of the last token only."""
    one_prompt: bool = True
    """All rows of a batch come from one prompt, so adapters know the same of each."""
    folded: FoldedWeights = field(default_factory=FoldedWeights)
    """Filled by fold_adapters; the same object for all graphs of a model."""
    fuse_attention: bool | None = None
    """Attentions as fused kernels; None: in graphs on CUDA devices."""


@dataclass(frozen=True)
class Refusal:
    """One place where a pass could have applied and did not."""

    reason: str
    node: str
    """Name of the graph node in the way."""
    layer: int | None = None


@dataclass
class PassResult:
    """What a pass did: how often it applied, and where it refused and why."""

    name: str
    applied: int = 0
    refusals: list[Refusal] = field(default_factory=list)


class Traced(Protocol):
    """What all graphs have that passes rewrite."""

    @property
    def phase(self) -> str:
        """What was traced, as errors call it."""


Pass = Callable[["DecoderGraph", PassSettings], PassResult]
GraphT = TypeVar("GraphT", bound=Traced)
SettingsT = TypeVar("SettingsT")


def run_passes(
    passes: Sequence[Callable[[GraphT, SettingsT], PassResult]], graph: GraphT, settings: SettingsT
) -> list[PassResult]:
    """Run passes in order, in place.

    Raises:
        CaptureError: A pass failed; the message names it and the passes already run.
    """
    results: list[PassResult] = []
    for run in passes:
        try:
            results.append(run(graph, settings))
        except Exception as error:
            done = ", ".join(r.name for r in results) or "none"
            name = getattr(run, "__name__", repr(run))
            raise CaptureError(
                f"pass {name} failed on the {graph.phase} graph (already run: {done}): {error}"
            ) from error
    return results
