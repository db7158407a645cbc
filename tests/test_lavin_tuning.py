"""Tuning of LaVIN-EAS: its plan, with the modality token, as what exits come on top of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_lavin import EXITS, adapters, loaded, traced
from tiny_lavin import LAYERS, inputs
from tiny_models import one_thread  # noqa: F401

from vte_compile import Oracle, StaticExit
from vte_compile.oracle import embed
from vte_compile.tuning import evaluate as module
from vte_compile.tuning.evaluate import evaluate
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.samples import Sample

ANSWER = (7, 3, 11, 5)


def samples() -> list[Sample]:
    given = (("tittt", 4), ("ttittttt", 5), ("itttt", 6))
    return [Sample.of(inputs(row, seed=seed), ANSWER, f"sample {seed}") for row, seed in given]


def test_what_exits_do_is_the_oracles() -> None:
    """Loss and features of each exit, on top of the skip, the adapters and the token."""
    model, base = loaded(eas=True)[0], adapters(eas=True)
    answer, [sample, *_] = torch.tensor(ANSWER), samples()
    prompt = embed(model, sample.inputs["input_ids"], sample.inputs["pixel_values"])
    said = model.get_input_embeddings()(answer[None, :-1])

    def loss(planned: Any) -> torch.Tensor:
        oracle = Oracle(model, planned)
        first = oracle.forward(*prompt)
        rest = oracle.forward(said, cache=first.cache)
        return F.cross_entropy(torch.cat([first.logits[0, -1:], rest.logits[0]]), answer)

    expected = [loss(replace(base, exits=[StaticExit(layer)])) for layer in range(LAYERS)] + [loss(base)]
    examined = Examiner(model, base).examine(sample)
    torch.testing.assert_close(examined.loss[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
    watched = Oracle(model, replace(base, exits=EXITS["never"][1])).forward(*prompt).gate_features[0][0]
    torch.testing.assert_close(examined.features[0, 0], watched, rtol=1e-4, atol=1e-4)
    without = Examiner(model, replace(base, companion=None)).examine(sample).loss
    assert float((without - examined.loss).abs().max()) > 1e-3  # or this would show little


def test_evaluation_is_of_the_oracles_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(eas=True)[0]
    planned = replace(adapters(eas=True), exits=[StaticExit(1)])
    own = module.optimize
    monkeypatch.setattr(
        module, "optimize", lambda given, plan, **options: own(traced(True) if given is model else given, plan)
    )
    right = []
    for sample in samples():
        prompt = embed(model, sample.inputs["input_ids"], sample.inputs["pixel_values"])
        tokens = Oracle(model, planned).generate(*prompt, max_new_tokens=3).tokens[0]
        right.append(Sample.of(sample.inputs, tuple(tokens), sample.name))
    found = evaluate(model, right, {"exit": planned}, baselines=False, max_new_tokens=3)
    measures = {name: found[name].measures for name in ("full model", "exit")}
    assert measures["exit"]["accuracy"].value == 1 > measures["full model"]["accuracy"].value
    assert found["exit"].exit_layers[1] == len(right)
