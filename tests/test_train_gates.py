"""The script that trains the demo's exit gates: its labels and features are the oracle's, its thresholds optimal."""

import hashlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vte_compile import GateExit, Oracle, Plan, StaticExit, optimize
from vte_compile.oracle import embed

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "vte_compile" / "demo" / "assets"
MODULES = ("scenes", "model", "train_gates")
NEVER = 1e9


@pytest.fixture
def example(monkeypatch):
    """The example's modules, importable under their bare names for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    loaded = SimpleNamespace(**{name: __import__(name) for name in MODULES})
    yield loaded
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def small(example):
    """A model with random weights, its processor, and two scenes of noise with questions."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = example.scenes.Photos([rng.integers(30, 250, (5, 24, 24), np.uint8) for _ in range(6)])
    scenes = []
    for _ in range(2):
        scene = example.scenes.draw_scene(photos, rng)
        scenes.append((Image.fromarray(scene.image), example.scenes.draw_questions(scene, 5, rng)))
    model = example.model.build_model(layers=4, hidden=32, vision_hidden=32).eval()
    for name, parameter in model.named_parameters():  # larger weights, so that exits change some answers
        if parameter.ndim == 2 and "language_model.layers" in name:
            parameter.data.mul_(4)
    return SimpleNamespace(model=model, processor=example.model.build_processor(), scenes=scenes)


def embed_question(small, image, question, answer):
    """Embeddings and visual mask of one question with the answer's tokens behind it, by the processor."""
    prompt = small.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = small.processor(images=image, text=prompt, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    return embed(small.model, ids, inputs["pixel_values"])


def test_labels_and_features_are_the_oracles(example, small):
    gates = example.train_gates
    examined = gates.examine_scenes(small.model, small.processor, small.scenes, own_answers=False)
    asked = [(image, q, gates.answer_truly(small.processor, [q])[0]) for image, qs in small.scenes for q in qs]
    assert examined.features.shape == (3, len(asked), 64)
    assert examined.same.shape == (3, len(asked))
    assert examined.loss.shape == (4, len(asked))
    watch = Plan([GateExit(k, torch.ones(1, 64), torch.ones(2, 1), NEVER) for k in range(3)])
    for n, (image, question, answer) in enumerate(asked):
        prompt = Oracle(small.model, watch).forward(*embed_question(small, image, question.question, []))
        for k in range(3):
            torch.testing.assert_close(examined.features[k, n], prompt.gate_features[k][0], rtol=1e-4, atol=1e-4)

        inputs, target = embed_question(small, image, question.question, answer[:-1]), torch.tensor(answer)
        plans = [Plan([StaticExit(k)]) for k in range(3)] + [Plan()]
        logits = [Oracle(small.model, plan).forward(*inputs).logits[0, -len(answer) :] for plan in plans]
        for k in range(4):
            expected = F.cross_entropy(logits[k], target)
            torch.testing.assert_close(examined.loss[k, n], expected, rtol=1e-3, atol=1e-4)
        for k in range(3):
            expected = (logits[k].argmax(-1) == logits[3].argmax(-1)).float().mean()
            torch.testing.assert_close(examined.same[k, n], expected)
    assert 0 < examined.unchanged.float().mean() < 1  # both kinds of question were looked at


def test_label_is_the_papers(example):
    examined = example.train_gates.Examined(
        features=torch.zeros(1, 4, 2),
        same=torch.tensor([[1.0, 1.0, 0.5, 1.0]]),
        loss=torch.tensor([[1.02, 1.04, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]]),
    )
    assert examined.may_exit(slack=0).tolist() == [[True, False, False, True]]
    assert examined.may_exit(slack=0.02).tolist() == [[True, True, False, True]]


@pytest.mark.slow
def test_unchanged_means_that_generate_gives_the_same_answer(example):
    """With the model's own answers: what the thresholds are chosen by is what the optimized model does."""
    gates = example.train_gates
    model = LlavaForConditionalGeneration.from_pretrained(ASSETS / "model", local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(ASSETS / "model", local_files_only=True)
    entries = json.loads((ASSETS / "test" / "questions.json").read_text())[4:16]
    scenes = []
    for name, group in itertools.groupby(entries, key=lambda entry: entry["image"]):
        questions = [example.scenes.Question(e["type"], e["question"], e["answer"]) for e in group]
        scenes.append((Image.open(ASSETS / "test" / name).convert("RGB"), questions))
    asked = [(image, q.question) for image, questions in scenes for q in questions]
    full, never = gates.generate(model, processor, asked)
    assert never == [-1] * len(asked)
    examined = gates.examine_scenes(model, processor, scenes, own_answers=True)
    fast = optimize(model, Plan(), compile=False)
    for k in (3, 5):
        answers, exits = gates.generate(optimize(fast, Plan([StaticExit(k)])), processor, asked)
        assert exits == [k] * len(asked)
        assert examined.unchanged[k].tolist() == [a == b for a, b in zip(answers, full, strict=True)]
    assert 0 < examined.unchanged.float().mean() < 1


def test_a_second_run_starts_from_the_cache(example, small, monkeypatch, tmp_path):
    gates = example.train_gates
    monkeypatch.setattr(gates, "SHARD", 1)
    shards = [tmp_path / f"{i}.safetensors" for i in range(2)]
    first = gates.collect(small.model, small.processor, iter(small.scenes), shards, own_answers=False)
    shards[1].unlink()
    examine, seen = gates.examine_scenes, []

    def counted(model, processor, scenes, own_answers):
        seen.extend(scenes)
        return examine(model, processor, scenes, own_answers)

    monkeypatch.setattr(gates, "examine_scenes", counted)
    again = gates.collect(small.model, small.processor, iter(small.scenes), shards, own_answers=False)
    assert seen == small.scenes[1:]
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name))
    assert sorted(tmp_path.iterdir()) == shards


