"""Evaluation of plans: agreement, accuracy and FLOPs against baselines, intervals, resuming, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import (
    LAYERS,
    NEVER,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny_llava,
)

from vte_compile import Plan, StaticExit, optimize
from vte_compile.errors import InputError
from vte_compile.flops import decode_flops, gate_flops, kv_bytes, prefill_flops
from vte_compile.oracle import Oracle, embed
from vte_compile.plan import SkippedAttention
from vte_compile.tuning import evaluate as module
from vte_compile.tuning.answers import Answer, Answers
from vte_compile.tuning.bootstrap import bootstrap
from vte_compile.tuning.evaluate import ATTENTION, FULL, ORACLE, RANDOM, STATIC, evaluate
from vte_compile.tuning.samples import Sample

TOKENS = 4
SAMPLES = 8


@pytest.fixture(scope="module")
def model():
    """Its answers end at length, or at token 11."""
    model = tiny_llava()
    model.generation_config.eos_token_id = 11
    return model


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, Plan(), compile=False)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch, model, fast):
    """What is traced of this model is shared by all tests."""
    monkeypatch.setattr(
        module, "optimize", lambda given, plan, **options: optimize(fast if given is model else given, plan)
    )


def batches(answer=None):
    """One row each, as a processor gives it, some with two images."""
    made = []
    for seed in range(SAMPLES):
        ids, pixels, mask = image_prompt("titittt" if seed % 3 == 0 else "tittttt", seed=seed)
        made.append(Sample.of({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}, answer, f"s{seed}"))
    return made


def full_answers(model, samples):
    outputs = [model.generate(**s.inputs, do_sample=False, max_new_tokens=TOKENS) for s in samples]
    return [output[0, s.inputs["input_ids"].shape[1] :] for output, s in zip(outputs, samples, strict=True)]


@pytest.fixture(scope="module")
def evaluation(model, fast):
    """A plan that some samples leave, its double that never fires, and all baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "optimize", lambda given, plan, **options: optimize(fast if given is model else given, plan)
        )
        plans = {"learned": plan(gate(0), gate(1), gate(2)), "never": plan(gate(1, NEVER))}
        return evaluate(model, batches((7, 11)), plans, max_new_tokens=TOKENS)


def test_a_plan_that_never_fires_agrees(evaluation):
    never = evaluation["never"].measures
    assert (never["agreement"].value, never["agreement"].low, never["cost"].value) == (1.0, 1.0, LAYERS)
    assert evaluation["never"].exit_layers[-1] == SAMPLES
    extra = never["prefill_flops"].value - evaluation[FULL].measures["prefill_flops"].value
    assert extra == gate_flops(plan(gate(1)), -1)


def test_a_plan_is_measured_as_the_oracle_runs_it(evaluation, model):
    """Agreement, exit layers, FLOPs and bytes of each sample, by other code."""
    learned = plan(gate(0), gate(1), gate(2))
    oracle, rows = Oracle(model, learned), []
    samples = batches()
    for sample, expected in zip(samples, full_answers(model, samples), strict=True):
        embeds, visual = embed(model, **sample.inputs)
        found = oracle.generate(embeds, visual, max_new_tokens=TOKENS, eos_token_id=11)
        layer, sizes = int(found.exit_layer), (embeds.shape[1], int(visual.sum()))
        prefill = prefill_flops(model.config, *sizes, layer, learned)
        decode = decode_flops(model.config, *sizes, layer, len(expected) - 1, learned)
        size = kv_bytes(model.config, *sizes, layer, torch.float32, learned)
        rows.append((found.tokens[0] == expected.tolist(), prefill, prefill + decode, size, layer))
    means = np.mean(rows, 0)
    measures = evaluation["learned"].measures
    names = ("agreement", "prefill_flops", "total_flops", "kv_bytes")
    assert [measures[name].value for name in names] == pytest.approx(means[:4])
    assert 0 < measures["agreement"].value < 1  # or this would show little
    layers = [row[4] for row in rows]
    assert evaluation["learned"].exit_layers == {k: layers.count(k) for k in (*range(LAYERS), -1)}
    assert measures["cost"].value == np.mean([LAYERS if k < 0 else k + 1 for k in layers])


def test_baselines_keep_the_budget(evaluation):
    budget = evaluation["learned"].measures["total_flops"].value
    for name in (STATIC, RANDOM, ATTENTION):
        found = evaluation[name]
        assert found.measures["total_flops"].value <= budget
        assert found.differences["total_flops"].high <= evaluation["learned"].measures["total_flops"].high
    assert evaluation[RANDOM].share == evaluation[ATTENTION].share > 0
    assert evaluation[RANDOM].measures["kv_bytes"] == evaluation[ATTENTION].measures["kv_bytes"]
    layer = evaluation[STATIC].layer
    assert evaluation.static_exits[layer].total_flops <= budget < evaluation.static_exits[layer + 1].total_flops


