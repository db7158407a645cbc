"""The paper's gate-training step: golden parity with the authors' code, rows of any layout, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import DATA, C, chunk, load_golden, one_thread, shared_model, tiny  # noqa: F401

from vte_compile import GateExit, Oracle, Plan, StaticExit
from vte_compile.errors import CalibrationError, InputError
from vte_compile.tuning.batches import IGNORE
from vte_compile.tuning.random_layer import Batch, random_layer_step, train_random_layer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_golden(dtype, layer) -> None:
    models, w1, image = load_golden()
    data = np.load(DATA / "dyvte_train_gate.npz")
    suffix = ".f64" if dtype == torch.float64 else ".f32"

    def close(actual, key):
        want = torch.from_numpy(np.asarray(data[key + suffix][layer]))
        torch.testing.assert_close(actual.detach(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    embeds = torch.from_numpy(data["inputs_embeds"]).to(dtype)
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, image] = True
    batch = Batch(embeds, torch.from_numpy(data["attention_mask"]), visual, torch.from_numpy(data["labels"]))
    w2 = torch.from_numpy(data["router_w2"])
    gates = [tuple(w[k].to(dtype, copy=True).requires_grad_() for w in (w1, w2)) for k in range(6)]

    result = random_layer_step(models[dtype], gates, batch, layer)
    close(result.features, "feat")
    close(result.full_ce, "full_ce")
    close(result.exit_ce, "exit_ce")
    close(result.logits, "gate_logits")
    close(result.loss, "loss")
    assert result.labels.long().tolist() == data["gate_labels"][layer].tolist()
    result.loss.backward()
    first, second = gates[layer]
    close(first.grad.sum(1), "grad_w1_rowsum")
    close(second.grad, "grad_w2")
    assert all(weight.grad is None for k, gate in enumerate(gates) if k != layer for weight in gate)


# Prompts, a their answers: other numbers of visual tokens, several images, padding on either side and in between.
LAYOUTS = ["tvvvvtttaa......", "..tvvtvvvtt.ttaa", "ttvvvvvvttaaaa..", "....vvttttta...."]


def rows():
    """A batch of these prompts, with random answers."""
    prompts = [layout.replace("a", "t") for layout in LAYOUTS]
    embeds, visual, real = chunk(*prompts)
    answer = torch.tensor([[c == "a" for c in layout] for layout in LAYOUTS])
    ids = torch.randint(3, 60, answer.shape, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        inputs_embeds=embeds, attention_mask=real, visual_mask=visual, labels=ids.masked_fill(~answer, IGNORE)
    )


def gate_weights(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 2 * C, generator=generator), torch.randn(2, 8, generator=generator)) for _ in range(3)]


@pytest.mark.parametrize(("name", "layer"), [("llama", 0), ("llama", 2), ("gemma2", 1)])
def test_every_layout_is_the_oracles(name, layer) -> None:
    """Gemma2's scores and logits are capped; its windows are not taken here."""
    model = tiny(name, layer_types=["full_attention"] * 4) if name == "gemma2" else shared_model(name)
    batch, gates = rows(), gate_weights()
    result = random_layer_step(model, gates, Batch(**vars(batch)), layer)
    watch, leave = Plan([GateExit(layer, *gates[layer], 1e9)]), Plan([StaticExit(layer)])
    for row, layout in enumerate(LAYOUTS):
        answer = layout.count("a")
        here = torch.tensor([c != "." for c in layout])
        embeds, visual = batch.inputs_embeds[row : row + 1, here], batch.visual_mask[row : row + 1, here]
        seen = Oracle(model, watch).forward(embeds[:, :-answer], visual[:, :-answer])
        torch.testing.assert_close(result.features[row], seen.gate_features[layer][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.logits[row], seen.gate_logits[layer][0], rtol=1e-4, atol=1e-3)
        target = batch.labels[row][batch.labels[row] != IGNORE]
        logits = [Oracle(model, p).forward(embeds, visual).logits[0, -answer - 1 : -1] for p in (Plan(), leave)]
        full, exited = (F.cross_entropy(each, target) for each in logits)
        torch.testing.assert_close(result.full_ce[row], full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.exit_ce[row], exited, rtol=1e-4, atol=1e-4)
        same = bool((logits[0].argmax(-1) == logits[1].argmax(-1)).all())
        assert bool(result.labels[row]) == (same and bool(exited < 1.03 * full))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, 3)}, r"labels: expected \[4, 16\]"),
        ({"visual_mask": torch.zeros(4, 16, dtype=torch.bool)}, "row 0 has no visual token"),
        ({"labels": torch.full((4, 16), IGNORE)}, "row 0 has no visual token or no answer"),
        ({"labels": torch.zeros(4, 16, dtype=torch.long)}, "row 0 has fewer than two question tokens"),
    ],
)
def test_rows_that_give_no_label_are_refused(change, message) -> None:
    with pytest.raises(InputError, match=message):
        Batch(**{**vars(rows()), **change})


def test_a_layer_without_gate_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer=3: there are gates for the layers 0\.\.2"):
        random_layer_step(shared_model("llama"), gate_weights(), Batch(**vars(rows())), 3)


def single_rows():
    """The rows of the batch, each without its padding."""
    batch = rows()
    for row in range(len(LAYOUTS)):
        here = batch.attention_mask[row]
        yield batch.inputs_embeds[row, here], batch.visual_mask[row, here], batch.labels[row, here]


def test_rows_are_padded_to_a_batch() -> None:
    padded = Batch.of(list(single_rows()))
    assert padded.attention_mask.tolist() == [[n < length for n in range(14)] for length in (10, 13, 14, 8)]
    model, gates = shared_model("llama"), gate_weights()
    first, second = (random_layer_step(model, gates, batch, 1) for batch in (padded, Batch(**vars(rows()))))
    torch.testing.assert_close(first.features, second.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.exit_ce, second.exit_ce, rtol=1e-4, atol=1e-4)


def test_gates_learn_their_batch() -> None:
    model, batch = shared_model("llama"), Batch(**vars(rows()))
    untrained = train_random_layer(model, [], steps=0, width=16, seed=3)
    trained = train_random_layer(model, [batch] * 60, steps=60, width=16, seed=3, rate=1e-2)
    assert trained.w1.shape == (3, 16, 2 * C)

    def losses(gates):
        pairs = list(zip(gates.w1, gates.w2, strict=True))
        return torch.stack([random_layer_step(model, pairs, batch, layer).loss for layer in range(3)])

    assert (losses(trained) < 0.1 * losses(untrained)).all()
    again = train_random_layer(model, [batch] * 60, steps=60, width=16, seed=3, rate=1e-2)
    assert torch.equal(trained.w1, again.w1)
    only_one = train_random_layer(model, [batch], steps=1, width=16, seed=3, rate=1e-2)
    assert sum(not torch.equal(a, b) for a, b in zip(only_one.w1, untrained.w1, strict=True)) <= 1


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    batch = rows()
    batch.inputs_embeds[1] = torch.nan
    with pytest.raises(CalibrationError, match=r"after layer \d is nan in step 1 of 1: .* lower rate"):
        train_random_layer(shared_model("llama"), [Batch(**vars(batch))], steps=1, width=4)
