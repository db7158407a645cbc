"""The command analyze: a table, a page, plots and JSON from chats in a file, and its errors."""

import json
import sys
from pathlib import Path

import pytest
from test_cli import LAYERS, _restore_log_level, llama, llava, picture, run  # noqa: F401
from test_cli_eval import answering, chats  # noqa: F401
from tiny_models import one_thread  # noqa: F401


def test_analyze(answering: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    out, work = tmp_path / "new" / "out", tmp_path / "work"
    command = ("analyze", answering, "--data", chats, "--max-new-tokens", 3, "--work", work)
    said = run(*command, "--out", out).stdout
    numbers = json.loads((out / "analysis.json").read_text())
    assert len(numbers["samples"]) == 3
    assert numbers["answered"] == 2
    assert [row["layer"] for row in numbers["layers"]] == list(range(LAYERS))
    assert "3 samples, 2 of them with answers" in said
    assert all(str(file) in said for file in out.iterdir())
    assert len(list(work.glob("analysis-*.json"))) == 3

    run(*command, "--out", tmp_path / "fewer", "--samples", 2)
    fewer = json.loads((tmp_path / "fewer" / "analysis.json").read_text())
    assert [each["key"] for each in fewer["samples"]] == [each["key"] for each in numbers["samples"][:2]]


def test_analyze_has_help() -> None:
    assert "--debug" in run("analyze", "--help").output
    assert "analyze" in run("--help").output


def test_bad_input(llava, llama, chats, tmp_path, monkeypatch) -> None:  # noqa: F811
    (tmp_path / "text.json").write_text(json.dumps([{"question": "what is this"}] * 3))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((llava, "--data", tmp_path / "none.json"), "none.json: cannot be read"),
        ((llava, "--data", tmp_path / "text.json"), "all 3 are text only"),
        ((llava, "--data", chats, "--out", tmp_path / "file"), "cannot be written"),
    ):
        result = run("analyze", "--out", tmp_path / "out", *arguments, code=1)
        assert "error: " in result.stderr
        assert message in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = run("analyze", tmp_path / "no model", "--data", chats, "--out", tmp_path / "out", code=1)
    assert "pip install" in missing.stderr


@pytest.mark.parametrize("count", ["1", "none"])
def test_bad_count(count, llava, chats) -> None:  # noqa: F811
    assert "--samples" in run("analyze", llava, "--data", chats, "--samples", count, code=2).output
