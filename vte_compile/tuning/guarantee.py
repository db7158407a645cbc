"""The guarantee: P(the answer differs from the full model's) <= max_disagreement, with confidence 1 - delta.

Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei, arXiv 2110.01052) with exact binomial p-values and
fixed-sequence testing: policies that were fixed without the calibration split are tested on it in their order, each at
level delta, up to the first that fails. All before it hold at once, and the cheapest of them is chosen. Theorem,
assumptions and limits: docs/guarantee.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vte_compile.errors import CalibrationError, InputError
from vte_compile.tuning.binomial import check_share, samples_needed, tail, upper_bound
from vte_compile.tuning.exits import ExitOutcomes, Outcome, measure

_SEQUENCE = "Learn then Test, exact binomial p-values, fixed sequence"
_SINGLE = "exact binomial bound of one policy (Clopper-Pearson)"


@dataclass(frozen=True)
class Certificate:
    """A policy, and what is known of it: P(answer differs) <= `max_disagreement` with confidence 1 - `delta`."""

    method: str
    samples: int
    """Prompts of the calibration split."""
    max_disagreement: float
    delta: float
    thresholds: tuple[float, ...]
    """By candidate layer; inf where a layer is not used."""
    changed: int
    """How many of the prompts' answers differ."""
    p_value: float
    """Of the hypothesis that more than `max_disagreement` of all answers differ; at most `delta`."""
    upper_bound: float
    """Of the disagreement, at level `delta`, as if no other policy had been tested; at most `max_disagreement`, which
    is what holds after the choice."""
    tested: int
    """Policies tested, the first that failed included."""
    expected_cost: float
    """The prompts' mean, gates included."""
    full_cost: float
    """Without exits and gates."""

    @property
    def risk(self) -> float:
        """The share of the prompts whose answers differ."""
        return self.changed / self.samples


def certify(calibration: ExitOutcomes, policies: Tensor, max_disagreement: float, delta: float) -> Certificate:
    """Choose the cheapest policy of which the calibration split shows that few answers differ.

    Args:
        calibration: Independent prompts from where the model will be used; none of them was used to make `policies`.
        policies: [P, L], the thresholds of each in the order of the tests, from strict to lenient, such as
            :func:`vte_compile.tuning.policies.offset_policies` gives.
        max_disagreement: The share of all future prompts whose answers may differ.
        delta: The probability, over the draw of the calibration split, with which more of them may.

    Raises:
        InputError: Wrong shapes, or numbers out of range.
        CalibrationError: No policy that saves anything passes; the message says how many prompts might be enough.
    """
    check_share("max_disagreement", max_disagreement)
    check_share("delta", delta)
    if policies.ndim != 2 or len(policies) == 0:
        raise InputError(f"policies: expected [P, L] with P >= 1, got {list(policies.shape)}.")
    passed: list[Outcome] = []
    for thresholds in policies:
        outcome = measure(calibration, thresholds)
        if tail(outcome.changed, calibration.samples, max_disagreement) > delta:
            break
        passed.append(outcome)
    chosen = min(range(len(passed)), key=lambda index: passed[index].cost, default=None)
    if chosen is None or passed[chosen].cost >= calibration.full_cost:
        raise CalibrationError(_why_not(calibration, policies, max_disagreement, delta))
    p_value = tail(passed[chosen].changed, calibration.samples, max_disagreement)
    tested = min(len(passed) + 1, len(policies))
    return _certificate(_SEQUENCE, calibration, policies[chosen], max_disagreement, delta, p_value, tested)


def bound(calibration: ExitOutcomes, thresholds: Tensor, delta: float) -> Certificate:
    """What the calibration split shows of one policy [L] that was fixed without it, such as one for a target speedup.

    The certificate's `max_disagreement` is the upper bound itself, so that its p-value is delta.

    Raises:
        InputError: Wrong shapes, or numbers out of range.
    """
    changed = measure(calibration, thresholds).changed
    limit = upper_bound(changed, calibration.samples, delta)
    return _certificate(_SINGLE, calibration, thresholds, limit, delta, delta, 1)


def _certificate(
    method: str,
    calibration: ExitOutcomes,
    thresholds: Tensor,
    max_disagreement: float,
    delta: float,
    p_value: float,
    tested: int,
) -> Certificate:
    outcome, samples = measure(calibration, thresholds), calibration.samples
    return Certificate(
        method=method,
        samples=samples,
        max_disagreement=max_disagreement,
        delta=delta,
        thresholds=tuple(thresholds.tolist()),
        changed=outcome.changed,
        p_value=p_value,
        upper_bound=upper_bound(outcome.changed, samples, delta),
        tested=tested,
        expected_cost=outcome.cost,
        full_cost=calibration.full_cost,
    )


def _why_not(calibration: ExitOutcomes, policies: Tensor, max_disagreement: float, delta: float) -> str:
    """Why no policy that saves anything passed, and how many prompts would be enough for the first that does."""
    samples = calibration.samples
    outcomes = [measure(calibration, thresholds) for thresholds in policies]
    first = next((n for n, outcome in enumerate(outcomes) if outcome.cost < calibration.full_cost), None)
    if first is None:
        return f"No policy saves anything on the {samples} prompts: gates do not fire, or cost more than they save."
    limits = f"max_disagreement={max_disagreement:g} with delta={delta:g}"
    least = samples_needed(max_disagreement, delta)
    assert least is not None
    if samples < least:
        return f"{limits} needs at least {least} prompts, if not one answer differs; there are {samples}."
    changed = max(outcome.changed for outcome in outcomes[: first + 1])  # those before it have to pass as well
    why = f"{limits}: to save anything, a policy had to pass that changes {changed} of {samples} answers. "
    needed = samples_needed(max_disagreement, delta, changed / samples)
    if needed is None:
        return why + "At that rate no number of prompts would be enough; the gates or the limit have to change."
    return why + f"At that rate about {needed} prompts would be enough."
