"""Which form an adapter takes in each phase: a cost model, in modelled seconds, from sizes alone.

The forms, all exact (EAS, arXiv 2403.15226, "re-parameterization"; factors as in vte_compile/folding.py):

- ``constant``: the router is static; its weights are in the folded weights.
- ``blended``: W' = w0 base_0 + w1 base_1, once per prompt; from then on no extra matrix product. In decode only
  where all rows come from one prompt, since W' is theirs alone.
- ``low_rank``: base_0 x + w1 (factor_1 - factor_0)(M1 x): weights that all rows share, whatever their routers say.
- ``unfolded``: the adapter in front of the layer's own weights; for weights that cannot be folded, or where reading
  them as well is worth another copy of them in memory.

What a phase costs on top of the layer without its adapter, per kernel launched, FLOP computed and byte moved, is all
that differs. The model assumes a typical prompt and answer, since it has to choose before it has seen any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["constant", "blended", "low_rank", "unfolded"]

PROMPT_TOKENS, ANSWER_TOKENS, BATCH = 512, 128, 8
"""What is assumed of a request: tokens of its prompt and of its answer, and rows of a batch."""
# Rough, and only ratios matter: FLOP/s, bytes/s and seconds per kernel, of a desktop CPU and of a data-center GPU.
_MACHINES = {"cpu": (2e11, 2e10, 2e-6), "cuda": (4e14, 2e12, 4e-6)}
# Another copy of a layer's weights has to save at least this share of the layers' own time.
_WORTH_A_COPY = 0.05


@dataclass(frozen=True)
class AdapterSizes:
    """What the cost of an adapter depends on."""

    hidden: int
    width: int
    outputs: tuple[int, ...]
    """Output sizes of the linear layers behind it."""
    static: bool
    """Whether its router is."""
    foldable: bool
    """Whether these layers have plain weights."""


@dataclass(frozen=True)
class Forms:
    """The forms of one adapter."""

    prompt: Form
    """In prefill."""
    step: Form
    """In decode and in later turns, with what prefill found out of the prompt."""
    reason: str
    """What decided, with the modelled times."""


def choose_forms(sizes: AdapterSizes, device: torch.device, dtype: torch.dtype, one_prompt: bool) -> Forms:
    """The forms that cost least over a request.

    Args:
        sizes: Of the adapter and the layers behind it.
        device: Where they are; another device than a GPU counts as a CPU.
        dtype: Of the weights.
        one_prompt: Whether all rows come from one prompt (else each row is routed by its own).
    """
    if not sizes.foldable:
        return Forms("unfolded", "unfolded", "the layers behind it have no plain weights to fold into")
    if sizes.static:
        return Forms("constant", "constant", "the router is static")
    costs = _Costs(sizes, _MACHINES.get(device.type, _MACHINES["cpu"]), dtype.itemsize)
    totals = {pair: costs.request(pair, one_prompt) for pair in _pairs(one_prompt)}
    base = costs.layers(one_prompt)
    best = min(totals, key=lambda pair: totals[pair] + (_WORTH_A_COPY * base if "unfolded" in pair else 0.0))
    shown = ", ".join(f"{'+'.join(dict.fromkeys(pair))} {1e3 * time:.3g}" for pair, time in totals.items())
    return Forms(*best, f"modelled ms per request: {shown}; the layers alone {1e3 * base:.3g}")


def _pairs(one_prompt: bool) -> Iterator[tuple[Form, Form]]:
    """Forms of prompt and steps that go together: what was blended for the prompt costs the steps nothing."""
    yield "blended", "blended" if one_prompt else "low_rank"
    yield "low_rank", "low_rank"
    yield "unfolded", "unfolded"


@dataclass(frozen=True)
class _Costs:
    sizes: AdapterSizes
    machine: tuple[float, float, float]
    itemsize: int

    def request(self, pair: tuple[Form, Form], one_prompt: bool) -> float:
        """Seconds that a request spends on the adapter, beyond the layers behind it."""
        rows = 1 if one_prompt else BATCH
        prompt, step = pair
        once = self._blend() if prompt == "blended" else self._extra(prompt, PROMPT_TOKENS)
        return rows * once + ANSWER_TOKENS * self._extra(step, rows)

    def layers(self, one_prompt: bool) -> float:
        """Seconds that a request spends in the layers behind the adapter."""
        rows = 1 if one_prompt else BATCH
        matrix, kernels = self.sizes.hidden * sum(self.sizes.outputs), len(self.sizes.outputs)
        return rows * self._product(matrix, PROMPT_TOKENS, kernels) + ANSWER_TOKENS * self._product(
            matrix, rows, kernels
        )

    def _blend(self) -> float:
        """Two experts read and one written."""
        _, bandwidth, launch = self.machine
        moved = 3 * self.sizes.hidden * sum(self.sizes.outputs) * self.itemsize
        return moved / bandwidth + launch * len(self.sizes.outputs)

    def _extra(self, form: Form, tokens: int) -> float:
        hidden, width, outputs = self.sizes.hidden, self.sizes.width, self.sizes.outputs
        if form == "blended":
            return 0.0
        if form == "low_rank":
            return self._product(width * (hidden + sum(outputs)), tokens, 1 + len(outputs))
        return self._product(width * 3 * hidden, tokens, 2)

    def _product(self, matrix: int, tokens: int, kernels: int) -> float:
        """Matrices of so many elements in all, times so many tokens."""
        flops, bandwidth, launch = self.machine
        return max(2 * matrix * tokens / flops, matrix * self.itemsize / bandwidth) + launch * kernels
