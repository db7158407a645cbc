"""Gates trained on stored features: what they learn, that they repeat, how they are measured, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import C, one_thread, shared_model  # noqa: F401

from vte_compile import GateExit, Oracle, Plan
from vte_compile.errors import CalibrationError, InputError
from vte_compile.tuning.gates import Gates, accuracy, accuracy_by_width, train_gates


def learnable(samples: int = 1200, seed: int = 0):
    """Features of very different sizes, of which one decides at each of two layers."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, 2, 2 * C, generator=generator) * torch.logspace(-3, 2, 2 * C)
    return features, torch.stack([features[:, 0, 0] > 0, features[:, 1, 2 * C - 1] > 0], 1)


def test_gates_learn_and_repeat() -> None:
    features, labels = learnable()
    trained = train_gates(features[:1000], labels[:1000], width=16, epochs=20, seed=1)
    assert trained.w1.shape == (2, 16, 2 * C)
    assert trained.w2.shape == (2, 2, 16)
    margins = trained.margins(features[1000:])
    assert margins.shape == (200, 2)
    for layer, measured in enumerate(accuracy(margins, labels[1000:])):
        assert measured.layer == layer
        assert measured.balanced_accuracy > 0.8
        assert measured.auc > 0.9
    again = train_gates(features[:1000], labels[:1000], width=16, epochs=20, seed=1)
    assert torch.equal(trained.w1, again.w1)
    assert torch.equal(trained.w2, again.w2)
    other = train_gates(features[:1000], labels[:1000], width=16, epochs=20, seed=2)
    assert not torch.equal(trained.w1, other.w1)


def test_margins_are_those_of_a_plan() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = Gates(torch.randn(2, 5, 2 * C, generator=generator), torch.randn(2, 2, 5, generator=generator))
    plan = Plan([GateExit(layer, gates.w1[layer], gates.w2[layer], 1e9) for layer in range(2)])
    embeds = torch.randn(1, 9, C, generator=generator)
    visual = torch.tensor([[c == "v" for c in "tvvvvtttt"]])
    output = Oracle(shared_model("llama"), plan).forward(embeds, visual)
    features = torch.stack([output.gate_features[layer][0] for layer in range(2)])[None]
    logits = torch.stack([output.gate_logits[layer][0] for layer in range(2)])
    torch.testing.assert_close(gates.logits(features)[0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gates.margins(features)[0], logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-4)
    assert gates.margins(torch.full_like(features, torch.nan)).isnan().all()


def test_a_layer_with_one_label_is_left_constant_aloud(caplog) -> None:
    features, labels = learnable(300)
    labels[:, 1] = True
    with caplog.at_level(logging.WARNING, logger="vte_compile"):
        gates = train_gates(features, labels, width=4, epochs=2)
    assert [record.getMessage() for record in caplog.records] == [
        "layer 1: all 300 training samples may exit there, so its gate learns nothing and stays constant"
    ]
    margins = gates.margins(features)
    assert (margins[:, 1] == 0).all()
    assert margins[:, 0].unique().numel() > 1
    assert accuracy(margins, labels)[1].balanced_accuracy is None
    assert accuracy(margins, labels)[1].auc is None


def test_one_label_in_all_layers_is_an_error() -> None:
    features, labels = learnable(20)
    labels[:, 0], labels[:, 1] = False, True
    with pytest.raises(CalibrationError, match="all or none of the 20 training samples may exit"):
        train_gates(features, labels)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    features, labels = learnable(100)
    with pytest.raises(CalibrationError, match=r"loss is nan in epoch \d+ of 5: .* lower rate \(it is 1e\+30"):
        train_gates(features, labels, epochs=5, rate=1e30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: (f[0], t), "features: expected"),
        (lambda f, t: (f[:0], t[:0]), "features: expected"),
        (lambda f, t: (f, t[1:]), r"labels: expected \[8, 2\] bool, as many as"),
        (lambda f, t: (f, t.long()), "labels: expected"),
        (lambda f, t: (f.where(torch.arange(8)[:, None, None] != 5, torch.inf), t), "sample 5 are not finite"),
    ],
)
def test_bad_data(change, message) -> None:
    with pytest.raises(InputError, match=message):
        train_gates(*change(*learnable(8)))


@pytest.mark.parametrize("setting", ["width", "epochs", "batch"])
def test_bad_settings(setting) -> None:
    with pytest.raises(InputError, match=f"{setting}=0"):
        train_gates(*learnable(8), **{setting: 0})


def test_accuracy_counts_by_hand() -> None:
    margins = torch.tensor([[-1.0], [2.0], [2.0], [3.0], [0.0]])
    labels = torch.tensor([[False], [False], [True], [True], [True]])
    (measured,) = accuracy(margins, labels)
    assert measured.may_exit == pytest.approx(3 / 5)
    assert measured.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Pairs (may, may not): 2 > -1, 2 = 2, 3 > -1, 3 > 2, 0 > -1, 0 < 2.
    assert measured.auc == pytest.approx(4.5 / 6)


def test_accuracy_by_width() -> None:
    features, _ = learnable(600)
    scaled = features / torch.logspace(-3, 2, 2 * C)
    # One neuron cannot tell where the product of two features is positive.
    labels = (scaled[..., 0] * scaled[..., 1] > 0) & torch.tensor([True, False])
    narrow, wide = accuracy_by_width(scaled[..., :2].contiguous(), labels, [1, 32])
    assert (narrow.width, narrow.parameters) == (1, 2 + 2)
    assert (wide.width, wide.parameters) == (32, 32 * 2 + 2 * 32)
    assert wide.balanced_accuracy > 0.9 > narrow.balanced_accuracy + 0.1
    assert wide.auc > 0.95
    with pytest.raises(CalibrationError, match="Widths cannot be compared"):
        accuracy_by_width(features, torch.ones(600, 2, dtype=torch.bool), [4])
    with pytest.raises(InputError, match="widths"):
        accuracy_by_width(features, labels, [])
