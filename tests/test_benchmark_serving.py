"""benchmarks/serving.py: what it measures of a tiny model, what it skips, and how it goes on. Times are not tested."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import typer

from vte_compile.flops import kv_bytes, prefill_flops, weight_bytes

ROOT = Path(__file__).parents[1]
NAMES = ("serving", "serving_cases", "serving_report", "common")


@pytest.fixture
def serving(monkeypatch):
    """benchmarks/serving.py with nothing compiled, importable for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = __import__("serving")
    cases = sys.modules["serving_cases"]
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(cases, "optimize", functools.partial(cases.optimize, compile=False))
    yield module
    for name in NAMES:
        sys.modules.pop(name)


def run(serving, file, cases, **options):
    """The rows by case, of three prompts."""
    serving.main(
        **{"presets": "tiny", "batches": "3", "runs": 2, "steps": 2, "json_file": file, "cases": cases} | options
    )
    return by_case(file)


def by_case(file):
    return {row["case"]: row for row in json.loads(file.read_text())["cases"]}


def test_all_cases_and_going_on(serving, tmp_path, capsys):
    cases = sys.modules["serving_cases"]
    file, plot = tmp_path / "serving.json", tmp_path / "plots" / "serving.png"
    first = run(serving, file, "eager,torch.compile")
    assert set(first) == {"eager", "torch.compile"}
    rows = run(serving, file, ",".join(cases.CASES), plot=plot)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert list(rows) == list(cases.CASES)
    assert rows["eager"]["ttft"]["runs_s"] == first["eager"]["ttft"]["runs_s"]  # not measured again
    exits = {case: row["exit_layers"] for case, row in rows.items()}
    assert [exits[case] for case in ("eager", "never", "1/4", "1/2", "3/4")] == [[e] * 3 for e in (-1, -1, 0, 1, 2)]
    assert len(set(exits["mixed"])) > 1
    for row in rows.values():
        assert row["relative_error"] < 1e-4
        assert ("fused" in row) == (row["case"] not in ("eager", "torch.compile"))
        assert (len(row["ttft"]["runs_s"]), len(row["tpot"]["runs_s"])) == (2, 2)
        assert row["tokens_per_s"] == pytest.approx(3 / row["tpot"]["median_s"])
        assert row["prefill_flops_per_s"] * row["ttft"]["median_s"] == pytest.approx(row["prefill_flops"])
        assert row["ttft"]["quotient"] == pytest.approx(row["ttft"]["time_ratio"] / row["ttft"]["predicted_ratio"])
        if not torch.cuda.is_available():
            assert row["peak_bytes"] is None
            assert "GPUs alone" in row["peak_missing"]
    for clock, least in (("ttft", "never"), ("tpot", "3/4")):
        predicted = {case: row[clock]["predicted_ratio"] for case, row in rows.items()}
        assert predicted["eager"] == predicted["torch.compile"] == 1
        assert predicted["1/4"] < predicted["1/2"] < predicted["3/4"] <= predicted[least] < 1
    assert rows["never"]["tpot"]["predicted_ratio"] == 1
    preset, models = cases.PRESETS["tiny"], cases.Models()
    config = models.use(preset).config
    place = config, preset.seq, preset.visual, -1
    assert rows["eager"]["prefill_flops"] == 3 * prefill_flops(*place)
    weights, prompts = weight_bytes(config, None, torch.float32), 3 * kv_bytes(*place, torch.float32)
    steps = 3 * (cases.WARM_STEPS + 1) * kv_bytes(config, 1, 0, -1, torch.float32)
    assert rows["eager"]["decode_bytes"] == weights + prompts + steps
    shown = capsys.readouterr().out
    assert "tiny, 3 rows: time to first token" in shown
    assert shown.count("torch.compile") == 4


def test_one_prompt_is_not_mixed_and_all_decode_alike(serving):
    """The ways to decode give the same tokens."""
    cases = sys.modules["serving_cases"]
    preset, models = cases.PRESETS["tiny"], cases.Models()
    prompt = cases.Prompt.random(models.use(preset), preset, 2)
    tokens = {}
    for case in ("eager", "torch.compile", "never"):
        step = cases.serve(case, models, prompt, 4).steps()
        tokens[case] = [step().flatten().tolist() for _ in range(4)]
    assert tokens["eager"] == tokens["torch.compile"] == tokens["never"]


