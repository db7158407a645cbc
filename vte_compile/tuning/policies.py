"""The policies that are tested, chosen on the training split alone: docs/guarantee.md says why that matters.

First which layers have a gate and with which threshold, greedily: starting without any exit, always the step that saves
most for each answer it changes. Then the family around it: the same thresholds, all shifted by one offset, from the
strictest offset to the most lenient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vte_compile.errors import CalibrationError, InputError
from vte_compile.tuning.binomial import check_share
from vte_compile.tuning.exits import ExitOutcomes, as_stored, check_thresholds, measure

_LEVELS = 32
"""Thresholds that are tried for a layer: quantiles of its margins. More would fit the training split's noise."""
_FREE = 0.5
"""How many answers a step that changes none is taken to change, for the comparison with steps that change some."""


def thresholds_within(train: ExitOutcomes, max_disagreement: float) -> Tensor:
    """Choose thresholds that save much while few answers of the training split differ.

    A greedy search: from no exit at all, lower one layer's threshold at a time, in the step with the largest (cost
    saved) / (answers changed) of those that keep within the limit, as long as a step saves anything. What a gate costs
    those who are asked counts, so a layer is used only if it pays. At the end layers are dropped, deepest first, that
    earlier ones have made useless. The same data give the same thresholds.

    Args:
        train: The training split, none of whose prompts will be used to test.
        max_disagreement: The share of its answers that may differ.

    Returns:
        [L] float64, inf where a layer is not used.

    Raises:
        InputError: `max_disagreement` is not between 0 and 1.
        CalibrationError: No exit saves anything within the limit, or answers differ beyond it without any.
    """
    check_share("max_disagreement", max_disagreement)
    limit, anyway = math.floor(max_disagreement * train.samples), int(train.differs[:, -1].sum())
    if anyway > limit:
        raise CalibrationError(
            f"Skips and adapters alone change {anyway} of the {train.samples} training prompts' answers, more than "
            f"{max_disagreement:.2%}: skip fewer attentions, train their adapters, or allow more."
        )
    thresholds = _search(train, limit, -math.inf)
    if not bool(torch.isfinite(thresholds).any()):
        raise CalibrationError(
            f"No gate saves anything on the {train.samples} training prompts with at most {max_disagreement:.2%} of "
            "the answers changed: the gates do not tell which prompts may leave, or cost more than they save."
        )
    return thresholds


def thresholds_for_speedup(train: ExitOutcomes, target_speedup: float) -> Tensor:
    """Choose thresholds with which the training split costs its full cost / `target_speedup` at most, in the mean.

    The steps are those of :func:`thresholds_within`, until the target is reached, and what a step saves beyond it does
    not count for it: few answers differ, but how many is not limited.

    Returns:
        [L] float64, inf where a layer is not used.

    Raises:
        InputError: `target_speedup` is not above 1.
        CalibrationError: The steps end before the target; the message says how far they lead.
    """
    if not 1.0 < target_speedup < math.inf:
        raise InputError(f"target_speedup={target_speedup}: expected a number above 1.")
    budget = train.full_cost / target_speedup
    thresholds = _search(train, train.samples, budget)
    if (cost := measure(train, thresholds).cost) > budget:
        raise CalibrationError(
            f"target_speedup={target_speedup:g} is out of reach: the steps end where the {train.samples} training "
            f"prompts cost 1/{train.full_cost / cost:.3g} of what they cost without exits."
        )
    return thresholds


