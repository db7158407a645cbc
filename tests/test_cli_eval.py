"""The command eval: a table, JSON and a plot from chats in a file, and its errors."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import LAYERS, TEMPLATE, _restore_log_level, llama, llava, picture, plan, run  # noqa: F401
from tiny_models import one_thread  # noqa: F401
from transformers import AutoProcessor

from vte_compile.tuning.evaluate import ATTENTION, FULL, ORACLE, RANDOM, STATIC


@pytest.fixture(scope="module")
def chats(picture: Path) -> Path:  # noqa: F811
    """Three questions, one of them without an answer."""
    file = picture.parent / "chats.jsonl"
    lines = [{"image": picture.name, "question": f"what is w{i}", "answer": f"w{i}"} for i in range(3)]
    del lines[2]["answer"]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def answering(llava: Path, tmp_path_factory) -> Path:  # noqa: F811
    """The LLaVA with a template that also knows answers."""
    folder = tmp_path_factory.mktemp("answering") / "llava"
    shutil.copytree(llava, folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = TEMPLATE.replace("user: ", "{{ m['role'] }}: ")
    processor.save_pretrained(folder)
    return folder


def test_eval(answering: Path, plan: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    numbers, plot = tmp_path / "new" / "eval.json", tmp_path / "plot.png"
    common = ("--max-new-tokens", 3, "--work", tmp_path / "work", "--no-compile")
    command = ("eval", answering, "--data", chats, "--plan", plan, *common)
    result = run(*command, "--json", numbers, "--out", plot)
    found = json.loads(numbers.read_text())
    assert found["matched"] == plan.name
    assert (found["samples"], found["answered"]) == (3, 2)
    names = [case["name"] for case in found["configurations"]]
    assert names == [FULL, plan.name, STATIC, RANDOM, ATTENTION, ORACLE]
    assert all(name in result.stdout for name in names)
    # The plan leaves behind layer 2 always, after asking a gate: the baselines may have its FLOPs.
    assert found["configurations"][1]["exit_layers"] == {str(k): 3 * (k == 2) for k in (*range(LAYERS), -1)}
    static = found["configurations"][2]
    assert static["layer"] == 2
    assert static["differences"]["agreement"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert plot.stat().st_size > 1000

    without = run(*command, "--no-baselines", "--json", numbers).stdout
    assert STATIC not in without
    assert [case["name"] for case in json.loads(numbers.read_text())["configurations"]] == names[:2]


def test_eval_has_help() -> None:
    assert "--debug" in run("eval", "--help").output
    assert "eval" in run("--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{tmp}/none.json", "--plan", "{plan}"), "none.json: cannot be read"),
        (("--data", "{chats}", "--plan", "{tmp}"), "vte_plan.json"),
        (("--data", "{chats}", "--plan", "{plan}", "--plan", "{plan}"), "the same name"),
    ],
)
def test_bad_input(arguments, message, llava, plan, chats, tmp_path) -> None:  # noqa: F811
    names = {"tmp": tmp_path, "plan": plan, "chats": chats}
    result = run("eval", llava, *(argument.format(**names) for argument in arguments), code=1)
    assert "error: " in result.stderr
    assert message in result.stderr
