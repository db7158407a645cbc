"""What exits did to some prompts, as arrays, and what a policy, a threshold for each gate, would have done to them.

A policy leaves as the runtime does (vte_compile/oracle): after the first layer whose z[1] - z[0] exceeds its
threshold. An infinite threshold is a layer without a gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vte_compile.errors import InputError


@dataclass(frozen=True, eq=False)
class ExitOutcomes:
    """What leaving after each of L candidate layers, in order of depth, does to n prompts.

    Args:
        margins: [n, L] floating point, z[1] - z[0] of the gates; NaN where a gate cannot fire. With the visual tokens
            still there: no other gate fired.
        differs: [n, L + 1] bool, whether the answer would not be that of the full model; in the last column without
            leaving, by what else is changed in the model; [n, L] where nothing is.
        costs: [n, L + 1], or [L + 1] for all prompts alike: of leaving after each layer, and in the last column of
            never leaving, without gates. In FLOPs, seconds or whatever is to be saved.
        gate_costs: [L], of asking each gate; a gate that is used is asked where no earlier one fired.

    Raises:
        InputError: Wrong types, shapes or dtypes, no prompts or no layers, negative or infinite costs.
    """

    margins: Tensor
    differs: Tensor
    costs: Tensor
    gate_costs: Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Tensor):
                raise InputError(f"{name}: expected a torch.Tensor, got {type(value).__name__}.")
        shape = self.margins.shape
        if len(shape) != 2 or 0 in shape or not self.margins.is_floating_point():
            raise InputError(f"margins: expected [n, L] floating point, got {_describe(self.margins)}.")
        samples, layers = shape
        if self.differs.shape not in (shape, (samples, layers + 1)) or self.differs.dtype != torch.bool:
            raise InputError(
                f"differs: expected {[samples, layers + 1]} bool, or {list(shape)}, got {_describe(self.differs)}."
            )
        if self.costs.shape not in ((layers + 1,), (samples, layers + 1)):
            raise InputError(
                f"costs: expected {[samples, layers + 1]} or {[layers + 1]}, with never leaving in the last column, "
                f"got {_describe(self.costs)}."
            )
        if self.gate_costs.shape != (layers,):
            raise InputError(f"gate_costs: expected {[layers]}, got {_describe(self.gate_costs)}.")
        for name, values in (("costs", self.costs), ("gate_costs", self.gate_costs)):
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise InputError(f"{name}: expected finite numbers that are not negative.")
        object.__setattr__(self, "margins", self.margins.detach().double().cpu())
        staying = layers + 1 - self.differs.shape[1]  # the column that is not there: nothing differs
        object.__setattr__(self, "differs", torch.nn.functional.pad(self.differs, (0, staying)).cpu())
        object.__setattr__(self, "costs", self.costs.detach().double().cpu().expand(samples, layers + 1))
        object.__setattr__(self, "gate_costs", self.gate_costs.detach().double().cpu())

    @property
    def samples(self) -> int:
        """n, the number of prompts."""
        return self.margins.shape[0]

    @property
    def layers(self) -> int:
        """L, the number of candidate layers."""
        return self.margins.shape[1]

    @property
    def full_cost(self) -> float:
        """The mean cost of never leaving, and of asking no gate."""
        return self.costs[:, -1].mean().item()

    def exits(self, thresholds: Tensor) -> Tensor:
        """After which candidate layer each prompt leaves under thresholds [L]: [n], and L where it never does."""
        fires = self.margins > thresholds  # strict, and false for NaN
        return torch.where(fires.any(1), fires.int().argmax(1), self.layers)

    def spent(self, exits: Tensor, thresholds: Tensor) -> Tensor:
        """What each prompt that leaves after `exits` [n] costs, gates included: [n]."""
        return self.costs.gather(1, exits[:, None])[:, 0] + self.asked(thresholds)[exits]

    def asked(self, thresholds: Tensor) -> Tensor:
        """The cost of the gates that are asked until the exit after each layer, and until none: [L + 1]."""
        asked = torch.where(torch.isfinite(thresholds), self.gate_costs, 0.0).cumsum(0)
        return torch.cat([asked, asked[-1:]])

    def changed(self, exits: Tensor) -> Tensor:
        """Whether the answer of each prompt that leaves after `exits` [n] differs: [n] bool."""
        return self.differs.gather(1, exits[:, None])[:, 0]


@dataclass(frozen=True)
class Outcome:
    """What a policy does to some prompts."""

    changed: int
    """How many answers differ."""
    cost: float
    """The mean."""


def measure(outcomes: ExitOutcomes, thresholds: Tensor) -> Outcome:
    """What the policy with these thresholds [L] does to the prompts.

    Raises:
        InputError: As in :func:`check_thresholds`.
    """
    check_thresholds(thresholds, outcomes.layers)
    exits = outcomes.exits(thresholds)
    return Outcome(int(outcomes.changed(exits).sum()), outcomes.spent(exits, thresholds).mean().item())


def check_thresholds(thresholds: Tensor, layers: int) -> None:
    """Make sure that there are thresholds [L], finite or, where a layer is not used, inf.

    Raises:
        InputError: Another shape or dtype, NaN or -inf.
    """
    if thresholds.shape != (layers,) or not thresholds.is_floating_point():
        raise InputError(f"thresholds: expected {[layers]} floating point, got {_describe(thresholds)}.")
    if not bool((thresholds > -math.inf).all()):
        raise InputError("thresholds: expected numbers, or inf where a layer is not used, got NaN or -inf.")


def as_stored(thresholds: Tensor) -> Tensor:
    """Thresholds rounded to float32, in float64: a runtime that compares in float32 then decides what was tested."""
    return thresholds.float().double()


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