def test_static_exits_from_one_pass_are_those_that_run(evaluation, model):
    points = evaluation.static_exits
    samples = batches()
    expected = [row.tolist() for row in full_answers(model, samples)]
    for point in points[:-1]:
        oracle = Oracle(model, Plan([StaticExit(point.layer)]))
        prompts = [embed(model, **sample.inputs) for sample in samples]
        answers = [oracle.generate(*p, max_new_tokens=TOKENS, eos_token_id=11).tokens[0] for p in prompts]
        assert point.agreement == np.mean([a == b for a, b in zip(answers, expected, strict=True)])
    assert points[-1].agreement == 1
    assert points[-1].total_flops == evaluation[FULL].measures["total_flops"].value
    static = evaluation[STATIC]
    assert static.measures["agreement"].value == points[static.layer].agreement
    assert static.measures["total_flops"].value == points[static.layer].total_flops


def test_the_oracle_exit_agrees_and_is_the_earliest(evaluation, model):
    found = evaluation[ORACLE]
    assert found.measures["agreement"].value == 1
    assert found.measures["total_flops"].value < evaluation[FULL].measures["total_flops"].value
    samples, layers = batches(), []
    for sample, expected in zip(samples, full_answers(model, samples), strict=True):
        prompt = embed(model, **sample.inputs)
        same = [
            Oracle(model, Plan([StaticExit(k)])).generate(*prompt, max_new_tokens=TOKENS, eos_token_id=11).tokens[0]
            == expected.tolist()
            for k in range(LAYERS - 1)
        ]
        layers.append(next((k for k in range(LAYERS - 1) if all(same[k:])), -1))
    assert found.exit_layers == {k: layers.count(k) for k in (*range(LAYERS), -1)}


def test_differences_are_paired(evaluation):
    for case in evaluation.configurations:
        for name, difference in case.differences.items():
            own = case.measures[name].value - evaluation["learned"].measures[name].value
            assert difference.value == pytest.approx(own)
            assert difference.low <= difference.value <= difference.high
    zero = evaluation["learned"].differences["agreement"]
    assert (zero.low, zero.high) == (0, 0)


def test_accuracy_compares_with_the_samples_answers(model):
    """With half of the answers right, and one sample without: end tokens do not matter."""
    samples = batches()
    said = [row.tolist() for row in full_answers(model, samples)]
    right = [Sample.of(s.inputs, [*said[i], 11] if i % 2 else (5, 5), s.name) for i, s in enumerate(samples)]
    right[0] = samples[0]
    found = evaluate(model, right, {"never": plan(gate(1, NEVER))}, baselines=False, max_new_tokens=TOKENS)
    assert found.answered == SAMPLES - 1
    assert found["never"].measures["accuracy"].value == pytest.approx(4 / 7)
    assert [c.name for c in found.configurations] == [FULL, "never"]
    assert found.static_exits == ()
    without = evaluate(model, samples, {"never": plan(gate(1, NEVER))}, baselines=False, max_new_tokens=TOKENS)
    assert "accuracy" not in without[FULL].measures


def test_the_generation_config_does_not_matter(model, monkeypatch):
    """All answers are the argmax, with token reductions as with generate()."""
    samples = batches()
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    found = evaluate(model, samples, {"learned": plan(gate(2))}, max_new_tokens=TOKENS)
    again = evaluate(model, samples, {"all": plan(gate(1, NEVER))}, max_new_tokens=TOKENS)
    assert found.samples == SAMPLES
    # The budget of a plan without exits lets all tokens stay.
    assert again[RANDOM].share == again[ATTENTION].share == 1
    assert again[RANDOM].measures["agreement"].value == again[ATTENTION].measures["agreement"].value == 1


def test_skips_count(model):
    found = evaluate(model, batches(), {"skip": plan(SkippedAttention(1))}, baselines=False, max_new_tokens=TOKENS)
    ratio = found["skip"].measures["kv_bytes"].value / found[FULL].measures["kv_bytes"].value
    assert ratio == (LAYERS - 1) / LAYERS


def test_a_budget_that_no_baseline_keeps(model, caplog):
    """Skips save more than any exit could; the oracle has no budget."""
    skips = plan(StaticExit(0), *(SkippedAttention(k) for k in range(LAYERS)))
    found = evaluate(model, batches(), {"skips": skips}, max_new_tokens=TOKENS)
    assert [case.name for case in found.configurations] == [FULL, "skips", ORACLE]
    assert "no baseline" in caplog.text