def test_gates_learn_and_score_as_the_plan_does(example, small):
    gates = example.train_gates
    generator = torch.Generator().manual_seed(0)
    # Features of very different sizes; one direction of each gate's decides.
    features = torch.randn(2, 2000, 64, generator=generator) * torch.logspace(-3, 2, 64)
    labels = torch.stack([features[0, :, 0] > 0, features[1, :, 63] > 0])
    recipe = gates.Recipe(width=16, epochs=20, seed=1, batch=100)
    w1, w2 = gates.train_gates(features, labels, recipe)
    scores = gates.scores_of(features, w1, w2)
    assert ((scores > 0) == labels).float().mean() > 0.97
    for once_more, weight in zip(gates.train_gates(features, labels, recipe), (w1, w2), strict=True):
        assert torch.equal(once_more, weight)

    plan = gates.build_plan(small.model, w1, w2, NEVER)
    assert [(exit_.layer, exit_.threshold) for exit_ in plan.exits] == [(0, NEVER), (1, NEVER)]
    image, questions = small.scenes[0]
    output = Oracle(small.model, plan).forward(*embed_question(small, image, questions[0].question, []))
    z = output.gate_logits[1][0]
    score = gates.scores_of(output.gate_features[1][0][None, None], w1[1:], w2[1:])
    torch.testing.assert_close(score[0, 0], z[1] - z[0], rtol=1e-4, atol=1e-4)


def outcome_by_hand(scores, unchanged, threshold):
    """(agreement, mean cost), sample by sample."""
    gates = len(scores)
    exits = [next((g for g in range(gates) if row[g] > threshold), gates) for row in scores.T]
    kept = [g == gates or bool(unchanged[g, n]) for n, g in enumerate(exits)]
    return sum(kept) / len(kept), sum(g + 1 for g in exits) / len(exits)


@pytest.mark.parametrize("seed", range(5))
def test_threshold_holds_the_target_at_the_least_cost(example, seed):
    gates = example.train_gates
    generator = torch.Generator().manual_seed(seed)
    unchanged = torch.rand(3, 60, generator=generator) < torch.tensor([[0.3], [0.5], [0.7]])
    scores = torch.randn(3, 60, generator=generator) + 2 * unchanged
    found = gates.choose_threshold(scores, unchanged, target=0.9)
    agreement, cost = outcome_by_hand(scores, unchanged, found.threshold)
    assert agreement == pytest.approx(found.agreement)
    assert cost == pytest.approx(found.mean_cost)
    assert agreement >= 0.9
    others = [outcome_by_hand(scores, unchanged, t) for t in scores.flatten().tolist()]
    assert cost <= min(other_cost for other, other_cost in others if other >= 0.9) + 0.05
    assert gates.choose_threshold(scores, unchanged, target=1.0).agreement == 1.0


def test_outcome_counts_layers_that_saw_the_image(example):
    scores = torch.tensor([[1.0, -1.0, -1.0, 0.0], [1.0, 1.0, -1.0, -1.0]])
    unchanged = torch.tensor([[True, True, True, True], [False, False, False, False]])
    found = example.train_gates.outcome(scores, unchanged, 0.0)
    assert (found.agreement, found.mean_cost) == (0.75, (1 + 2 + 3 + 3) / 4)


def test_shipped_plan_is_for_the_shipped_model():
    plan = Plan.from_pretrained(ASSETS / "plan")
    plan.check(LlavaForConditionalGeneration.from_pretrained(ASSETS / "model", local_files_only=True))
    metrics = json.loads((ASSETS / "plan" / "metrics.json").read_text())
    assert metrics["model_sha256"] == hashlib.sha256((ASSETS / "model" / "model.safetensors").read_bytes()).hexdigest()
    learned = metrics["test"]["learned"]
    assert learned["agreement"] >= 0.98
    assert learned["mean_cost"] < metrics["static_cost_of_same_agreement"]
