"""The benchmarks: which attentions they skip, and what they make of what they measured. Their times are not tested."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig

from vte_compile.timing import Summary
from vte_compile.tuning.bootstrap import Interval
from vte_compile.tuning.calibrate_examined import Costing, Promise, Splits, choose, fit_gates
from vte_compile.tuning.evaluation import Configuration, Evaluation
from vte_compile.tuning.examine import Examined
from vte_compile.tuning.splits import PARTS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def skip(monkeypatch):
    """benchmarks/skip.py, importable for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield __import__("skip")
    for name in ("skip", "common"):
        sys.modules.pop(name)


def test_spread(skip):
    assert skip.spread(16, 6) == [5, 7, 9, 10, 12, 14]
    for layers in range(1, 41):
        for count in range(layers // 2 + 1):
            spread = skip.spread(layers, count)
            assert len(set(spread)) == count
            assert all(layers // 3 <= layer < layers - 1 for layer in spread)


def test_cases(skip):
    cases = [*skip.training_free(16), *skip.with_adapters(16, 32, torch.bfloat16)]
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases) == 12
    assert [len(case.plan.skips) for case in cases] == 2 * [0, 4, 6, 8] + 4 * [6]
    assert [len(case.plan.exits) for case in cases] == 4 * [0] + 4 * [1] + 4 * [0]
    assert [case.fold for case in cases] == 8 * [True] + 2 * [True, False]
    for case in cases[8:]:
        plain = by_name[case.without_adapters]
        assert [skip.layer for skip in case.plan.skips] == [skip.layer for skip in plain.plan.skips]
        assert all(skip.adapter.width == 128 for skip in case.plan.skips)


def test_compare(skip):
    """Ratios are of the same round; the medians of the times alone would give others."""
    rows = [
        {"case": case, "prefill": {"runs_s": s}, "decode": {"runs_s": [1.0]}, "prefill_flops": n, "moved_bytes": 1}
        for case, s, n in (("base", [8, 8, 16], 100), ("plain", [2, 4, 2], 50), ("adapted", [3, 6, 1], 50))
    ]
    skip.compare(rows, {"plain": None, "adapted": "plain"})
    assert rows[1]["prefill"] == {"runs_s": [2, 4, 2], "time_ratio": 0.25, "cost_ratio": 0.5, "quotient": 0.5}
    assert rows[2]["prefill"]["to_no_adapter"] == 1.5
    assert rows[2]["decode"]["to_no_adapter"] == 1.0


@pytest.fixture
def guarantee(monkeypatch):
    """benchmarks/guarantee.py, importable for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield __import__("guarantee")
    for name in ("guarantee", "common"):
        sys.modules.pop(name)


@pytest.mark.parametrize("samples", [10, 2500, 777])
def test_divided_as_calibrate_divides(guarantee, samples):
    parts = guarantee.divided(samples)
    assert len(parts) == samples
    assert set(parts) == set(PARTS)
    for part, share in PARTS.items():
        assert abs(parts.count(part) - share * samples) <= 1


def examined(count, seed):
    """Samples of which the gates' one feature tells whether they may leave after layer 0, nearly always."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(count, generator=generator) < 0.5
    features = torch.zeros(count, 2, 4)
    features[:, 0, 0] = torch.where(easy, 1.0, -1.0) + 0.6 * torch.randn(count, generator=generator)
    same = torch.stack([easy.float(), torch.ones(count)], 1)
    return Examined(features, same, torch.zeros(count, 3), torch.full((count,), 6), torch.full((count,), 10))


def test_compare_and_summarize(guarantee):
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    splits = Splits.of(examined(2000, 0), guarantee.divided(2000))
    # No sum of losses decides here, but which answers are the same.
    gates = fit_gates(splits.train, slack=1.0, width=4, epochs=5, seed=0)
    costing = Costing(config)
    choice = choose(gates, splits, 1.0, Promise(0.1, 0.05), costing)
    row = guarantee.compare(choice, splits, {"fresh": examined(4000, 1)}, 1.0, costing, 0.1)
    certified, naive = row["certified"]["fresh"], row["naive"]["fresh"]
    assert certified["disagreement"] < naive["disagreement"]
    assert 1.0 < certified["speedup"] < naive["speedup"]
    assert naive["disagreement"] == pytest.approx(0.1, abs=0.02)

    high = {**row, "certified": {"fresh": {"disagreement": 0.11, "speedup": 3.0}}}
    summary = guarantee.summarize([row, high, {"run": 2, "refused": "too few"}], 0.1)[0]
    assert (summary["calibrations"], summary["refused"], summary["within"]) == (3, 1, 1)
    assert summary["disagreement"]["max"] == 0.11
    assert summary["speedup"]["mean"] == pytest.approx((3.0 + certified["speedup"]) / 2)


class CountingPool:
    """In the place of ProcessPoolExecutor: compiles nothing, each layer takes a second, and optimize() no Dynamo."""

    def __init__(self, workers, context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, how, layers, threads):
        seconds = dict.fromkeys(("wall_s", "cpu_s", "inductor_s", "rest_s"), float(layers))
        seconds["dynamo_s"] = 0.0 if how == "optimize()" else 2.0 * layers
        future = Future()
        future.set_result({"case": how, "layers": layers, "rounds": 2, "compile": seconds})
        return future


def test_compile_times_without_dynamo(monkeypatch, capsys):
    """optimize() does not use it: nothing has no ratio to nothing, and nothing is shown."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    backend = __import__("backend")
    monkeypatch.setattr(backend, "ProcessPoolExecutor", CountingPool)
    monkeypatch.setenv("COLUMNS", "200")
    rows = backend.compile_rows(0)
    assert [row["to_fewest_layers"]["dynamo_s"] for row in rows] == [None] * 3 + [1.0, 2.0, 4.0] * 2
    assert [row["to_fewest_layers"]["wall_s"] for row in rows] == [1.0, 2.0, 4.0] * 3
    backend.show_compile(rows)
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "(" in line]
    grown = ["16.0 (1.00)", "32.0 (2.00)", "64.0 (4.00)"]
    assert [row[6] for row in cells if len(row) > 6] == ["", "", "", *grown, *grown]
    for name in ("backend", "common"):
        sys.modules.pop(name)


def test_shipped_table_names_a_reason_for_each_missing_time(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    shipped = __import__("shipped")
    one = {"agreement": Interval(0.9, 0.8, 1.0), "accuracy": Interval(0.7, 0.6, 0.8), "cost": Interval(4.0, 4.0, 4.0)}
    work = {"prefill_flops": Interval(50.0, 50.0, 50.0), "total_flops": Interval(80.0, 80.0, 80.0)}
    full = {**one, "prefill_flops": Interval(100.0, 100.0, 100.0), "total_flops": Interval(160.0, 160.0, 160.0)}
    cases = [
        Configuration(name, "plan", None, None, measures, one, {})
        for name, measures in (
            (shipped.FULL, full),
            (shipped.LEARNED, {**one, **work}),
            (shipped.RANDOM, {**one, **work}),
        )
    ]
    found = Evaluation(10, 10, shipped.LEARNED, {}, tuple(cases), ())
    assert shipped.names_of(found) == [shipped.RANDOM, shipped.LEARNED]
    of = {shipped.LEARNED: Summary.of([0.002, 0.001, 0.003]), shipped.BASELINE: Summary.of([0.004, 0.004, 0.004])}
    times = {"prefill": of, "decode": of}
    row = shipped.row_of(found, shipped.LEARNED, times)
    assert (row["prefill"]["median_s"], row["prefill"]["min_s"], row["prefill"]["max_s"]) == (0.002, 0.001, 0.003)
    assert row["decode"]["time_ratio"] == 0.5
    assert (row["prefill_flops"], row["total_flops"]) == (0.5, 0.5)
    assert "eager" in shipped.row_of(found, shipped.RANDOM, times)["untimed"]
    assert shipped.row_of(found, shipped.BASELINE, times)["total_flops"] == 1.0
    for name in ("shipped", "common"):
        sys.modules.pop(name)


@pytest.fixture
def engines(monkeypatch):
    """benchmarks/engines.py, with a clock that only what is timed moves on."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = __import__("engines")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("vte_compile.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))
    module.clock = clock
    yield module
    sys.modules.pop("engines")