def offset_policies(train: ExitOutcomes, base: Tensor, count: int = 500) -> Tensor:
    """The policies base + t for a sequence of offsets t, from strict to lenient: what is to be tested, in this order.

    The offsets come from the training split: with the strictest no prompt leaves, then in even steps more and more do;
    of those that leave they let ever more do so at earlier layers. t = 0, the policy `base`, is among them.

    Args:
        train: As in :func:`thresholds_within`.
        base: [L], inf where a layer is not used; at least one is.
        count: Of offsets, about; more make finer steps, and cost no confidence.

    Returns:
        [P, L] float64, P <= count + 1.

    Raises:
        InputError: As in :func:`vte_compile.tuning.exits.check_thresholds`; no layer is used, or `count` is below 2.
    """
    check_thresholds(base, train.layers)
    if not bool(torch.isfinite(base).any()):
        raise InputError("base: no layer is used.")
    if count < 2:
        raise InputError(f"count={count}: expected at least 2.")
    scores = (train.margins - base).nan_to_num(-math.inf, math.inf, -math.inf)  # a prompt leaves below its highest
    half = count // 2
    grids = [_spread(scores.amax(1), half), _spread(scores.flatten(), count - half), torch.zeros(1)]
    offsets = torch.cat([grid.double() for grid in grids]).unique().flip(0)
    return as_stored(base.double() + offsets[:, None])


def _spread(values: Tensor, count: int) -> Tensor:
    """Quantiles of the finite values, evenly spread, the largest and the smallest among them."""
    ordered = values[torch.isfinite(values)].sort().values
    if not len(ordered):
        return ordered
    return ordered[torch.linspace(0, len(ordered) - 1, count, dtype=torch.float64).round().long()]


def _search(train: ExitOutcomes, may_change: int, budget: float) -> Tensor:
    """Greedy steps, until the mean cost is within the budget or none is left; then drop useless layers."""
    levels = [_levels(train.margins[:, layer]) for layer in range(train.layers)]
    above = [train.margins[:, layer, None] > levels[layer] for layer in range(train.layers)]
    thresholds = torch.full((train.layers,), math.inf, dtype=torch.float64)
    while (now := measure(train, thresholds)).cost > budget:
        limits = may_change - now.changed, (now.cost - budget) * train.samples
        steps = (_best_step(train, thresholds, layer, above[layer], *limits) for layer in range(train.layers))
        best = max((step for step in steps if step is not None), key=lambda step: step[0], default=None)
        if best is None:
            break
        _, layer, level = best
        thresholds[layer] = levels[layer][level]
    return _drop_useless(train, thresholds)


def _levels(margins: Tensor) -> Tensor:
    """Thresholds to try, falling: quantiles of the margins [n], and one below all; none if there are no margins."""
    values = _spread(margins, _LEVELS).unique().flip(0)
    return as_stored(torch.cat([values, values[-1:] - 1]))


def _best_step(
    train: ExitOutcomes, thresholds: Tensor, layer: int, above: Tensor, may_change: int, to_save: float
) -> tuple[float, int, int] | None:
    """The best lower threshold of one layer, if any saves: (score, layer, level).

    Args:
        above: [n, levels], whose margins exceed each level.
        may_change: How many more answers may differ.
        to_save: Cost, of all prompts together; to save more counts for nothing.
    """
    exits = train.exits(thresholds)
    later = exits > layer
    moved = (above & later[:, None]).double().T  # [levels, n]
    saved_each = train.spent(exits, thresholds) - train.costs[:, layer] - train.asked(thresholds)[layer]
    # All who come this far are asked, whether they then leave or not.
    new_gate = 0.0 if math.isfinite(thresholds[layer]) else train.gate_costs[layer].item() * int(later.sum())
    saved = moved @ saved_each - new_gate
    added = moved @ (train.differs[:, layer].double() - train.changed(exits).double())
    scores = torch.where(
        (saved > 0) & (added <= may_change), saved.clamp(max=to_save) / added.clamp(min=_FREE), -math.inf
    )
    if not bool((scores > -math.inf).any()):
        return None
    level = int(scores.argmax())
    return scores[level].item(), layer, level


def _drop_useless(train: ExitOutcomes, thresholds: Tensor) -> Tensor:
    """Without the layers whose loss saves cost and changes no more answers, tried from the deepest on."""
    best = measure(train, thresholds)
    for layer in reversed(torch.isfinite(thresholds).nonzero().flatten().tolist()):
        without = thresholds.clone()
        without[layer] = math.inf
        outcome = measure(train, without)
        if outcome.cost < best.cost and outcome.changed <= best.changed:
            thresholds, best = without, outcome
    return thresholds
