"""The demo: what it measures, by hand and on the shipped model; its report, plots and page."""

import base64
import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from vte_compile import GateExit, Plan, SkippedAttention
from vte_compile.cli import app
from vte_compile.demo import data
from vte_compile.demo.data import ASSETS, Assets, Question
from vte_compile.demo.evaluate import FULL, LEARNED, NO_EXIT, WITH_SKIPS, Answer, Configuration, Evaluation
from vte_compile.demo.run import Demo
from vte_compile.environment import environment
from vte_compile.errors import InputError
from vte_compile.fingerprint import Fingerprint
from vte_compile.flops import prefill_flops
from vte_compile.plotting import require_matplotlib

QUESTIONS = 10
PLOTS = {"agreement_over_flops", "exit_layers", "exit_layers_by_type"}

needs_model = pytest.mark.skipif(
    not (ASSETS / "model" / "model.safetensors").is_file() or not (ASSETS / "test" / "questions.json").is_file(),
    reason=f"no demo model in {ASSETS}",
)
needs_plan = pytest.mark.skipif(
    not (ASSETS / "plan" / data.JSON_NAME).is_file(), reason=f"no learned plan in {ASSETS / 'plan'}"
)


# ---------------------------------------------------------------- what is measured, by hand

LAYERS = 3
CONFIG = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=9)


def configuration(name: str, kind: str, answers: str, exits: list[int]) -> Configuration:
    """Answers are words, one per question."""
    model = SimpleNamespace(config=CONFIG, dtype=torch.float32)
    given = [Answer([ord(c) for c in word], word, k, 10, 6) for word, k in zip(answers.split(), exits, strict=True)]
    return Configuration(name, kind, model, given, seconds=2.0)


@pytest.fixture
def evaluation() -> Evaluation:
    """Four questions, two types, three layers."""
    right = "a b c d".split()
    questions = [Question(Path("p.png"), kind, "?", answer) for kind, answer in zip("xxyy", right, strict=True)]
    cases = [
        configuration(FULL, "original", "a b c -", [-1] * 4),  # the last one is wrong, and stays the reference
        configuration(NO_EXIT, "none", "a b c -", [-1] * 4),
        configuration(LEARNED, "learned", "a b c d", [0, 1, -1, 1]),
    ]
    return Evaluation(None, questions, cases)


def test_cost_counts_the_layers_that_see_the_tokens(evaluation: Evaluation) -> None:
    assert [evaluation.cost(k) for k in (0, 1, 2, -1)] == [1, 2, 3, 3]


def test_summary(evaluation: Evaluation) -> None:
    learned = evaluation.summary(evaluation[LEARNED])
    assert learned["accuracy"]["value"] == 1.0  # better than the full model, with which it then does not agree
    assert learned["agreement"]["value"] == 0.75
    assert learned["mean_cost"] == (1 + 2 + 3 + 2) / 4
    assert learned["exit_histogram"] == {"0": 1, "1": 2, "2": 0, "-1": 1}
    assert learned["prefill_flops"] == sum(prefill_flops(CONFIG, 10, 6, k) for k in (0, 1, -1, 1)) / 4
    assert learned["answer_flops"] == learned["prefill_flops"]  # one token each, which prefill gives
    assert learned["kv_bytes"] == 2 * 8 * 4 * (10 * (1 + 2 + 3 + 2) + 4 * (2 + 1 + 0 + 1)) / 4
    assert learned["questions_per_s"] == 2
    assert learned["by_type"]["x"]["mean_cost"] == 1.5
    assert learned["by_type"]["y"]["agreement"]["value"] == 0.5
    assert evaluation.summary(evaluation[FULL])["agreement"]["value"] == 1.0


def test_confidence_intervals_are_those_of_wilson(evaluation: Evaluation) -> None:
    low, high = (evaluation.summary(evaluation[FULL])["accuracy"][end] for end in ("low", "high"))
    assert low == pytest.approx(0.3006, abs=1e-4)  # 3 of 4, from the literature's calculators
    assert high == pytest.approx(0.9544, abs=1e-4)


def test_questions_are_sorted_by_type_for_batches() -> None:
    questions = [Question(Path("p.png"), kind, "?", "a") for kind in "yxy"]
    model = SimpleNamespace(config=CONFIG)
    evaluation = Evaluation(None, questions, [Configuration(FULL, "original", model)])
    assert [q.type for q in evaluation.questions] == list("xyy")