class CountedEngine:
    """In the place of an engine: a prompt takes as many seconds as its path says, a step a tenth of that."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.longest = clock, seconds, 0

    def prefill(self, inputs_embeds, visual_mask, room):
        self.clock.now += self.seconds
        count = np.array([inputs_embeds.shape[1]])
        assert int(visual_mask.sum()) == 3
        return SimpleNamespace(cache=SimpleNamespace(lengths=np.stack([count, count - 3]), next_positions=count.copy()))

    def decode(self, tokens, cache):
        self.clock.now += self.seconds / 10
        cache.lengths += 1
        cache.next_positions += 1
        self.longest = max(self.longest, int(cache.lengths[0, 0]))


def test_engines_beside_their_peers(engines, monkeypatch, capsys):
    """Ratios, times of a token, and caches that are as long in each round."""
    made = {}

    def load(path, threads):
        made[path] = CountedEngine(engines.clock, float(path))
        return made[path]

    def peer(name, path, hidden, seq, visual, threads, decode_tokens):
        def run(seconds):
            engines.clock.now += seconds

        return lambda: run(float(path)), lambda: run(decode_tokens * float(path) / 10), lambda: None

    runnable = engines.runnable
    monkeypatch.setattr("vte_compile.load_engine", load)
    monkeypatch.setattr(engines, "runnable", lambda name, *a: (peer if name == engines.PUBLIC else runnable)(name, *a))
    monkeypatch.setattr(engines, "runnable_apart", peer)
    early = "engine, exit after 0"
    paths = {engines.PUBLIC: ("8", 100), engines.OPENVINO: ("6", 100), engines.OURS: ("4", 100), early: ("3", 50)}
    cases = {name: {"path": path, "exit_layer": -1, "flops": flops} for name, (path, flops) in paths.items()}
    rows = {row["case"]: row for row in engines.time_cases(cases, 8, 41, 3, 1, 2, 3, decode_tokens=5)}
    assert list(rows) == list(paths)
    assert [row["prefill"]["median_s"] for row in rows.values()] == pytest.approx([8.0, 6.0, 4.0, 3.0])
    assert [row["prefill"]["to_public"] for row in rows.values()] == pytest.approx([1.0, 0.75, 0.5, 0.375])
    assert [row["decode"]["median_s"] for row in rows.values()] == pytest.approx([0.8, 0.6, 0.4, 0.3])
    assert [len(row["decode"]["runs_s"]) for row in rows.values()] == [3] * 4
    assert rows[early]["prefill"]["over_flops"] == pytest.approx(0.75 / 0.5)
    assert {engine.longest for engine in made.values()} == {41 + 5}
    assert sorted(made) == ["3", "4"]
    monkeypatch.setenv("COLUMNS", "200")
    engines.show([row | {"load_s": 1.0, "peak_mb": 2.0} for row in rows.values()], {"runs": 2})
    shown = [line.split("│") for line in capsys.readouterr().out.splitlines() if early in line or "transf" in line]
    assert [row[-2].strip() for row in shown] == ["", "1.500", "2", "2"]


def test_the_public_export_hands_its_cache_on(engines):
    """Presents become pasts, in order; an input that nobody knows is an error."""
    own = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name=n) for n in ("inputs_embeds", "cache_0", "cache_1")])
    feeds = engines.Public._feeds(own, np.ones((1, 1, 2), np.float32), ["key", "value"])
    assert feeds["inputs_embeds"].numpy().shape == (1, 1, 2)
    assert (feeds["cache_0"], feeds["cache_1"]) == ("key", "value")
    other = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="position_ids")])
    with pytest.raises(RuntimeError, match="takes position_ids, which this benchmark does not know"):
        engines.Public._feeds(other, np.ones((1, 1, 2), np.float32), [])


def test_what_decode_steps_did_to_openvinos_state_is_undone(engines, monkeypatch, tmp_path):
    class State:
        def __init__(self):
            self.state = SimpleNamespace(data=np.zeros(2))

    state = State()

    class Request:
        model_inputs = (SimpleNamespace(names={"beam_idx"}),)

        def infer(self, inputs):
            assert "beam_idx" in inputs or len(inputs["inputs_embeds"]) == 1
            state.state.data += 1

        def query_state(self):
            return [state]

    class Core:
        def read_model(self, file):
            return file

        def compile_model(self, model, device, options):
            assert options == {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
            return SimpleNamespace(create_infer_request=Request)

    module = SimpleNamespace(Core=Core, Tensor=lambda data: SimpleNamespace(data=data.copy()))
    monkeypatch.setitem(sys.modules, "openvino", module)
    for part in ("prefill", "decode"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.xml").touch()
    _, decode, rewind = engines.runnable(engines.OPENVINO, str(tmp_path), 8, 41, 3, 2, 4)
    assert state.state.data.tolist() == [41, 41]  # the prompt, token by token
    decode()
    assert state.state.data.tolist() == [45, 45]
    rewind()
    assert state.state.data.tolist() == [41, 41]


@pytest.fixture
def kernel_times(monkeypatch):
    """benchmarks/kernel_times.py, importable for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("COLUMNS", "200")
    yield __import__("kernel_times")
    for name in ("kernel_times", "kernel_cases", "kernel_check", "common"):
        sys.modules.pop(name)


