"""From examined samples to gates, layers, thresholds and their certificate: what calibrate() does without the model.

Nothing here runs the model, so that a stored set of examined samples can be calibrated again and again, with other
settings or on other parts of it (benchmarks/guarantee.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vte_compile.plan import Plan
from vte_compile.tuning.costs import LayerCosts, flop_costs, gate_flop_costs
from vte_compile.tuning.examine import Examined
from vte_compile.tuning.exits import ExitOutcomes
from vte_compile.tuning.gates import Gates, train_gates
from vte_compile.tuning.guarantee import Certificate, bound, certify
from vte_compile.tuning.policies import offset_policies, thresholds_for_speedup, thresholds_within


@dataclass(frozen=True, eq=False)
class Splits:
    """Samples that train the gates, choose layers and thresholds, and test the guarantee (docs/guarantee.md)."""

    train: Examined
    selection: Examined
    certification: Examined

    @classmethod
    def of(cls, examined: Examined, parts: Sequence[str]) -> Splits:
        """Divide n samples by the name of each one's part."""
        return cls(*(examined.at([n for n, part in enumerate(parts) if part == field.name]) for field in fields(cls)))


@dataclass(frozen=True)
class Promise:
    """What is asked for: `max_disagreement` of the answers may differ, with confidence 1 - `delta`.

    `target_speedup`: instead of `max_disagreement`, how many times cheaper prefill is to be in the mean.
    """

    max_disagreement: float
    delta: float
    target_speedup: float | None = None


@dataclass(frozen=True)
class Costing:
    """What is to be saved: `known` costs, or else the FLOPs of each sample, from a model's `config`.

    `base`: skips and adapters of the model that the exits come on top of.
    """

    config: Any
    base: Plan | None = None
    known: LayerCosts | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """Gates, and the policy of which the certification split shows that few answers differ.

    `selection`, `certification`: what exits with these gates do to the two splits.
    """

    gates: Gates
    selection: ExitOutcomes
    certification: ExitOutcomes
    certificate: Certificate


def fit_gates(
    train: Examined, *, slack: float, width: int, epochs: int, seed: int, device: torch.device | str | None = None
) -> Gates:
    """Train a gate after each layer but the last, see :func:`vte_compile.tuning.gates.train_gates`.

    Args:
        train: The training split.
        slack: Of the labels, in nats, see :meth:`Examined.may_exit`.
        width: M, the gates' own width.
        epochs: Passes over the split.
        seed: Of the training.
        device: Where to train; None: where the features are.

    Raises:
        InputError, CalibrationError: As train_gates does.
    """
    features, labels = candidates(train, slack)
    return train_gates(features, labels, width=width, epochs=epochs, seed=seed, device=device)


def choose(gates: Gates, splits: Splits, slack: float, promise: Promise, costing: Costing) -> Choice:
    """Choose layers and thresholds on the selection split, and certify them on the certification split.

    Gates after layers where no training sample may exit, by the label with `slack`, never fire.

    Raises:
        InputError: Numbers out of range.
        CalibrationError: The samples do not support the promise; the message says how many would, where any can.
        UnsupportedModelError: FLOPs of the model are not known.
    """
    may_exit = candidates(splits.train, slack)[1].any(0)
    to_choose, to_certify = (
        exit_outcomes(gates, may_exit, part, costing) for part in (splits.selection, splits.certification)
    )
    if promise.target_speedup is None:
        policies = offset_policies(to_choose, thresholds_within(to_choose, promise.max_disagreement))
        certificate = certify(to_certify, policies, promise.max_disagreement, promise.delta)
    else:
        certificate = bound(to_certify, thresholds_for_speedup(to_choose, promise.target_speedup), promise.delta)
    return Choice(gates, to_choose, to_certify, certificate)


def candidates(examined: Examined, slack: float) -> tuple[Tensor, Tensor]:
    """Features [n, L - 1, 2C] and labels [n, L - 1] of all layers but the last, behind which nothing is saved."""
    return examined.features[:, :-1], examined.may_exit(slack)[:, :-1]


def exit_outcomes(gates: Gates, may_exit: Tensor, examined: Examined, costing: Costing) -> ExitOutcomes:
    """What exits after the layers with gates do to samples; those after which no sample `may_exit` [G] never fire."""
    layers = len(gates.w1)
    if costing.known is None:
        exits = flop_costs(costing.config, examined.tokens, examined.visual, costing.base)
        asking = gate_flop_costs(gates.w1.shape[1], gates.w1.shape[2] // 2, layers)
    else:
        exits = torch.tensor(costing.known.exits, dtype=torch.float64)
        asking = torch.full((layers,), costing.known.gate, dtype=torch.float64)
    margins = gates.margins(examined.features[:, :-1]).masked_fill(~may_exit, torch.nan)
    # The last of the L columns is the one of never leaving: behind the last layer nothing leaves.
    return ExitOutcomes(margins, ~examined.unchanged, exits, asking)
