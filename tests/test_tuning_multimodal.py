"""Tuning of models with multimodal positions (Qwen2-VL): what is measured of a sample is the oracle's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_families import handed_over
from tiny_families import END_TOKEN, family_inputs, shared_family, tiny_family
from tiny_models import (
    LAYERS,
    NEVER,
    gate,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
)

import vte_compile
from vte_compile import Oracle, Plan, SkippedAttention, StaticExit
from vte_compile.adapters import PIA
from vte_compile.errors import UnsupportedModelError
from vte_compile.tuning.adapted_model import AdaptedModel
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.baselines import AttentionPruning, ReducingOracle
from vte_compile.tuning.deletions import Deleter
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.modality_attention import measure_attention
from vte_compile.tuning.random_layer import labelled_row
from vte_compile.tuning.samples import Sample

NAME, ANSWER = "qwen2_5_vl", (7, 3, 11, 5)
MODEL = shared_family(NAME)
INPUTS = family_inputs(NAME, [2], seed=1)
SAMPLE = Sample.of(INPUTS, ANSWER, "sample")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


def answer_logits(planned: Plan) -> torch.Tensor:
    """The oracle's, [A, vocabulary]: the prompt, and then the answer's tokens counted on from it."""
    oracle = Oracle(MODEL, planned)
    prompt = oracle.forward(**handed_over(NAME, INPUTS))
    said = MODEL.get_input_embeddings()(torch.tensor([ANSWER[:-1]])).detach()
    return torch.cat([prompt.logits[0, -1:], oracle.forward(said, cache=prompt.cache).logits[0]])


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, torch.tensor(ANSWER))


def test_positions_are_the_models_and_the_answers_behind_them() -> None:
    answered = embed_answered(MODEL, Examiner(MODEL).spec, SAMPLE)
    positions = handed_over(NAME, INPUTS)["position_ids"]
    assert torch.equal(answered.positions[..., : answered.prompt], positions)
    ends = answered.positions[:, 0, answered.prompt :] - positions.max()
    assert ends.tolist() == [[1, 2, 3]] * 3
    assert int(positions.max()) < answered.prompt - 1  # an image takes fewer numbers than tokens


def test_exits_equal_the_oracles() -> None:
    examined = Examiner(MODEL).examine(SAMPLE)
    watching = Oracle(MODEL, plan(*[gate(layer, NEVER) for layer in range(LAYERS)]))
    features = watching.forward(**handed_over(NAME, INPUTS)).gate_features
    logits = [answer_logits(each) for each in (*(plan(StaticExit(k)) for k in range(LAYERS)), Plan())]
    for k in range(LAYERS):
        close(examined.features[0, k], features[k][0])
        assert examined.same[0, k] == (logits[k].argmax(-1) == logits[-1].argmax(-1)).float().mean()
    close(examined.loss[0], torch.stack([loss_of(each) for each in logits]))


def test_deletions_equal_the_oracles() -> None:
    deleter = Deleter(MODEL)
    losses, _, full = deleter.effects(embed_answered(MODEL, deleter.examiner.spec, SAMPLE), (2,), (0, 1))
    close(losses, torch.stack([loss_of(answer_logits(plan(SkippedAttention(k), SkippedAttention(2)))) for k in (0, 1)]))
    assert full == pytest.approx(float(loss_of(answer_logits(Plan()))), rel=5e-5)


def test_adapters_are_trained_on_the_oracles_loss() -> None:
    """Of a batch of two samples of different lengths."""
    adapter = random_adapter(PIA, 1)
    model = AdaptedModel(Examiner(MODEL), {1: adapter}, {}, [1])
    other = Sample.of(family_inputs(NAME, [1], seed=2), (9, 4), "other")
    loss = model(**model.collate([SAMPLE, other]))["loss"]
    of_other = model(**model.collate([other]))["loss"]
    close(loss, (loss_of(answer_logits(plan(SkippedAttention(1, adapter)))) + of_other) / 2)


def test_attention_is_seen() -> None:
    examiner = Examiner(MODEL)
    shares = measure_attention(examiner, embed_answered(MODEL, examiner.spec, SAMPLE))
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares.sum(-1)))


def test_a_reduction_of_nothing_is_the_model() -> None:
    examiner = Examiner(MODEL)
    prompt = embed_answered(MODEL, examiner.spec, Sample.of(INPUTS, (0,), "prompt"))
    oracle = ReducingOracle(MODEL, AttentionPruning(1, 1.0))
    found = oracle.generate(prompt.embeds, prompt.visual[None], position_ids=prompt.positions, max_new_tokens=8)
    want = MODEL.generate(**INPUTS, do_sample=False, max_new_tokens=8)
    assert found.tokens[0] == want[0, INPUTS["input_ids"].shape[1] :].tolist()


def test_one_layer_at_a_time_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="counts positions as of text"):
        labelled_row(Examiner(MODEL), SAMPLE, 1)


@pytest.mark.slow
def test_calibrated(tmp_path: Path) -> None:
    """From a processor's outputs to a plan that generate() runs with."""
    model = tiny_family(NAME)
    calm = END_TOKEN - 20  # ids below it have large embeddings, so that what images add changes few answers
    with torch.no_grad():
        model.get_input_embeddings().weight[:calm] *= 100
    prompts = [family_inputs(NAME, [1], seed=seed) for seed in range(150)]
    settings = {"max_disagreement": 0.3, "delta": 0.2, "width": 8, "epochs": 10, "slack": 1.0, "max_new_tokens": 1}
    planned = vte_compile.calibrate(model, prompts, work=tmp_path / "work", **settings)
    assert planned.exits
    out = vte_compile.optimize(model, planned, compile=False).generate(**INPUTS, do_sample=False, max_new_tokens=4)
    embeds = embed_answered(model, Examiner(model).spec, Sample.of(INPUTS, (0,), "prompt")).embeds
    want = Oracle(model, planned).forward(**handed_over(NAME, INPUTS) | {"inputs_embeds": embeds})
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
