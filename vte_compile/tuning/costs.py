"""What prompts cost for each exit, by which layers and thresholds are chosen: FLOPs, or times measured here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vte_compile.errors import InputError
from vte_compile.flops import flops_of_gate, prefill_flops
from vte_compile.plan import GateExit, Plan, StaticExit
from vte_compile.timing import interleaved, phases

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerCosts:
    """What the prefill of a typical prompt costs, in any one unit such as seconds.

    Args:
        exits: [L], of leaving after each of the decoder's layers 0..L-2, and last of never leaving; without gates.
        gate: Of asking one gate.

    Raises:
        InputError: No costs, or some that are negative or not finite.
    """

    exits: Sequence[float]
    gate: float

    def __post_init__(self) -> None:
        if not self.exits or not all(math.isfinite(cost) and cost >= 0 for cost in (*self.exits, self.gate)):
            raise InputError("costs: expected finite numbers that are not negative.")


def flop_costs(config: Any, tokens: Tensor, visual: Tensor, base: Plan | None = None) -> Tensor:
    """FLOPs of the prefill of n prompts for each exit: [n, L] float64, the last column without exit.

    Args:
        config: Of the model, as :func:`vte_compile.flops.prefill_flops` takes it.
        tokens: [n], of each prompt, visual ones included.
        visual: [n], how many of them are visual.
        base: Skips and adapters that all exits come on top of.

    Raises:
        UnsupportedModelError: A decoder whose FLOPs are not known.
    """
    layers = config.get_text_config(decoder=True).num_hidden_layers

    @functools.cache  # prompts of one length are many
    def row(seq: int, images: int) -> list[int]:
        return [prefill_flops(config, seq, images, layer, base) for layer in (*range(layers - 1), -1)]

    rows = [row(*sizes) for sizes in zip(tokens.tolist(), visual.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def gate_flop_costs(width: int, hidden_size: int, layers: int) -> Tensor:
    """FLOPs of asking the gate of each of some layers: [layers] float64."""
    return torch.full((layers,), float(flops_of_gate(width, hidden_size)), dtype=torch.float64)


def measure_costs(
    model: PreTrainedModel,
    *,
    tokens: int,
    visual: int,
    width: int,
    runs: int = 7,
    compile: bool | None = None,
    base: Plan | None = None,
) -> LayerCosts:
    """Time the prefill of one random prompt for each exit, in turns, in seconds: medians.

    Args:
        model: The model, not optimized yet.
        tokens: Of the prompt, visual ones included; such as the mean of the prompts to come.
        visual: How many of them are visual.
        width: M, of the gates.
        runs: Timed rounds.
        compile: As for optimize(): what is measured is what will run.
        base: Skips and adapters that all exits come on top of.

    Raises:
        InputError: ``tokens`` and ``visual`` leave no question behind the image.
    """
    from vte_compile.optimizer import optimize

    if not 0 < visual <= tokens - 2:
        raise InputError(f"tokens={tokens}, visual={visual}: expected a visual token, and two of text behind them.")
    base = base or Plan()
    plain: Any = optimize(model, base, compile=compile)
    spec = plain._vte_spec
    w1, w2 = torch.zeros(width, 2 * spec.hidden_size), torch.zeros(2, width)
    silent = [GateExit(layer, w1, w2, threshold=1.0) for layer in range(spec.num_layers - 1)]
    models = [optimize(plain, replace(base, exits=[StaticExit(layer)])) for layer in range(spec.num_layers - 1)]
    models += [plain, optimize(plain, replace(base, exits=silent))]

    embeddings: Any = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = embeddings(ids.to(model.device))
    visual_mask = torch.zeros(1, tokens, dtype=torch.bool, device=model.device)
    visual_mask[:, :visual] = True
    cases = {str(n): phases(each, embeds, visual_mask, 1).prefill for n, each in enumerate(models)}
    with tqdm(total=(runs + 1) * len(cases), desc="timing", unit="run", dynamic_ncols=True) as bar:
        times = interleaved(cases, runs, device=model.device, after_each=lambda: bar.update())
    *exits, with_gates = (times[name].median_s for name in cases)
    return LayerCosts(exits, max(with_gates - exits[-1], 0.0) / max(len(silent), 1))