# ---------------------------------------------------------------- assets


def test_spread_takes_questions_at_equal_distances(tmp_path: Path) -> None:
    assets = Assets(*[tmp_path] * 3, [Question(tmp_path / f"{i}.png", "t", str(i), "") for i in range(10)])
    assert [q.text for q in assets.spread(5)] == ["0", "2", "4", "6", "8"]
    assert len(assets.spread(99)) == 10
    with pytest.raises(InputError, match="questions"):
        assets.spread(0)


def test_one_of_each_type_uses_another_picture_for_each(tmp_path: Path) -> None:
    entries = [("0", "a"), ("0", "b"), ("1", "a"), ("1", "b"), ("2", "c")]
    assets = Assets(*[tmp_path] * 3, [Question(tmp_path / image, kind, "?", "") for image, kind in entries])
    assert [(q.image.name, q.type) for q in assets.one_of_each_type()] == [("0", "a"), ("1", "b"), ("2", "c")]


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("model/config.json", "train"),
        ("plan/vte_plan.json", "make_plans.py"),
        ("plan_skips/vte_plan.json", "make_plans.py"),
        ("test/questions.json", "build_assets.py"),
    ],
)
def test_missing_assets_are_named(missing: str, hint: str, tmp_path: Path) -> None:
    for file in ("model/config.json", "plan/vte_plan.json", "plan_skips/vte_plan.json", "test/questions.json"):
        if file != missing:
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).write_text("[]")
    with pytest.raises(InputError, match=missing.replace(".", r"\.")) as caught:
        Assets.find(tmp_path)
    assert hint in str(caught.value)


def test_damaged_questions_are_named(tmp_path: Path) -> None:
    texts = {f"{name}.json": "{}" for name in ("model/config", "plan/vte_plan", "plan_skips/vte_plan")}
    texts["test/questions.json"] = '[{"image": 1}]'
    for file, text in texts.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match="not a list of image, type"):
        Assets.find(tmp_path)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"vte-compile\[demo\]"):
        require_matplotlib()


# ---------------------------------------------------------------- the whole


class _References(HTMLParser):
    """What a page loads, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """The shipped model and questions, with gates of random weights: what they decide does not matter here."""
    folder = tmp_path_factory.mktemp("assets")
    for name in ("model", "test"):
        (folder / name).symlink_to(ASSETS / name)
    model = LlavaForConditionalGeneration.from_pretrained(ASSETS / "model")
    hidden = model.config.text_config.hidden_size
    torch.manual_seed(0)
    gates = [GateExit(k, torch.randn(8, 2 * hidden), torch.randn(2, 8)) for k in (1, 3, 5)]
    Plan(gates, Fingerprint.of(model)).save_pretrained(folder / "plan")
    Plan(gates, Fingerprint.of(model), [SkippedAttention(7)]).save_pretrained(folder / "plan_skips")
    return folder


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory) -> tuple[Path, str]:
    """The demo, run from the command line: its output folder and what it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    level, threads = logging.getLogger("vte_compile").level, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ASSETS", assets)
        command = ["demo", "--out", str(out), "--questions", str(QUESTIONS), "--no-compile", "--device", "cpu"]
        result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, command)
    logging.getLogger("vte_compile").setLevel(level)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, (result.output, result.exception)
    return out, result.stdout


@needs_model
def test_demo_writes_and_names_everything(finished: tuple[Path, str]) -> None:
    out, said = finished
    files = {"demo.html", "report.json", *(f"{name}.png" for name in PLOTS)}
    assert {file.name for file in out.iterdir()} == files
    for name in files:
        assert str(out / name) in said
    for name in PLOTS:
        assert min(Image.open(out / f"{name}.png").size) > 400


@needs_model
def test_demo_shows_examples_and_the_table(finished: tuple[Path, str]) -> None:
    out, said = finished
    report = json.loads((out / "report.json").read_text())
    for example in report["examples"]:
        assert example["question"] in said
    for case in (*report["configurations"], *report["comparison"]["configurations"]):
        assert case["name"] in said
    table = said[said.index("as the full model") :]
    assert "…" not in table
    assert max(map(len, table.splitlines()[:30])) <= 80


