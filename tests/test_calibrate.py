"""calibrate(): from samples to a plan that generate() runs with, its promise, its report, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import logging
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_models import IMAGE, LAYERS, image_prompt, one_thread, tiny_llava  # noqa: F401

import vte_compile
from vte_compile import Plan, SkippedAttention, StaticExit, optimize
from vte_compile.errors import CalibrationError, InputError
from vte_compile.flops import prefill_flops
from vte_compile.tuning.costs import LayerCosts
from vte_compile.tuning.samples import read_samples
from vte_compile.tuning.splits import Divided
from vte_compile.tuning.store import collect

CALM = 30
"""Token ids below it: their embeddings are large, so that what attention adds does not change the answer."""


@functools.cache
def model():
    """A random LLaVA whose answers depend on the image unless the last token of the question is a calm one."""
    made = tiny_llava()
    made.generation_config.eos_token_id = None
    made.get_input_embeddings().weight.data[:CALM] *= 100
    made.get_output_embeddings().weight.data[IMAGE] = 0  # never the best
    return made


@functools.cache
def prompts(count: int, seed: int = 0):
    """Processor outputs of prompts with one image, half of which end with a calm token."""
    found = []
    for n in range(count):
        ids, pixels, real = image_prompt("ti" + "t" * (3 + n % 4), seed=1_000_000 * seed + n)
        ids = ids.where((ids == IMAGE) | (torch.arange(ids.shape[1]) == ids.shape[1] - 1), CALM + ids % CALM)
        found.append({"input_ids": ids, "pixel_values": pixels, "attention_mask": real})
    return found


SETTINGS = {"max_disagreement": 0.1, "delta": 0.1, "width": 16, "epochs": 20, "slack": 1.0, "max_new_tokens": 1}
"""That a small random model can meet."""


@pytest.fixture(scope="module")
def calibrate(tmp_path_factory):
    """A function that gives a plan and its report; what was examined once is not examined again."""
    work = tmp_path_factory.mktemp("work")

    def run(count: int = 400, **options):
        reports = []
        options = {"work": work, "report": reports.append, **SETTINGS, **options}
        return vte_compile.calibrate(model(), prompts(count), **options), reports[0]

    return run


@pytest.fixture(scope="module")
def calibrated(calibrate):
    return calibrate()


def certified_prompts(count: int = 400):
    """The prompts that the guarantee was tested on."""
    divided = Divided(read_samples(prompts(count), model().config), 0)
    return [prompt for prompt, _ in zip(prompts(count), divided, strict=True) if divided.parts[-1] == "certification"]


def test_the_plan_does_to_generate_what_the_report_says(calibrated) -> None:
    plan, report = calibrated
    assert plan.fingerprint is not None
    plan.check(model())
    assert [exit_.layer for exit_ in plan.exits] == [row.layer for row in report.layers if row.threshold is not None]
    fast = optimize(model(), plan, compile=False)
    exits, changed = [], []
    for prompt in certified_prompts():
        full, found = (m.generate(**prompt, do_sample=False, max_new_tokens=1) for m in (model(), fast))
        exits.append(int(found.exit_layer[0]))
        changed.append(not torch.equal(full, found))
    assert len(exits) == report.samples["certification"] == report.certificate.samples
    for row in report.layers:
        assert row.exits == pytest.approx(exits.count(row.layer) / len(exits))
        assert row.changed == sum(c for c, layer in zip(changed, exits, strict=True) if layer == row.layer)
    assert sum(changed) == report.certificate.changed
    assert report.certificate.upper_bound <= 0.1
    assert 0 < exits.count(-1) < len(exits)
    costs = [prefill_flops(model().config, p["input_ids"].shape[1], 4, e, plan) for p, e in
             zip(certified_prompts(), exits, strict=True)]  # fmt: skip
    assert report.certificate.expected_cost == pytest.approx(sum(costs) / len(costs))
    assert report.speedup > 1.05


def test_exits_on_top_of_skips_are_compared_with_the_model_without_both(calibrate, tmp_path) -> None:
    base = Plan(skips=[SkippedAttention(2)])
    options = {"base": base, "work": tmp_path, "max_disagreement": 0.5}
    plan, report = calibrate(**options)
    assert plan.skips == base.skips
    assert plan.exits
    fast = optimize(model(), plan, compile=False)
    changed, stayed, costs = 0, 0, []
    for prompt in certified_prompts():
        full, found = (m.generate(**prompt, do_sample=False, max_new_tokens=1) for m in (model(), fast))
        differs, exit_layer = not torch.equal(full, found), int(found.exit_layer[0])
        changed += differs
        stayed += differs and exit_layer < 0
        costs.append(prefill_flops(model().config, prompt["input_ids"].shape[1], 4, exit_layer, plan))
    assert report.certificate.changed == changed
    assert changed - sum(row.changed for row in report.layers) == stayed > 0
    assert report.certificate.expected_cost == pytest.approx(sum(costs) / len(costs))
    with pytest.raises(InputError, match="base differ"):
        calibrate(work=tmp_path)


def test_the_promise_holds_on_fresh_prompts(calibrated) -> None:
    fast = optimize(model(), calibrated[0], compile=False)
    changed = 0
    for prompt in prompts(300, seed=1):
        full, found = (m.generate(**prompt, do_sample=False, max_new_tokens=1) for m in (model(), fast))
        changed += not torch.equal(full, found)
    assert changed / 300 <= 0.1 + 3 * (0.1 * 0.9 / 300) ** 0.5  # up to the noise of so few


def test_a_seed_repeats(calibrate, calibrated) -> None:
    (plan, report), (again, repeated) = calibrated, calibrate()
    assert report == repeated
    for first, second in zip(plan.exits, again.exits, strict=True):
        assert (first.layer, first.threshold) == (second.layer, second.threshold)
        assert torch.equal(first.w1, second.w1)
        assert torch.equal(first.w2, second.w2)
    other = calibrate(seed=1)[1]
    assert other.samples != report.samples


def test_the_report_as_data_and_as_tables(calibrate) -> None:
    report = calibrate(max_disagreement=0.12, widths=[2, 8])[1]
    content = json.loads(report.to_json())
    assert set(content) == {"samples", "settings", "layers", "certificate", "cost_unit", "widths", "speedup"}
    assert len(content["layers"]) == LAYERS - 1
    assert content["certificate"]["thresholds"] == [row["threshold"] for row in content["layers"]]
    assert [row["width"] for row in content["widths"]] == [2, 8]
    assert content["settings"]["width"] == 16
    assert sum(content["samples"].values()) == 400
    console = Console(width=100, file=io.StringIO())
    console.print(report)
    shown = console.file.getvalue()
    for text in ("Samples: ", "never", "Gates of other widths", "P(an answer differs) <= 12.00%", "FLOPs"):
        assert text in shown
    assert report.never == pytest.approx(1 - sum(row.exits for row in report.layers))


def test_a_target_speedup_and_costs_of_ones_own(calibrate) -> None:
    # Leaving after layer 1 costs as much as never: no gate pays there.
    plan, report = calibrate(target_speedup=1.3, costs=LayerCosts([1.0, 4.0, 3.0, 4.0], gate=0.0))
    assert 1 not in [exit_.layer for exit_ in plan.exits]
    assert report.cost_unit == "as given"
    assert report.speedup == pytest.approx(1.3, abs=0.15)
    assert report.certificate.max_disagreement == report.certificate.upper_bound
    with pytest.raises(CalibrationError, match=r"out of reach.*\(Of the samples, \d+ for train"):
        calibrate(target_speedup=50.0)


def test_measured_costs(calibrate, monkeypatch) -> None:
    asked = []

    def measure(*arguments, **options):
        asked.append(options)
        return LayerCosts([0.1, 0.4, 0.4, 0.5], gate=0.01)

    monkeypatch.setattr("vte_compile.tuning.calibrate.measure_costs", measure)
    report = calibrate(costs="measured")[1]
    # Prompts of 8 to 11 tokens, of which 4 are visual.
    assert asked == [{"tokens": 10, "visual": 4, "width": 16, "base": None}]
    assert report.cost_unit == "seconds"
    assert report.certificate.full_cost == pytest.approx(0.5)


def test_the_papers_procedure(calibrate) -> None:
    plan, report = calibrate(120, target_speedup=1.05, procedure="random_layer")
    assert plan.exits
    assert report.settings["procedure"] == "random_layer"


def test_layers_where_no_sample_may_exit_are_no_candidates(calibrate, monkeypatch, caplog) -> None:
    def without_layer_0(*arguments, **options):
        examined = collect(*arguments, **options)
        return replace(examined, same=examined.same * torch.tensor([0.0] + [1.0] * (LAYERS - 1)))

    monkeypatch.setattr("vte_compile.tuning.calibrate.collect", without_layer_0)
    with caplog.at_level(logging.WARNING, logger="vte_compile"):
        plan, report = calibrate(target_speedup=1.02)
    assert "layer 0: all" in caplog.text
    assert plan.exits[0].layer > 0
    assert report.layers[0].may_exit == report.layers[0].exits == 0
    assert report.layers[0].auc is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_disagreement": 0.02, "delta": 0.05}, CalibrationError, r"400 in all\. At least 149 are .* 497 in all"),
        ({"max_disagreement": 0.0}, InputError, "max_disagreement=0.0"),
        ({"delta": 1.0}, InputError, "delta=1.0"),
        ({"target_speedup": 1.0}, InputError, "target_speedup=1.0"),
        ({"costs": "time"}, InputError, "costs='time'"),
        ({"procedure": "both"}, InputError, "procedure='both'"),
        ({"costs": LayerCosts([1.0], 0.0)}, InputError, "costs: expected 4 exits"),
        ({"width": 0}, InputError, "width=0"),
        ({"base": Plan([StaticExit(1)])}, InputError, "base: has exits"),
        ({"base": Plan(skips=[SkippedAttention(1)]), "procedure": "random_layer"}, InputError, "base: procedure"),
    ],
)
def test_what_cannot_be_done(calibrate, options, error, message) -> None:
    with pytest.raises(error, match=message):
        calibrate(**options)


def test_a_stream_that_was_too_short(tmp_path) -> None:
    with pytest.raises(CalibrationError, match=r"in the certification split\. At least 45 .*saved in .*work") as error:
        vte_compile.calibrate(
            model(), iter(prompts(80)), **{**SETTINGS, "max_disagreement": 0.05, "work": tmp_path / "work"}
        )
    assert "150 in all" in str(error.value)


def test_samples_that_cannot_be_used() -> None:
    text_only = [{"input_ids": torch.tensor([[3, 4, 5]])}] * 400
    with pytest.raises(InputError, match="all 400 are text only"):
        vte_compile.calibrate(model(), text_only, **SETTINGS)
    with pytest.raises(InputError, match="stream"):
        vte_compile.calibrate(model(), iter(prompts(30)), procedure="random_layer", **SETTINGS)
    with pytest.raises(InputError, match="optimized"):
        vte_compile.calibrate(optimize(model(), Plan([StaticExit(1)]), compile=False), prompts(400), **SETTINGS)


def test_several_questions_per_picture_are_no_independent_prompts(calibrate, caplog) -> None:
    def asked_twice():
        for prompt in prompts(100):
            yield prompt
            yield {**prompt, "input_ids": prompt["input_ids"].where(prompt["input_ids"] == IMAGE, 40)}
            yield prompt

    with caplog.at_level(logging.WARNING, logger="vte_compile"):
        vte_compile.calibrate(model(), asked_twice(), **(SETTINGS | {"target_speedup": 1.02}))
    messages = [record.getMessage() for record in caplog.records]
    assert any("samples are left out: their prompts came before" in message for message in messages)
    assert any("about 2" in message and "pictures: better one question per picture" in message for message in messages)


def test_an_interrupted_run_goes_on(calibrated, tmp_path) -> None:
    def some(until: int):
        yield from prompts(400)[:until]
        if until < 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vte_compile.calibrate(model(), some(150), work=tmp_path, **SETTINGS)
    reports = []
    plan = vte_compile.calibrate(model(), some(400), work=tmp_path, report=reports.append, **SETTINGS)
    assert reports == [calibrated[1]]
    assert all(torch.equal(a.w1, b.w1) for a, b in zip(plan.exits, calibrated[0].exits, strict=True))
