"""The command line: every command on tiny random models, its errors, and how little --help loads."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from vte_compile import GateExit, Plan, SkippedAttention, StaticExit
from vte_compile.cli import app
from vte_compile.errors import PlanMismatchError
from vte_compile.fingerprint import Fingerprint
from vte_compile.loading import prompt

ROOT = Path(__file__).resolve().parent.parent
LAYERS, C = 4, 32
WORDS = "<pad> <s> </s> <unk> <image> user: assistant: what is this".split() + [f"w{i}" for i in range(30)]
TEMPLATE = (
    "<s> {% for m in messages %}user: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=C,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tokenizer(**extra: object) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names, **extra)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A LLaVA with random weights and its processor: 16 visual tokens."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_id=4, image_seq_length=16)
    config.vision_feature_layer = -1
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    LlavaProcessor(
        images,
        tokenizer(extra_special_tokens={"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A language model alone, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(text_config()).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (40, 32), (200, 30, 30)).save(file)
    return file


@pytest.fixture(scope="module")
def plan(llava, tmp_path_factory) -> Path:
    """For the LLaVA: a gate that never fires, and a static exit after layer 2."""
    folder = tmp_path_factory.mktemp("plan")
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    gate = GateExit(1, torch.ones(3, 2 * C), torch.zeros(2, 3), threshold=1.0)
    Plan([gate, StaticExit(2)], Fingerprint.of(model)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _restore_log_level():
    logger = logging.getLogger("vte_compile")
    before = logger.level
    yield
    logger.setLevel(before)


def run(*arguments: object, code: int = 0):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, json\nfrom vte_compile.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(json.loads(process.stderr.splitlines()[-1]))
    assert loaded & {"torch", "transformers", "numpy", "matplotlib", "PIL"} == set()
    for command in ("env", "optimize", "generate", "bench", "calibrate", "demo"):
        assert command in process.stdout


@pytest.mark.parametrize("command", ["env", "optimize", "generate", "bench", "calibrate", "demo"])
def test_every_command_has_help(command: str) -> None:
    assert "--debug" in run(command, "--help").output


def test_module_is_the_same_program() -> None:
    command = [sys.executable, "-m", "vte_compile", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    from vte_compile import __version__

    assert process.stdout.strip() == __version__


def test_env() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert str(torch.__version__).startswith(found["versions"]["torch"].partition("+")[0])
    assert set(found) == {"versions", "platform", "cpu", "threads", "gpus", "compiler", "commit"}
    expected = {"vte_compile", "python", "torch", "transformers", "triton", "onnx", "onnxruntime", "tensorrt", "numpy"}
    assert set(found["versions"]) == expected
    shown = run("env").stdout
    assert str(found["versions"]["transformers"]) in shown
    assert str(found["cpu"]["name"]) in shown


def test_optimize_shows_passes_and_saves(llava: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "fast"
    shown = run("optimize", llava, "--plan", plan, "--out", out, "--no-compile").stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert ["", "insert_exits", "2", "0"] in cells  # in prefill
    assert ["", "insert_exits", "0", "0"] in cells  # in decode, which never gates
    assert ["1", "gate", "1", "3"] in cells
    assert ["2", "static", "", ""] in cells
    # What was saved is a checkpoint with its plan, which the next call finds without --plan.
    assert AutoProcessor.from_pretrained(out).image_token == "<image>"
    again = run("optimize", out, "--no-compile").stdout
    assert "static" in again
    saved = LlavaForConditionalGeneration.from_pretrained(out).state_dict()
    for name, value in LlavaForConditionalGeneration.from_pretrained(llava).state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


def test_optimize_without_a_plan_is_lossless(llama: Path) -> None:
    assert "plan is empty" in run("optimize", llama, "--no-compile").stdout


def test_generate_answers_as_the_model(llava: Path, plan: Path, picture: Path) -> None:
    command = ("generate", llava, "what is this", "--image", picture, "--max-new-tokens", 6, "--no-compile")
    processor, model = AutoProcessor.from_pretrained(llava), LlavaForConditionalGeneration.from_pretrained(llava).eval()
    text = prompt(processor, "what is this", images=1)
    assert text.split() == "<s> user: <image> what is this assistant:".split()
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]

    full = run(*command, "--plan", plan, "--no-exit")
    assert full.stdout.split() == processor.decode(expected, skip_special_tokens=True).split()
    assert "never left" in full.stderr
    assert f"22 prompt tokens, {len(expected)} new" in full.stderr
    assert "left after layer 2" in run(*command, "--plan", plan).stderr


def test_generate_with_a_language_model_alone(llama: Path) -> None:
    result = run("generate", llama, "what is this", "--max-new-tokens", 3, "--no-compile")
    assert "never left" in result.stderr
    assert result.stdout.strip()


def test_generate_draws_with_a_seed_and_stops(llama: Path) -> None:
    command = ("generate", llama, "what is this", "--max-new-tokens", 8, "--no-compile")
    drawn = [run(*command, "--temperature", 5, "--top-k", 30, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = run(*command).stdout
    assert run(*command, "--temperature", 0).stdout == likeliest
    word = likeliest.split()[1]
    stopped = run(*command, "--stop", word).stdout
    assert stopped.split() == likeliest.split()[: likeliest.split().index(word)]


def test_bench(llava: Path, plan: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    sizes = ("--seq", 40, "--visual", 30, "--runs", 2, "--decode-tokens", 2)
    shown = run("bench", llava, "--plan", plan, *sizes, "--json", file, "--no-compile").stdout
    assert "plan" in shown
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "versions", "settings", "cases"}
    assert result["settings"]["seq"] == 40
    cases = {case["case"]: case for case in result["cases"]}
    assert list(cases) == ["original", "no exit", "exit 0", "exit 1", "exit 2", "plan"]
    assert [case["exit_layer"] for case in cases.values()] == [-1, -1, 0, 1, 2, 2]
    assert cases["no exit"]["time_ratio"] == cases["no exit"]["flop_ratio"] == 1
    assert cases["exit 0"]["flop_ratio"] < cases["exit 1"]["flop_ratio"] < 1
    assert cases["exit 0"]["kv_bytes"] < cases["no exit"]["kv_bytes"]
    for case in cases.values():
        for phase in ("prefill", "decode"):
            assert 0 < case[phase]["min_s"] <= case[phase]["median_s"] <= case[phase]["max_s"]
        assert case["quotient"] == pytest.approx(case["time_ratio"] / case["flop_ratio"])


def test_bench_of_a_plan_that_skips(llava: Path, tmp_path: Path) -> None:
    Plan(skips=[SkippedAttention(1)]).save_pretrained(tmp_path)
    file = tmp_path / "bench.json"
    sizes = ("--seq", 40, "--visual", 30, "--runs", 1, "--decode-tokens", 1)
    run("bench", llava, "--plan", tmp_path, *sizes, "--json", file, "--no-compile")
    cases = {case["case"]: case for case in json.loads(file.read_text())["cases"]}
    attention = 40 * 2 * 4 * C * C + 40 * 41 // 2 * 4 * C
    assert cases["no exit"]["prefill_flops"] - cases["plan"]["prefill_flops"] == attention
    assert cases["plan"]["kv_bytes"] * LAYERS == cases["no exit"]["kv_bytes"] * (LAYERS - 1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Questions about one-coloured pictures, which stand beside the file."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for n in range(60):
        Image.new("RGB", (32, 32), (4 * n, 250 - 4 * n, 100)).save(folder / f"{n}.png")
        lines.append({"image": f"{n}.png", "question": f"what is w{n % 30} w{n % 7} this"})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "chats.jsonl"


def test_calibrate(llava: Path, chats: Path, tmp_path: Path) -> None:
    out, file, plot = tmp_path / "plan", tmp_path / "new" / "report.json", tmp_path / "plots" / "exits.png"
    Plan(skips=[SkippedAttention(LAYERS - 1)]).save_pretrained(tmp_path / "skips")
    options = ("--target-speedup", 1.1, "--width", 8, "--compare-width", 2, "--max-new-tokens", 2, "--slack", 1)
    options += ("--base", tmp_path / "skips")
    shown = run("calibrate", llava, "--data", chats, "--out", out, "--json", file, "--plot", plot, *options).stdout
    assert Image.open(plot).width > 500
    assert "may exit" in shown
    assert "Gates of other widths" in shown
    assert "P(an answer differs) <=" in shown
    report = json.loads(file.read_text())
    plan = Plan.from_pretrained(out)
    used = {row["layer"]: row["threshold"] for row in report["layers"] if row["threshold"] is not None}
    assert {exit_.layer: exit_.threshold for exit_ in plan.exits} == pytest.approx(used)
    assert [exit_.width for exit_ in plan.exits] == [8] * len(used)
    assert sum(report["samples"].values()) == 60
    assert [skip.layer for skip in plan.skips] == [LAYERS - 1]
    run("optimize", llava, "--plan", out, "--no-compile")


def test_an_error_is_one_line(llama: Path, plan: Path) -> None:
    result = run("optimize", llama, "--plan", plan, "--no-compile", code=1)
    assert result.stderr.splitlines()[-1].startswith("error: fingerprint: this plan is for another model")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("where", ["before", "behind"])
def test_debug_shows_where_an_error_came_from(where: str, llama: Path, plan: Path) -> None:
    command = ["optimize", llama, "--plan", plan, "--no-compile"]
    result = run(*(["--debug", *command] if where == "before" else [*command, "--debug"]), code=1)
    assert isinstance(result.exception, PlanMismatchError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{tmp}/nowhere", "hi"), "nowhere: no such folder"),
        (("generate", "{tmp}", "hi"), "{tmp}: "),
        (("generate", "{llava}", "hi", "--image", "{tmp}/none.png"), "--image {tmp}/none.png"),
        (("generate", "{llama}", "hi", "--image", "{picture}", "--no-compile"), "takes no images"),
        (("generate", "{llava}", "hi", "--device", "cuda:77"), "device 'cuda:77'"),
        (("optimize", "{llava}", "--plan", "{tmp}"), "vte_plan.json"),
        (("calibrate", "{llava}", "--data", "{tmp}/none.json"), "{tmp}/none.json: cannot be read"),
        (("calibrate", "{llava}", "--data", "{chats}"), "60 in all. At least 149 are needed"),
        (("bench", "{llava}", "--seq", "5", "--visual", "5"), "text behind the last one"),
    ],
)
def test_bad_input(arguments, message, llava, llama, picture, chats, tmp_path) -> None:
    names = {"tmp": tmp_path, "llava": llava, "llama": llama, "picture": picture, "chats": chats}
    result = run(*(argument.format(**names) for argument in arguments), code=1)
    assert "error: " in result.stderr
    assert message.format(**names) in result.stderr
    assert "Traceback" not in result.output


def test_prompts_without_a_chat_template(llava: Path, llama: Path) -> None:
    processor = AutoProcessor.from_pretrained(llava)
    processor.chat_template = None
    assert prompt(processor, "what", images=2) == "<image>\n<image>\nwhat"
    assert prompt(processor, "<image> what", images=1) == "<image> what"
    assert prompt(AutoProcessor.from_pretrained(llama), "what") == "what"