def kernel_rows(kernel_times, file, cases, batches="3"):
    kernel_times.main(shapes="tiny", batches=batches, cases=cases, json_file=file)
    report = json.loads(file.read_text())
    assert report["machine"]["commit"]
    assert set(report["settings"]["ceilings"]["float32"]) == {"flops_per_s", "bytes_per_s"}
    return {(row["phase"], row["exits"], row["case"]): row for row in report["cases"]}


def test_kernels_beside_pytorchs(kernel_times, tmp_path, capsys):
    """All give the same numbers, and a backend that refuses a shape is named with its reason."""
    if torch.cuda.is_available():
        pytest.skip("which backends refuse is known of CPUs: test_kernels_on_a_gpu runs them on a GPU")
    rows = kernel_rows(kernel_times, tmp_path / "kernels.json", "vte,flash,cudnn")
    assert set(rows) == {
        (p, e, c) for p in ("prefill", "decode") for e in (False, True) for c in ("vte", "flash", "cudnn")
    }
    for (phase, _, case), row in rows.items():
        if case == "cudnn":
            assert "RuntimeError" in row["reason"]
            assert "median_s" not in row
        else:
            unit = {"prefill": "flops_per_s", "decode": "bytes_per_s"}[phase]
            assert row["relative_error"] < 1e-5
            assert row[unit] == pytest.approx(row["of_ceiling"] * kernel_ceiling(tmp_path, unit))
    # Packed, two rows of 48 tokens and one of 8: pairs, and columns.
    amounts = {"prefill": 4 * (2 * 48 * 49 // 2 + 8 * 9 // 2) * 2 * 64, "decode": 2 * (2 * 48 + 8) * 2 * 64 * 4}
    for phase, unit in (("prefill", "flops_per_s"), ("decode", "bytes_per_s")):
        row = rows[phase, True, "vte"]
        assert row[unit] * row["median_s"] == pytest.approx(amounts[phase])
    shown = capsys.readouterr().out
    assert shown.count("refused") == 4
    assert "decode, cudnn: RuntimeError" in shown


def kernel_ceiling(folder, unit):
    return json.loads((folder / "kernels.json").read_text())["settings"]["ceilings"]["float32"][unit]


@pytest.mark.parametrize(
    ("wrong", "shown"), [(lambda out: out * 1.01, "wrong: 1e-02"), (torch.empty_like, "wrong: NaN")]
)
def test_wrong_kernels_are_not_timed(kernel_times, monkeypatch, tmp_path, capsys, wrong, shown):
    """Nor those that leave what they allocated as it is, which may hold the right numbers of the call before."""
    module = sys.modules["kernel_cases"]
    right = module.varlen_attention
    monkeypatch.setattr(module, "varlen_attention", lambda *args: wrong(right(*args)))
    with pytest.raises(typer.Exit):
        kernel_rows(kernel_times, tmp_path / "kernels.json", "vte", "1")
    rows = {row["phase"]: row for row in json.loads((tmp_path / "kernels.json").read_text())["cases"]}
    assert "median_s" not in rows["prefill"]
    assert "median_s" in rows["decode"]
    assert shown in capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_options(kernel_times):
    with pytest.raises(typer.BadParameter, match="--cases: 'fast' is unknown; there are vte, flash, cudnn, efficient"):
        kernel_times.main(shapes="tiny", cases="vte,fast")


@pytest.mark.gpu
def test_kernels_on_a_gpu(kernel_times, tmp_path):
    """In float32, which flash takes none of. What is timed is timed as a CUDA graph."""
    rows = kernel_rows(kernel_times, tmp_path / "kernels.json", "vte,flash,flex")
    for (_, _, case), row in rows.items():
        assert ("reason" in row) == (case == "flash")
        assert row.get("by_graph") == (None if case == "flash" else True)


def test_kernels_py_may_be_taken_for_the_package_kernels(monkeypatch):
    """transformers imports what it finds by that name, beside any benchmark that runs: it must be cheap and nothing."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    module = __import__("kernels")
    assert Path(module.__file__) == ROOT / "benchmarks" / "kernels.py"
    assert not [name for name in vars(module) if not name.startswith("__")]
    assert not hasattr(module, "__version__")
    sys.modules.pop("kernels")
