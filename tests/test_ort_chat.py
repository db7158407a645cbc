"""Chats with the shipped model's ONNX engine: its answers, streaming, stop strings, turns, and the command line.

The model's own processor and ``optimize()`` say what is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import _restore_log_level, run  # noqa: F401
from test_ort_folder import BLOCKED, ROOT
from tiny_models import one_thread  # noqa: F401

import vte_compile
from vte_compile import Plan, load_engine, optimize
from vte_compile.demo.data import Assets
from vte_compile.errors import InputError
from vte_compile.export.ort_engine import OnnxEngine
from vte_compile.loading import load_model, load_processor, prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ASSETS = Assets.find()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The optimized model, its processor, and the engine's folder."""
    fast = optimize(load_model(ASSETS.model, "cpu"), Plan.from_pretrained(ASSETS.plan), compile=False)
    processor = load_processor(ASSETS.model)
    folder = tmp_path_factory.mktemp("shipped") / "engine"
    vte_compile.export(fast, folder, target="onnxruntime", processor=processor)
    return fast, processor, folder


@pytest.fixture(scope="module")
def engine(shipped) -> OnnxEngine:
    engine = load_engine(shipped[2], threads=1)
    assert isinstance(engine, OnnxEngine)
    return engine


@pytest.mark.parametrize("form", ["staged", "single"])
def test_answers_are_the_models(shipped, form: str) -> None:
    fast, processor, folder = shipped
    engine = load_engine(folder, threads=1, form=form)
    questions = ASSETS.spread(32)
    seen = set()
    for start in range(0, len(questions), 8):
        batch = questions[start : start + 8]
        pictures = [Image.open(question.image).convert("RGB") for question in batch]
        texts = [prompt(processor, question.text, 1) for question in batch]
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        known = fast.generate(**inputs, do_sample=False, max_new_tokens=10)
        expected = known[:, inputs["input_ids"].shape[1] :].tolist()
        together = engine.generate(**inputs, max_new_tokens=10)
        assert together.tokens.tolist() == expected
        assert together.exit_layer.tolist() == known.exit_layer.tolist()
        for question, tokens, layer in zip(batch, expected, known.exit_layer.tolist(), strict=True):
            answer = engine.chat(question.text, [question.image], max_new_tokens=10)
            assert answer.tokens == tokens[: len(answer.tokens)]
            assert answer.text == processor.decode(tokens, skip_special_tokens=True)
            assert answer.exit_layer == layer
            seen.add(layer)
    assert len(seen) >= 3


def test_a_batch_of_questions(engine: OnnxEngine) -> None:
    questions = [*ASSETS.spread(3), ASSETS.spread(40)[33]]
    images = [questions[0].image, None, [questions[2].image], questions[3].image]
    prompts = [engine.prompt(question.text, image) for question, image in zip(questions, images, strict=True)]
    features = [prompt.features for prompt in prompts if prompt.features is not None]
    answer = engine.generate([prompt.ids for prompt in prompts], image_features=features)
    for b, (question, image) in enumerate(zip(questions, images, strict=True)):
        alone = engine.chat(question.text, image)
        assert answer.tokens[b, : answer.lengths[b]].tolist() == alone.tokens
        assert answer.exit_layer[b] == alone.exit_layer


def test_logits_are_the_models(shipped, engine: OnnxEngine) -> None:
    fast, processor, _ = shipped
    question = ASSETS.questions[3]
    picture = Image.open(question.image).convert("RGB")
    inputs = processor(text=prompt(processor, question.text, 1), images=[picture], return_tensors="pt")
    with torch.no_grad():
        expected = fast(**inputs).logits[:, -1]
    torch.testing.assert_close(torch.from_numpy(engine.prefill(**inputs).logits), expected, rtol=1e-4, atol=1e-4)


def long_question() -> tuple[str, Path]:
    """With an answer of several words."""
    question = next(q for q in ASSETS.questions if len(q.answer.split()) > 4)
    return question.text, question.image


