"""What exits cost: FLOPs per sample, times measured in turns."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LAYERS, C, gate, one_thread, shared_model  # noqa: F401

from vte_compile import Plan
from vte_compile.errors import InputError
from vte_compile.flops import gate_flops, prefill_flops
from vte_compile.tuning.costs import LayerCosts, flop_costs, gate_flop_costs, measure_costs


def test_flops_are_those_of_each_exit() -> None:
    config = shared_model("llava").config
    costs = flop_costs(config, torch.tensor([20, 9, 20]), torch.tensor([8, 4, 8]))
    assert costs.shape == (3, LAYERS)
    for row, (tokens, visual) in enumerate([(20, 8), (9, 4), (20, 8)]):
        assert costs[row].tolist() == [prefill_flops(config, tokens, visual, layer) for layer in (0, 1, 2, -1)]
    assert gate_flop_costs(16, C, 3).tolist() == [gate_flops(Plan([gate(0)]), -1)] * 3


def test_measured_costs() -> None:
    model = shared_model("llava")
    found = measure_costs(model, tokens=24, visual=12, width=8, runs=1, compile=False)
    assert len(found.exits) == LAYERS
    assert min(found.exits) > 0
    assert found.gate >= 0
    with pytest.raises(InputError, match="tokens=5, visual=4"):
        measure_costs(model, tokens=5, visual=4, width=8)


@pytest.mark.parametrize("costs", [([], 0.0), ([1.0, -1.0], 0.0), ([1.0], float("nan"))])
def test_bad_costs(costs) -> None:
    with pytest.raises(InputError, match="finite numbers that are not negative"):
        LayerCosts(*costs)