def test_an_interrupted_run_goes_on(model, evaluation, tmp_path, monkeypatch):
    plans = {"learned": plan(gate(0), gate(1), gate(2)), "never": plan(gate(1, NEVER))}
    answered = []
    generate, reduced = module._Evaluator._generate, module._Evaluator._reduced

    def counted(function, limit):
        def answer(self, *arguments):
            answered.append(arguments)
            if len(answered) > limit:
                raise KeyboardInterrupt
            return function(self, *arguments)

        return answer

    def run(limit):
        answered.clear()
        monkeypatch.setattr(module._Evaluator, "_generate", counted(generate, limit))
        monkeypatch.setattr(module._Evaluator, "_reduced", counted(reduced, limit))
        return evaluate(model, batches((7, 11)), plans, max_new_tokens=TOKENS, folder=tmp_path)

    done = 0
    for limit in (5, 22, 13):  # in the first sample, in the last ones of the first pass, among the baselines
        with pytest.raises(KeyboardInterrupt):
            run(limit)
        done += limit
    assert run(1000) == evaluation
    assert len(answered) == SAMPLES * 6 - done
    assert run(0) == evaluation


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    evaluate(model, batches(), {"never": plan(gate(1, NEVER))}, baselines=False, max_new_tokens=1, folder=tmp_path)
    other = tiny_llava()
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(InputError, match="another model"):
        evaluate(other, batches(), {"never": Plan()}, folder=tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 2, "configuration": {"a": 1}, "answers": {}}', None], ids=str
)
def test_damaged_answers(content, tmp_path):
    answers = Answers(tmp_path, {"a": 1})
    answers.add("k", Answer((1, 2), 0))
    answers.flush()
    assert dict(Answers(tmp_path, {"a": 1})) == {"k": Answer((1, 2), 0)}
    assert not Answers(tmp_path, {"a": 2})
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("2]", '"x"]') if content is None else content)
    with pytest.raises(InputError, match="start anew"):
        Answers(tmp_path, {"a": 1})


def test_a_full_disk_says_what_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("vte_compile.tuning.answers.write_atomically", full)
    answers = Answers(tmp_path, {})
    answers.add("k", Answer((1,)))
    with pytest.raises(InputError, match=r"No space left.*the last 1 answers are lost"):
        answers.flush()


def test_bad_arguments(model):
    def refused(message, samples=(), plans=None, **options):
        with pytest.raises(InputError, match=message):
            evaluate(model, samples, {"p": Plan()} if plans is None else plans, **options)

    refused("plans: there are none", plans={})
    refused("'FastV' is what a baseline", plans={ATTENTION: Plan()})
    refused("match='q'", match="q")
    refused("max_new_tokens", max_new_tokens=0)
    refused("there are none", samples=[])
    text = Sample.of({"input_ids": torch.tensor([[5, 6, 7]])}, None, "the third")
    refused("the third: has no visual token", samples=[text], baselines=False)


def test_samples_that_change(model, monkeypatch):
    class Drawn(list):
        def __iter__(self):
            self.turn = getattr(self, "turn", 0) + 1
            ids, pixels, mask = image_prompt("tittt", seed=self.turn)
            yield Sample.of({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}, None)

    with pytest.raises(InputError, match="not the same"):
        evaluate(model, Drawn([None]), {"never": plan(gate(1, NEVER))}, max_new_tokens=1)


def test_a_stream_is_read_once(model):
    found = evaluate(model, iter(batches()[:2]), {"never": plan(gate(1, NEVER))}, max_new_tokens=1)
    assert found.samples == 2


def test_json_and_table(evaluation):
    from rich.console import Console

    content = json.loads(evaluation.to_json())
    assert content["matched"] == "learned"
    names = [case["name"] for case in content["configurations"]]
    assert names == [FULL, "learned", "never", STATIC, RANDOM, ATTENTION, ORACLE]
    assert set(content["configurations"][1]["measures"]["agreement"]) == {"value", "low", "high"}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation)
    shown = console.export_text()
    assert all(name in shown for name in names)
    assert "right" in shown
    console.print(replace(evaluation, answered=0))
    assert "right" not in console.export_text()


def test_plot(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from vte_compile.tuning.evaluation_plot import draw_evaluation

    file = tmp_path / "new" / "plot.png"
    draw_evaluation(evaluation, file)
    assert min(Image.open(file).size) > 500


# ---------------------------------------------------------------- bootstrap


def test_intervals_cover():
    """Of 400 draws of 200 samples about 95% of the intervals hold the mean they are drawn with."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(200, 400, generator=generator) < 0.8).double()
    found = bootstrap(draws, seed=0, resamples=1000)
    covered = sum(interval.low <= 0.8 <= interval.high for interval in found) / 400
    assert 0.91 <= covered <= 0.98
    assert found[0].value == draws[:, 0].mean().item()


def test_intervals_are_those_of_a_loop():
    values = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    means = []
    rng = np.random.default_rng(0)
    for _ in range(4000):
        means.append(values.numpy()[rng.integers(0, 30, 30)].mean(0))
    for column, interval in enumerate(bootstrap(values, seed=5, resamples=4000, confidence=0.9)):
        expected = np.quantile([mean[column] for mean in means], [0.05, 0.95])
        assert [interval.low, interval.high] == pytest.approx(expected, abs=0.01)


def test_intervals_are_the_same_in_chunks(monkeypatch):
    values = torch.rand(50, 3)
    whole = bootstrap(values, seed=2, resamples=100)
    assert bootstrap(values, seed=2, resamples=100) == whole != bootstrap(values, seed=3, resamples=100)
    monkeypatch.setattr("vte_compile.tuning.bootstrap._CHUNK", 1)
    assert len(bootstrap(values, seed=2, resamples=100)) == 3


def test_bad_bootstraps():
    for values, options in ((torch.zeros(0, 2), {}), (torch.zeros(3), {}), (torch.zeros(2, 1), {"resamples": 0})):
        with pytest.raises(InputError):
            bootstrap(values, 0, **options)