def test_text_streams(engine: OnnxEngine) -> None:
    text, image = long_question()
    pieces: list[str] = []
    answer = engine.chat(text, [image], on_text=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text == engine.processor.decode(answer.tokens)
    assert answer.messages[-1] == {"role": "assistant", "content": answer.text}

    class Enough(Exception):
        pass

    def interrupt(piece: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        engine.chat(text, [image], on_text=interrupt)


def test_stop_strings(engine: OnnxEngine) -> None:
    text, image = long_question()
    whole = engine.chat(text, [image]).text.split()
    pieces: list[str] = []
    answer = engine.chat(text, [image], stop_strings=f"{whole[1]} {whole[2]}", on_text=pieces.append)
    assert "".join(pieces) == answer.text == f"{whole[0]} "
    assert len(answer.tokens) == 3
    assert engine.chat(text, [image], max_new_tokens=2).text == " ".join(whole[:2])


def test_turns_and_pictures_in_messages(shipped, engine: OnnxEngine) -> None:
    fast, processor, _ = shipped
    first, second = ASSETS.questions[0], ASSETS.questions[100]
    answer = engine.chat(first.text, [first.image])
    picture = Image.open(second.image)
    more = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": second.text}]}
    again = engine.chat([*answer.messages, more])
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": second.text}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    pictures = [Image.open(question.image).convert("RGB") for question in (first, second)]
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    assert again.prompt_tokens == inputs["input_ids"].shape[1]
    known = fast.generate(**inputs, do_sample=False, max_new_tokens=10)
    assert again.tokens == known[0, inputs["input_ids"].shape[1] :].tolist()
    assert again.exit_layer == int(known.exit_layer[0])


def test_text_alone_and_seeds(engine: OnnxEngine) -> None:
    answer = engine.chat("what is 3 plus 8?")
    assert answer.exit_layer == -1
    drawn = [engine.chat("what is 3 plus 8?", temperature=20.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    # The model's generation_config.json has this limit.
    assert len(engine.chat("what is 3 plus 8?", temperature=50.0, seed=3, eos_token_ids=[]).tokens) == 10


def test_bad_chats(engine: OnnxEngine) -> None:
    with pytest.raises(InputError, match="put the pictures of a chat into its messages"):
        engine.chat([{"role": "user", "content": "hi"}], ["picture.png"])
    with pytest.raises(InputError, match=r"messages\[0\]\.content\[0\] nowhere.png"):
        engine.chat("hi", ["nowhere.png"])
    with pytest.raises(TypeError, match="abacus"):
        engine.chat("hi", abacus=1)


# ---------------------------------------------------------------- without torch, and the command line


def test_in_a_process_without_torch(shipped, engine: OnnxEngine, tmp_path: Path) -> None:
    text, image = long_question()
    code = (
        f"{BLOCKED}\n"
        "answer = vte_compile.load_engine(sys.argv[1], threads=1).chat(sys.argv[2], [sys.argv[3]])\n"
        "print(json.dumps([answer.text, answer.tokens, answer.exit_layer]))\n"
        "from vte_compile.cli import main\n"
        "sys.argv[1:] = ['generate', '--engine', sys.argv[1], '--image', sys.argv[3], sys.argv[2]]\n"
        "main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, shipped[2], text, image],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answer = engine.chat(text, [image])
    assert json.loads(process.stdout.splitlines()[0]) == [answer.text, answer.tokens, answer.exit_layer]
    assert process.stdout.splitlines()[1] == answer.text


def test_generate_command(shipped, engine: OnnxEngine) -> None:
    folder = shipped[2]
    text, image = long_question()
    answer = engine.chat(text, [image])
    result = run("generate", "--engine", folder, "--image", image, "--threads", 1, text)
    assert result.stdout == f"{answer.text}\n"
    assert f"left after layer {answer.exit_layer} (of layers 0..7)" in result.stderr
    assert f"{answer.prompt_tokens} prompt tokens, {len(answer.tokens)} new" in result.stderr
    word = answer.text.split()[1]
    stopped = run("generate", "--engine", folder, "--image", image, "--stop", word, text)
    assert stopped.stdout == f"{answer.text.split()[0]} \n"
    options = ("--temperature", 30, "--top-k", 50, "--top-p", 0.99)
    drawn = [run("generate", "--engine", folder, *options, "--seed", s, "what is 3 plus 8?").stdout for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    as_model = run("generate", ASSETS.model, text, "--image", image, "--plan", ASSETS.plan, "--no-compile")
    assert as_model.stdout == f"{answer.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "{folder}", "one", "two"), "expected --engine DIR PROMPT, got 2 words"),
        (("one",), "expected MODEL PROMPT, got 1 words"),
        (("--engine", "{folder}", "--no-exit", "--plan", "x", "hi"), "--plan, --no-exit: an option of a model"),
        (("model", "hi", "--provider", "cpu"), "--provider: an option of --engine"),
        (("--engine", "{folder}", "--image", "none.png", "hi"), "--image none.png: "),
        (("--engine", "{folder}", "--provider", "tpu", "hi"), "provider: 'tpu' is unknown"),
        (("--engine", "nowhere", "hi"), "nowhere/manifest.json: No such file"),
    ],
)
def test_bad_commands(arguments, message: str, shipped) -> None:
    result = run("generate", *(argument.format(folder=shipped[2]) for argument in arguments), code=1)
    assert message in result.stderr
    assert "Traceback" not in result.output