def test_what_does_not_fit_is_skipped_aloud(serving, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "device_bytes", lambda device: 2**20)
    row = run(serving, tmp_path / "serving.json", "eager")["eager"]
    assert row["reason"].startswith("skipped: it needs about")
    assert "ttft" not in row
    assert "tiny, 3 rows, eager: skipped" in capsys.readouterr().out


def test_memory_of_the_largest_case(serving, monkeypatch):
    """LLaVA-NeXT, 32 rows: 13 GiB of weights, 46 of keys and values (with room 58), and what is between layers."""
    cases = sys.modules["serving_cases"]
    monkeypatch.setattr(sys.modules["common"], "the_device", lambda: torch.device("meta"))
    preset = cases.PRESETS["LLaVA-NeXT"]
    model = cases.Models().use(preset)
    gib = [cases.needed_bytes(model, preset, 32, case, 56) / 2**30 for case in ("eager", "torch.compile", "never")]
    assert gib == pytest.approx([76, 73, 84], abs=1.5)


def test_a_case_that_fails_is_tried_again(serving, monkeypatch, tmp_path):
    file, serve = tmp_path / "serving.json", serving.serve

    def broken(case, *args):
        if case == "never":
            raise RuntimeError("out of memory")
        served = serve(case, *args)

        def negated():
            output = served.prefill()
            output.logits.neg_()
            return output

        return dataclasses.replace(served, prefill=negated) if case == "1/2" else served

    monkeypatch.setattr(serving, "serve", broken)
    with pytest.raises(typer.Exit):
        run(serving, file, "never,eager,1/2")
    rows = by_case(file)
    assert rows["never"]["reason"] == "failed: RuntimeError: out of memory"
    assert rows["1/2"]["reason"] == "wrong: its logits differ by 2.0e+00 of their norm; not timed."
    assert [case for case, row in rows.items() if "ttft" in row] == ["eager"]
    monkeypatch.setattr(serving, "serve", serve)
    again = run(serving, file, "eager,1/2,never")
    assert list(again) == ["eager", "never", "1/2"]
    assert all("ttft" in row for row in again.values())


def test_a_prompt_is_worth_having_where_decode_fails(serving, monkeypatch, tmp_path, capsys):
    serve = serving.serve

    def broken(*args):
        def begin():
            raise RuntimeError("cannot be recorded")

        return dataclasses.replace(serve(*args), steps=begin)

    monkeypatch.setattr(serving, "serve", broken)
    with pytest.raises(typer.Exit):
        run(serving, tmp_path / "serving.json", "eager")
    row = by_case(tmp_path / "serving.json")["eager"]
    assert row["reason"] == "failed: RuntimeError: cannot be recorded"
    assert row["prefill_flops_per_s"] > 0
    assert "tpot" not in row
    assert "tokens_per_s" not in row
    assert "eager: failed" in capsys.readouterr().out


def test_the_time_that_a_run_has(serving, tmp_path, capsys):
    file = tmp_path / "serving.json"
    serving.main(presets="tiny", batches="2", cases="eager,never", runs=1, steps=1, seconds=1e-9, json_file=file)
    assert not file.exists()
    assert "2 cases are left; run again to go on" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(serving, tmp_path):
    file = tmp_path / "serving.json"
    run(serving, file, "eager")
    with pytest.raises(typer.BadParameter, match=r"serving.json was measured with runs 2, not 3: name another file"):
        run(serving, file, "eager", runs=3)


@pytest.mark.gpu
def test_on_a_gpu(serving, monkeypatch, tmp_path):
    """With all of it compiled and recorded, and memory counted."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = run(serving, tmp_path / "serving.json", ",".join(sys.modules["serving_cases"].CASES))
    for row in rows.values():
        assert row["peak_bytes"] > 0
        assert row["relative_error"] < 1e-3
    for case in ("never", "1/4", "1/2", "3/4", "mixed"):
        assert (rows[case]["fused"], rows[case]["replayed"]) == (["decode", "packed"], True)
