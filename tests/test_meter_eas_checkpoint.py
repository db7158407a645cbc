"""Adapters of METER-EAS's checkpoints: against the authors' numbers, through a whole model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import close
from test_meter import run
from tiny_bridgetower import golden, golden_inputs, golden_layer
from tiny_meter import LEVELS, C, inputs, save
from tiny_meter import weights as meter_weights
from torch import Tensor

from vte_compile import Plan, optimize
from vte_compile.adapters import PIA
from vte_compile.errors import PlanError
from vte_compile.families.meter import load_meter
from vte_compile.families.meter.checkpoint import read_meter_checkpoint
from vte_compile.oracle.co_attention import OracleLayer, co_attention_oracle


def golden_checkpoint() -> dict[str, Tensor]:
    """The two levels of eas_meter.npz under the names of the authors' whole model."""
    return {
        f"cross_modal_{key[2 : -len(rest) - 2]}_layers.{key[-len(rest) - 2]}.{rest}": value
        for key, value in golden().items()
        if key.startswith("w.") and (rest := key.partition("0.")[2] or key.partition("1.")[2])
    }


def adapters(width: int = 8) -> dict[str, Tensor]:
    """Random adapters of all layers of tiny_meter, in METER-EAS's layout."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for side in ("text", "image"):
        for level in range(LEVELS):
            layer = f"cross_modal_{side}_layers.{level}."
            for module in ("attention.adapter", "crossattention.adapter", "intermediate.adapter"):
                shapes = {"conv_C": (width, C, 1), "conv_B": (C, width // 2, 1), "conv_D": (C, width // 2, 1)}
                found |= {f"{layer}{module}.{name}": shape for name, shape in shapes.items()}
            for module in ("adapter_self_attn", "adapter_cross_attn"):
                shapes = {"conv_A": (width, C, 1), "conv_C": (width, C, 1), "conv_B": (C, width // 2, 1)}
                found |= {f"{layer}{module}.{name}": shape for name, shape in shapes.items()}
    tensors = {}
    for name, shape in found.items():
        tensors[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return tensors


@pytest.mark.parametrize(
    ("skip", "side", "case"),
    [
        ([], "text", "self0_cross0"),
        ([0], "text", "self1_cross0"),
        ([2], "text", "self0_cross1"),
        ([4, 6], "image", "self1_cross1"),
    ],
)
def test_golden_blocks(skip: list[int], side: str, case: str) -> None:
    plan = Plan.from_eas_checkpoint(golden_checkpoint(), skip)
    [part] = [part for part in plan.co_attention if (part.side, part.level) == (side, 0)]
    output = OracleLayer(golden_layer(side), part)(**golden_inputs(side))[0]
    close(output, golden()[f"{case}.{side}0.f64"])


def test_numbers_of_attentions() -> None:
    plan = Plan.from_eas_checkpoint(adapters(), skip=[0, 3, 5, 6], scale=0.5)
    skipped = {(p.side, p.level): (p.skip_self, p.skip_cross) for p in plan.co_attention}
    assert skipped == {
        ("text", 0): (True, False),
        ("text", 1): (False, True),
        ("image", 0): (False, True),
        ("image", 1): (True, False),
    }
    first = plan.co_attention[0]
    assert isinstance(first.self_adapter, PIA)
    assert (first.self_adapter.width, first.self_adapter.groups, first.self_adapter.scale) == (8, 2, 0.5)


def test_a_whole_model(tmp_path: Path) -> None:
    """The model does not notice the adapters in its file, and optimize() with the plan of it is the oracle's."""
    path = save(tmp_path / "eas.ckpt", meter_weights() | adapters())
    model = load_meter(path)
    plan = Plan.from_eas_checkpoint(read_meter_checkpoint(path).state_dict, skip=[1, 6])
    given = inputs()
    want = run(co_attention_oracle(model, plan), **given)
    assert not torch.allclose(want, run(model, **given), atol=1e-2)
    torch.testing.assert_close(run(optimize(model, plan, compile=False), **given), want, rtol=1e-4, atol=1e-5)


def without(state_dict: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "skip", "message"),
    [
        (lambda w: w, [8], r"skip: 8: a METER of 2 levels has attentions 0 to 7"),
        (lambda w: w, [-1], r"skip: must be 0 or more"),
        (
            lambda w: without(w, "text_layers.1.adapter_self_attn"),
            [1],
            r"text_layers\.1\.adapter_self_attn: skip: the checkpoint has no adapter",
        ),
        (
            lambda w: without(w, "image_layers.0.attention.adapter.conv_B.bias"),
            [],
            r"image_layers\.0\.attention\.adapter: conv_B\.bias: the checkpoint lacks it",
        ),
        (
            lambda w: w | {f"module.{key}": value for key, value in w.items()},
            [],
            r"twice",
        ),
    ],
)
def test_refused(change: Any, skip: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_eas_checkpoint(change(adapters()), skip)
