"""Analyses: exits, oracle exits and deletions against the oracle's own answers; work that goes on; files; errors."""

import base64
import dataclasses
import io
import json
import logging
import sys

import pytest
import torch
from rich.console import Console
from test_tuning_ranking import by_oracle, sample, some_samples
from tiny_models import LAYERS, one_thread, shared_model, tiny_llava  # noqa: F401

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.oracle import Oracle, embed
from vte_compile.plan import Plan, SkippedAttention, StaticExit
from vte_compile.tuning import analyze as module
from vte_compile.tuning.analysis_page import prepare_folder, write_analysis
from vte_compile.tuning.analysis_work import AnalysisWork, Measured
from vte_compile.tuning.analyze import analyze
from vte_compile.tuning.modality_attention import KEYS, QUERIES
from vte_compile.tuning.samples import Sample

TOKENS = 4
COUNT = 6


def decoded(model, given, plan):
    prompt = embed(model, given.inputs["input_ids"], given.inputs["pixel_values"])
    return Oracle(model, plan).generate(*prompt, max_new_tokens=TOKENS).tokens[0]


@pytest.fixture(scope="module")
def found():
    """Samples without answers, and their analysis."""
    model, given = shared_model("llava"), some_samples(COUNT, None)
    return model, given, analyze(model, given, max_new_tokens=TOKENS, progress=False)


def test_exits_and_deletions_are_what_decoding_gives(found):
    model, given, analysis = found
    full = [decoded(model, each, Plan()) for each in given]
    changing = [set() for _ in given]
    for row in analysis.layers:
        plans = {
            "exit_agreement": Plan([StaticExit(row.layer)]),
            "deletion_agreement": Plan(skips=[SkippedAttention(row.layer)]),
        }
        if row.layer == LAYERS - 1:
            plans["exit_agreement"] = Plan()
        for name, plan in plans.items():
            same = [decoded(model, each, plan) == tokens for each, tokens in zip(given, full, strict=True)]
            assert getattr(row, name).value == pytest.approx(sum(same) / COUNT)
            for i, stays in enumerate(same):
                if name == "exit_agreement" and not stays:
                    changing[i].add(row.layer)
    exits = [max(layers, default=-1) + 1 for layers in changing]
    assert any(exits)
    assert [each.oracle_exit for each in analysis.samples] == [k if k < LAYERS - 1 else -1 for k in exits]
    for row in analysis.layers:
        assert row.may_exit.value == pytest.approx(sum(k <= row.layer for k in exits) / COUNT)
        assert row.oracle_exits == sum(k == row.layer < LAYERS - 1 for k in exits)
    assert analysis.oracle_cost.value == pytest.approx(sum(k + 1 for k in exits) / COUNT)


def test_losses_are_of_the_full_models_answer(found):
    model, given, analysis = found
    increases = torch.zeros(LAYERS)
    for each in given:
        own = Sample.of(each.inputs, decoded(model, each, Plan()))
        full = by_oracle(model, own, ())[0]
        increases += torch.stack([by_oracle(model, own, (layer,))[0] - full for layer in range(LAYERS)]) / COUNT
    for row in analysis.layers:
        assert row.deletion_loss_increase.value == pytest.approx(float(increases[row.layer]), abs=2e-5)
        assert row.deletion_loss_increase.low <= row.deletion_loss_increase.value <= row.deletion_loss_increase.high
    assert analysis.layers[0].exit_loss_increase.value > 0
    assert analysis.layers[-1].exit_loss_increase.value == 0


def test_accuracy_is_of_the_samples_with_answers():
    model, given = shared_model("llava"), some_samples(4, None)
    full = [decoded(model, each, Plan()) for each in given]
    behind = decoded(model, given[1], Plan([StaticExit(0)]))
    assert behind != full[1]
    # Right is: always the full model's; what an exit behind layer 0 makes of it; never; not known.
    answers = [full[0], behind, [1, 2], None]
    given = [Sample.of(each.inputs, answer) for each, answer in zip(given, answers, strict=True)]
    analysis = analyze(model, given, max_new_tokens=TOKENS, progress=False)
    assert analysis.answered == 3
    for row in analysis.layers:
        plan = Plan([StaticExit(row.layer)] if row.layer < LAYERS - 1 else [])
        right = [decoded(model, each, plan)[: len(each.answer)] == list(each.answer) for each in given[:3]]
        assert row.exit_accuracy.value == pytest.approx(sum(right) / 3)
    assert analysis.layers[-1].exit_accuracy.value == pytest.approx(1 / 3)
    assert analysis.layers[0].exit_accuracy.value >= 1 / 3


