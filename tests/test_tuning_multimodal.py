"""Tuning of decoders that take more than embeddings and counted positions: what is measured is the oracle's.

Qwen2.5-VL has multimodal positions, Qwen3-VL features behind layers too; tokens of PaliGemma and Gemma3 attend to later
ones, every other layer of Gemma3 has a sliding window and rotary positions of its own, and PaliGemma 2 has such windows
and caps scores and logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from marks import thorough
from test_families import NO_ADAPTERS, handed_over
from test_tuning_modality_attention import naive
from tiny_families import END_TOKEN, PREFIX, family_inputs, shared_family, tiny_family
from tiny_models import (
    LAYERS,
    NEVER,
    assert_close,
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
from vte_compile.tuning.analyze import analyze
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.baselines import AttentionPruning, RandomDropping, ReducingOracle, _last_query_attention
from vte_compile.tuning.deletions import Deleter
from vte_compile.tuning.evaluate import evaluate
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.modality_attention import key_groups, measure_attention, query_groups, uniform_shares
from vte_compile.tuning.random_layer import labelled_row
from vte_compile.tuning.samples import Sample

NAMES = ("qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "paligemma2")
ADAPTABLE = tuple(name for name in NAMES if name not in NO_ADAPTERS)
ANSWER = (7, 3, 11, 5)
INPUTS = {name: family_inputs(name, [2], seed=1) for name in NAMES}


def sample(name: str) -> Sample:
    return Sample.of(INPUTS[name], ANSWER, "sample")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


def answer_logits(name: str, planned: Plan) -> torch.Tensor:
    """The oracle's, [A, vocabulary]: the prompt, and then the answer's tokens counted on from it."""
    model = shared_family(name)
    oracle = Oracle(model, planned)
    prompt = oracle.forward(**handed_over(name, INPUTS[name]))
    said = model.get_input_embeddings()(torch.tensor([ANSWER[:-1]])).detach()
    return torch.cat([prompt.logits[0, -1:], oracle.forward(said, cache=prompt.cache).logits[0]])


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, torch.tensor(ANSWER))


def test_positions_are_the_models_and_the_answers_behind_them() -> None:
    name = "qwen2_5_vl"
    answered = embed_answered(shared_family(name), Examiner(shared_family(name)).spec, sample(name))
    positions = handed_over(name, INPUTS[name])["position_ids"]
    assert torch.equal(answered.positions[..., : answered.prompt], positions)
    ends = answered.positions[:, 0, answered.prompt :] - positions.max()
    assert ends.tolist() == [[1, 2, 3]] * 3
    assert int(positions.max()) < answered.prompt - 1  # an image takes fewer numbers than tokens


@pytest.mark.parametrize("name", NAMES)
def test_exits_equal_the_oracles(name: str) -> None:
    examined = Examiner(shared_family(name)).examine(sample(name))
    watching = Oracle(shared_family(name), plan(*[gate(layer, NEVER) for layer in range(LAYERS)]))
    features = watching.forward(**handed_over(name, INPUTS[name])).gate_features
    logits = [answer_logits(name, each) for each in (*(plan(StaticExit(k)) for k in range(LAYERS)), Plan())]
    for k in range(LAYERS):
        close(examined.features[0, k], features[k][0])
        assert examined.same[0, k] == (logits[k].argmax(-1) == logits[-1].argmax(-1)).float().mean()
    close(examined.loss[0], torch.stack([loss_of(each) for each in logits]))


@pytest.mark.parametrize("name", NAMES)
def test_deletions_equal_the_oracles(name: str) -> None:
    deleter = Deleter(shared_family(name))
    answered = embed_answered(shared_family(name), deleter.examiner.spec, sample(name))
    losses, _, full = deleter.effects(answered, (2,), (0, 1))
    deleted = [plan(SkippedAttention(k), SkippedAttention(2)) for k in (0, 1)]
    close(losses, torch.stack([loss_of(answer_logits(name, each)) for each in deleted]))
    assert full == pytest.approx(float(loss_of(answer_logits(name, Plan()))), rel=5e-5)


@pytest.mark.parametrize("name", ADAPTABLE)
def test_adapters_are_trained_on_the_oracles_loss(name: str) -> None:
    """Of a batch of two samples of different lengths."""
    adapter = random_adapter(PIA, 1)
    model = AdaptedModel(Examiner(shared_family(name)), {1: adapter}, {}, [1])
    other = Sample.of(family_inputs(name, [1], seed=2), (9, 4), "other")
    loss = model(**model.collate([sample(name), other]))["loss"]
    of_other = model(**model.collate([other]))["loss"]
    close(loss, (loss_of(answer_logits(name, plan(SkippedAttention(1, adapter)))) + of_other) / 2)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_blocks_that_cannot_be_taken_apart_have_no_adapters(name: str) -> None:
    """Gemma's later ones have four norms."""
    with pytest.raises(UnsupportedModelError, match=r"layer 1: .* not a block of pre-norm form; the plan's skips"):
        Oracle(shared_family(name), plan(SkippedAttention(1, random_adapter(PIA, 1))))


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_models_own(name: str) -> None:
    """Against the maps of the whole model, of prompt and answer."""
    examiner = Examiner(shared_family(name))
    answered = embed_answered(examiner.model, examiner.spec, sample(name))
    found = measure_attention(examiner, answered)
    eager, whole, behind = tiny_family(name), dict(INPUTS[name]), len(ANSWER) - 1
    eager.set_attn_implementation("eager")
    whole["input_ids"] = torch.cat([whole["input_ids"], torch.tensor([ANSWER[:-1]])], 1)
    # The answer is text to all of them; of PaliGemma, what is trained on.
    for key, value in {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": int(name in PREFIX)}.items():
        if key in whole:
            whole[key] = F.pad(whole[key], (0, behind), value=value)
    with torch.no_grad():
        maps = eager(**whole, output_attentions=True).attentions
    groups = [of(answered.visual, answered.prompt) for of in (query_groups, key_groups)]
    for layer, probabilities in enumerate(maps):
        assert_close(found[layer], naive(probabilities[0], *groups))
        seen = probabilities[0, 0] > 0
        uniform = naive((seen / seen.sum(-1, keepdim=True))[None], *groups)
        assert_close(uniform_shares(*groups, examiner.run(answered).seen(layer)), uniform)


def test_attention_of_the_last_query_in_a_window() -> None:
    """As if what left the window were not there."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 9, 8, generator=generator) for heads in (4, 2))
    for window in (1, 4, 9, 12):
        paid = _last_query_attention(query, key, 0.7, window)
        alone = _last_query_attention(query[:, -window:], key[:, -window:], 0.7, None)
        assert_close(paid, F.pad(alone, (9 - len(alone), 0)))


def test_attention_of_the_last_query_with_capped_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 9, 8, generator=generator) for heads in (4, 2))
    scores = 0.7 * query @ key.repeat_interleave(2, 0).mT
    paid = (0.5 * torch.tanh(scores / 0.5)).softmax(-1)[:, -1].mean(0)
    assert_close(_last_query_attention(query, key, 0.7, None, 0.5), paid)


@pytest.mark.parametrize("name", NAMES)
def test_reductions(name: str) -> None:
    """Of nothing: the model's own tokens. Of all visual tokens: those of an exit."""
    examiner = Examiner(shared_family(name))
    prompt = embed_answered(examiner.model, examiner.spec, Sample.of(INPUTS[name], (0,), "prompt"))
    given = prompt.oracle_inputs(examiner.spec)
    oracle = ReducingOracle(examiner.model, AttentionPruning(1, 1.0))
    want = examiner.model.generate(**INPUTS[name], do_sample=False, max_new_tokens=8)
    found = oracle.generate(**given, max_new_tokens=8)
    assert found.tokens[0] == want[0, INPUTS[name]["input_ids"].shape[1] :].tolist()
    for reduction in (RandomDropping(2, 0.0), AttentionPruning(0, 0.0)):
        found = oracle.with_reduction(reduction).generate(**given, max_new_tokens=8)
        left = Oracle(examiner.model, plan(StaticExit(reduction.layer)))
        assert found.tokens == left.generate(**given, max_new_tokens=8).tokens


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_at_a_time_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="counts positions as of text"):
        labelled_row(Examiner(shared_family(name)), sample(name), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", *map(thorough, NAMES[1:])])
def test_calibrated(name: str, tmp_path: Path) -> None:
    """From a processor's outputs to a plan that generate() runs with."""
    model, inputs = tiny_family(name), INPUTS[name]
    calm = END_TOKEN - 20  # ids below it have large embeddings, so that what images add changes few answers
    with torch.no_grad():
        model.get_input_embeddings().weight[:calm] *= 100
    prompts = [family_inputs(name, [1], seed=seed) for seed in range(150)]
    settings = {"max_disagreement": 0.3, "delta": 0.2, "width": 8, "epochs": 10, "slack": 1.0, "max_new_tokens": 1}
    planned = vte_compile.calibrate(model, prompts, work=tmp_path / "work", **settings)
    assert planned.exits
    out = vte_compile.optimize(model, planned, compile=False).generate(**inputs, do_sample=False, max_new_tokens=4)
    prompt = embed_answered(model, Examiner(model).spec, Sample.of(inputs, (0,), "prompt"))
    want = Oracle(model, planned).forward(**prompt.oracle_inputs(Examiner(model).spec))
    assert out.exit_layer.tolist() == want.exit_layer.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", *map(thorough, ("qwen3_vl", "paligemma", "paligemma2"))])
def test_evaluated_and_analyzed(name: str) -> None:
    """What one pass over a sample says of its exits is what generate() does with one."""
    model, prompts = tiny_family(name), [family_inputs(name, [1], seed=seed) for seed in range(6)]
    for parameter in model.get_input_embeddings().parameters():
        parameter.data *= 3  # so that some answers stay
    planned = {"plan": plan(StaticExit(1))}
    told = evaluate(model, prompts, planned, max_new_tokens=2, compile=False)
    agreement = told["plan"].measures["agreement"].value
    assert told.static_exits[1].agreement == pytest.approx(agreement)
    assert told["static exit"].layer == 1
    analysis = analyze(model, prompts, max_new_tokens=2, progress=False)
    assert analysis.deletions_refused is None
    assert analysis.layers[1].exit_agreement.value == pytest.approx(agreement)
