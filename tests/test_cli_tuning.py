"""The command line's search: its table, its files, and that it resumes."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_cli import LAYERS, llava, run  # noqa: F401

from vte_compile import Plan


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Questions about one-coloured pictures, which stand beside the file."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for n in range(3):
        Image.new("RGB", (32, 32), (60 * n, 250 - 60 * n, 100)).save(folder / f"{n}.png")
        lines.append({"image": f"{n}.png", "question": f"what is w{n} this"})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "chats.jsonl"


def test_search(llava: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    out, file, work = tmp_path / "plan", tmp_path / "new" / "ranking.json", tmp_path / "work"
    command = ("search", llava, "--data", chats, "--skips", 2, "--out", out, "--work", work, "--max-new-tokens", 2)
    shown = run(*command, "--json", file).stdout
    ranking = json.loads(file.read_text())
    plan = Plan.from_pretrained(out)
    assert [skip.layer for skip in plan.skips] == sorted(ranking["chosen"])
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in cells] == [str(layer) for layer in range(LAYERS)]
    assert {row[0]: row[3] for row in cells if row[3]} == {
        str(layer): f"no. {number}" for number, layer in enumerate(ranking["chosen"], 1)
    }
    assert f"{ranking['rounds'][0][0]['loss_increase']:+.4f}" == cells[0][1]
    assert run(*command).stdout.startswith(shown[: shown.index("The plan")])  # from what was kept
    run("optimize", llava, "--plan", out, "--no-compile")


def test_search_with_training(llava: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    sizes = ("--search-steps", 2, "--steps", 2, "--batch", 2, "--width", 4, "--router", "static", "--distill", 0.5)
    command = ("search", llava, "--data", chats, "--skips", 1, "--method", "redundancy", "--max-new-tokens", 2)
    shown = run(*command, *sizes, "--out", tmp_path, "--work", tmp_path / "work", "--seed", 3).stdout
    plan = Plan.from_pretrained(tmp_path)
    assert [(skip.adapter.width, skip.adapter.router.weights) for skip in plan.skips] == [(4, (1.0, 0.0))]
    assert len(plan.adapters) == LAYERS - 1
    assert "adapter" in shown
    run("optimize", llava, "--plan", tmp_path, "--no-compile")


def test_search_is_one_of_the_commands() -> None:
    assert "search" in run("--help").stdout
    assert "--debug" in run("search", "--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{tmp}/none.json", "--skips", 1), "{tmp}/none.json: cannot be read"),
        (("--data", "{chats}", "--skips", 1, "--steps", 3, "--width", 4), "--steps, --width: for --method redundancy"),
        (("--data", "{chats}", "--skips", 1, "--method", "redundancy", "--json", "x"), "--json: is for"),
        (("--data", "{chats}", "--skips", 1, "--method", "magic"), "method: expected one of ranking, redundancy"),
        (("--data", "{chats}", "--skips", LAYERS + 1), f"skips: expected 1 to {LAYERS}"),
    ],
)
def test_bad_input(arguments, message, llava: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    names = {"tmp": tmp_path, "chats": chats}
    result = run("search", llava, *(str(argument).format(**names) for argument in arguments), code=1)
    assert message.format(**names) in result.stderr
    assert "Traceback" not in result.output