@needs_model
def test_report(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert set(report) == set(
        "schema_version created command environment model plans settings configurations comparison examples samples "
        "seconds".split()
    )
    assert set(report["environment"]) == set(environment())
    assert report["settings"] | {"timed_runs": 0} == {
        "questions": QUESTIONS, "timed_questions": len(report["examples"]), "timed_runs": 0, "compiled": False,
    }  # fmt: skip
    layers = report["model"]["layers"]
    cases = {case["name"]: case for case in report["configurations"]}
    assert list(cases) == [FULL, NO_EXIT, LEARNED, WITH_SKIPS]
    assert [plan["skips"] for plan in report["plans"].values()] == [[], [7]]
    for name, case in cases.items():
        assert set(case) == set(
            "name kind accuracy agreement mean_cost exit_histogram prefill_flops answer_flops kv_bytes "
            "questions_per_s by_type prefill_s prefill_min_s prefill_max_s decode_tokens_per_s".split()
        ), name
        assert sum(case["exit_histogram"].values()) == QUESTIONS
        assert 1 <= case["mean_cost"] <= layers
        assert 0 < case["prefill_min_s"] <= case["prefill_s"] <= case["prefill_max_s"]
    assert cases[NO_EXIT]["agreement"]["value"] == 1.0  # without an exit, optimize() changes nothing
    comparison = {case["name"]: case for case in report["comparison"]["configurations"]}
    assert [case["kind"] for case in comparison.values()] == "full plan plan static random attention oracle".split()
    for name in (FULL, LEARNED, WITH_SKIPS):  # found in another way: by one prompt at a time
        for measure in ("agreement", "accuracy"):
            found = comparison[name]["measures"][measure]
            assert found["value"] == pytest.approx(cases[name][measure]["value"])
            assert found["low"] <= found["value"] <= found["high"]
    budget = comparison[LEARNED]["measures"]["total_flops"]["value"]
    for name in ("static exit", "random dropping", "FastV"):
        assert comparison[name]["measures"]["total_flops"]["value"] <= budget
    exits = {sample["exit_layer"] for sample in report["samples"]}
    assert exits <= {1, 3, 5, -1}
    assert len(report["samples"]) == QUESTIONS
    assert len(report["examples"]) == len({example["type"] for example in report["examples"]})


@needs_model
def test_page_is_complete_in_itself(finished: tuple[Path, str]) -> None:
    out, _ = finished
    page = (out / "demo.html").read_text(encoding="utf-8")
    report = json.loads((out / "report.json").read_text())
    parser = _References()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.tags
    assert all(reference.startswith("data:") for reference in parser.found)
    assert "url(" not in page
    assert "@import" not in page
    assert "$" not in page  # every placeholder was filled
    pictures = [r for r in parser.found if r.startswith("data:image/png;base64,")]
    assert len(pictures) == len(PLOTS) + len(report["examples"])
    for picture in pictures:
        assert base64.b64decode(picture.partition(",")[2]).startswith(b"\x89PNG")
    for example in report["examples"]:
        assert example["question"] in page
    for case in (*report["configurations"], *report["comparison"]["configurations"]):
        assert f"<td>{case['name']}</td>" in page


@needs_model
@needs_plan
@pytest.mark.parametrize("name", ["plan", "plan_skips"])
def test_shipped_plans_are_for_the_shipped_model_and_keep_their_promise(name: str) -> None:
    plan = Plan.from_pretrained(ASSETS / name)
    plan.check(LlavaForConditionalGeneration.from_pretrained(ASSETS / "model", local_files_only=True))
    made = json.loads((ASSETS / name / "calibration.json").read_text())
    thresholds = [row["threshold"] for row in made["layers"] if row["threshold"] is not None]
    assert [exit_.threshold for exit_ in plan.exits] == pytest.approx(thresholds)
    assert bool(plan.skips) == (name == "plan_skips")
    certificate = made["certificate"]
    assert certificate["max_disagreement"] == 0.02
    assert certificate["upper_bound"] <= 0.02
    assert made["speedup"] > 1.2


@needs_model
@needs_plan
def test_shipped_plan_agrees_with_the_full_model() -> None:
    demo = Demo(1, compile=False, device="cpu")
    examples = demo.answer_examples()
    assert len(examples) == len({e.question.type for e in examples})
    assert sum(e.full.tokens == e.learned.tokens for e in examples) >= len(examples) - 1
    assert any(e.learned.exit_layer >= 0 for e in examples)