def test_attention_is_a_mean_over_the_samples_with_its_spread(found, tmp_path):
    model, given, analysis = found
    analyze(model, given, max_new_tokens=TOKENS, work=tmp_path, progress=False)
    store = AnalysisWork(tmp_path, model, LAYERS, TOKENS)
    attention = torch.tensor([store.get(each.key).attention for each in given], dtype=torch.float64)
    for layer, row in enumerate(analysis.layers):
        assert list(row.attention) == list(QUERIES)
        for q, shares in enumerate(row.attention.values()):
            assert list(shares) == list(KEYS)
            assert sum(share.mean.value for share in shares.values()) == pytest.approx(1, abs=1e-5)
            for k, share in enumerate(shares.values()):
                values = attention[:, layer, q, k]
                assert share.mean.value == pytest.approx(float(values.mean()))
                assert (share.low, share.high) == pytest.approx(
                    tuple(values.quantile(torch.tensor([0.1, 0.9]).double()).tolist())
                )
    assert analysis.uniform["visual"]["question"] == 0
    assert sum(analysis.uniform["answer"].values()) == pytest.approx(1)


@pytest.mark.parametrize("answer", [(7, 3), None], ids=["labels", "own-answers"])
def test_an_interrupted_analysis_goes_on_where_it_was(answer, tmp_path, monkeypatch, caplog):
    model, given = shared_model("llava"), some_samples(4, answer)
    options = {"max_new_tokens": TOKENS, "work": tmp_path, "progress": False}
    expected = analyze(model, given, max_new_tokens=TOKENS, progress=False)
    measure, calls = module._Meter.measure, []

    def counted(self, sample):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(sample.key)
        return measure(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(module._Meter, "measure", counted)
        with pytest.raises(KeyboardInterrupt):
            analyze(model, given, **options)
        calls.append("one more")  # only what is missing is measured
        assert analyze(model, given, **options).to_json() == expected.to_json()
        assert calls[3:] == [each.key for each in given[2:]]
        assert analyze(model, given, **options).to_json() == expected.to_json()
        assert len(calls) == 5
        # A damaged file, and one with something else in it.
        files = sorted(tmp_path.glob("analysis-*.json"))
        files[0].write_text(files[0].read_text()[:100])
        content = json.loads(files[1].read_text())
        content["measured"]["unchanged"].pop()
        files[1].write_text(json.dumps(content))
        with caplog.at_level(logging.WARNING, "vte_compile"):
            assert analyze(model, given, **options).to_json() == expected.to_json()
        assert sum("is damaged" in message for message in caplog.messages) == 2
        assert len(calls) == 7
        # Other answers are other measurements.
        analyze(model, given, **options | {"max_new_tokens": 2})
        assert len(calls) == 11


def test_work_of_another_model_is_refused(tmp_path):
    analyze(shared_model("llava"), some_samples(2), work=tmp_path, max_new_tokens=2, progress=False)
    other = tiny_llava()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(InputError, match="another model"):
        analyze(other, some_samples(2), work=tmp_path, max_new_tokens=2, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": []}, "other fields"),
        ({"attention": [[[0.5] * len(KEYS)]] * LAYERS}, "other fields"),
        ({"deletion_unchanged": None}, "other fields"),
        ({"loss": [float("nan")] * (LAYERS + 1)}, "other fields"),
        ({"answer": "abc"}, "other fields"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_read_is_checked(change, message):
    sound = {
        "answer": [1], "visual": 4, "tokens": 9, "right": None,
        "attention": [[[0.2] * len(KEYS)] * len(QUERIES)] * LAYERS, "uniform": [[0.2] * len(KEYS)] * len(QUERIES),
        "loss": [0.5] * (LAYERS + 1), "unchanged": [True] * LAYERS,
        "deletion_loss": [0.5, None] * (LAYERS // 2), "deletion_unchanged": [False] * LAYERS,
    }  # fmt: skip
    assert dataclasses.asdict(Measured.from_json(sound, LAYERS)) == sound
    with pytest.raises(ValueError, match=message):
        Measured.from_json(sound | change, LAYERS)


def test_attentions_that_cannot_be_deleted_leave_the_rest(monkeypatch, tmp_path, caplog):
    def refuse(model):
        raise UnsupportedModelError("layer 0: not of this form")

    monkeypatch.setattr(module, "Deleter", refuse)
    with caplog.at_level(logging.WARNING, "vte_compile"):
        analysis = analyze(
            shared_model("llava"), some_samples(2), max_new_tokens=2, work=tmp_path / "work", progress=False
        )
    assert any("not of this form" in message for message in caplog.messages)
    assert any("few" in message for message in caplog.messages)
    assert "not of this form" in analysis.deletions_refused
    assert all(row.deletion_agreement is None for row in analysis.layers)
    files = write_analysis(analysis, tmp_path / "out")
    assert not any("deletion" in name for name in files)
    assert "not of this form" in files["page"].read_text()


def test_losses_that_are_not_finite_are_told(monkeypatch, tmp_path):
    model = tiny_llava()
    effects = module.Deleter.effects

    def overflowing(self, *arguments, **options):
        losses, changed, full = effects(self, *arguments, **options)
        losses[1] = torch.inf
        return losses, changed, full

    monkeypatch.setattr(module.Deleter, "effects", overflowing)
    analysis = analyze(model, some_samples(2), max_new_tokens=2, work=tmp_path, progress=False)
    assert [row.deletion_loss_increase is None for row in analysis.layers] == [False, True, False, False]
    assert all(row.deletion_agreement is not None for row in analysis.layers)
    again = analyze(model, some_samples(2), max_new_tokens=2, work=tmp_path, progress=False)
    assert again.to_json() == analysis.to_json()
    assert "not finite" in write_analysis(analysis, tmp_path / "out")["page"].read_text()


def test_the_table_fits_a_terminal(found):
    _, _, analysis = found
    rows = tuple(dataclasses.replace(row, exit_accuracy=row.exit_agreement) for row in analysis.layers)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(dataclasses.replace(analysis, layers=rows, answered=COUNT))
    said = console.export_text()
    assert "…" not in said
    assert f"{analysis.layers[0].exit_loss_increase.value:+.3f}" in said


def test_files(found, tmp_path):
    _, _, analysis = found
    files = write_analysis(analysis, tmp_path / "new" / "out")
    assert {file.name for file in files["page"].parent.iterdir()} == {file.name for file in files.values()}
    root = json.loads(files["numbers"].read_text())
    assert root["schema_version"] == 1
    assert set(root) == {"schema_version", *(field.name for field in dataclasses.fields(analysis))}
    page = files["page"].read_text()
    assert page.count("data:image/png;base64,") == len(files) - 2
    for source in page.split('src="')[1:]:
        assert base64.b64decode(source.partition('"')[0].partition(",")[2]).startswith(b"\x89PNG")
    assert "http" not in page
    assert "$" not in page
    assert "width=device-width" in page
    assert str(files["page"].parent) not in page


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([sample()], {}, "1 with images is too few"),
        ([], {}, "there are none"),
        ([{"input_ids": torch.tensor([[5, 6, 7]])}] * 3, {"processor": shared_model}, "text only"),
        (some_samples(2), {"max_new_tokens": 0}, "max_new_tokens"),
        ([sample(), Sample.of(sample(seed=1).inputs, (), "the second")], {}, "the second: has no answer"),
        ([sample(), sample("ttti", seed=1)], {}, "sample 1: no question behind the image"),
    ],
)
def test_bad_input(given, options, message):
    if "processor" in options:
        options = {"processor": shared_model("llava").config}
    with pytest.raises(InputError, match=message):
        analyze(shared_model("llava"), given, **{"max_new_tokens": 2, "progress": False} | options)


def test_what_was_measured_before_an_error_is_saved(tmp_path):
    given = [sample(), sample("ttti", seed=1)]
    with pytest.raises(InputError, match="is saved in"):
        analyze(shared_model("llava"), given, max_new_tokens=2, work=tmp_path, progress=False)
    assert len(list(tmp_path.glob("analysis-*.json"))) == 1


def test_folder_is_tried_before_the_work(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare_folder(file / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib"):
        prepare_folder(tmp_path)
