"""LaVIN through its processor: prompts and pixels as the authors make them, the command line, and an ONNX engine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_lavin import adapters, loaded, traced
from tiny_lavin import IMAGE_TOKEN, SIDE, TOKENS, inputs
from tiny_models import assert_close, one_thread  # noqa: F401
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from vte_compile import Oracle, StaticExit, export, load_engine, optimize
from vte_compile.cli import app
from vte_compile.errors import InputError
from vte_compile.families.lavin import LavinProcessor
from vte_compile.loading import load_model, load_processor
from vte_compile.oracle import embed

WORDS = ["<unk>", "<s>", "</s>", "Image:", "N/A", "Instruction:", "Response:", "What", "is", "this?"]
WORDS += [f"w{i}" for i in range(len(WORDS), 61)]
ASKED = [5, 7, 8, 9, 6]
"""Instruction: What is this? Response:"""


def processor() -> LavinProcessor:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return LavinProcessor(PreTrainedTokenizerFast(tokenizer_object=words, **names), loaded()[0].config)


def picture(width: int = 20, height: int = 9) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def question(*images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def test_prompts_and_pixels() -> None:
    ours, image = processor(), picture()
    with_image = ours.apply_chat_template(question(image), add_generation_prompt=True, tokenize=False)
    without = ours.apply_chat_template(question(), add_generation_prompt=True, tokenize=False)
    assert with_image == "Image: <image>Instruction: What is this?\nResponse:"
    assert without == "Image: N/A Instruction: What is this?\nResponse:"
    batch = ours(images=image, text=[with_image, without])
    visual = [IMAGE_TOKEN] * TOKENS
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [[1, 3, *visual, *ASKED], [1, 3, 4, *ASKED]]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    resized = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert_close(batch["pixel_values"][0], torch.from_numpy(expected).permute(2, 0, 1).float(), 1e-5)
    whole = ours.apply_chat_template(question(image), add_generation_prompt=True, tokenize=True, return_tensors="np")
    assert whole["input_ids"].tolist() == [rows[0]]
    with pytest.raises(InputError, match="The texts hold 1 <image>, but 2 images were given"):
        ours.apply_chat_template(question(image, image), tokenize=True)
    with pytest.raises(InputError, match="return_tensors='pt' or 'np'"):
        ours(text="Image: N/A", return_tensors="tf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its plan and processor."""
    path = tmp_path_factory.mktemp("lavin")
    loaded()[0].save_pretrained(path)
    adapters().save_pretrained(path)
    processor().save_pretrained(path)
    return path


def test_command_line(folder: Path, tmp_path: Path) -> None:
    """The plan beside the model, with LaVIN's adapters, is found."""
    file = tmp_path / "picture.png"
    picture().save(file)
    arguments = ["generate", str(folder), "What is this?", "--image", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--no-compile", "--max-new-tokens", "5"])
    assert result.exit_code == 0, result.output
    ours = load_processor(folder)
    given = ours.apply_chat_template(question(file.as_posix()), add_generation_prompt=True, tokenize=True)
    tokens = optimize(traced(), adapters()).generate(**given, max_new_tokens=5, do_sample=False)
    expected = ours.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(expected.split()) == 5
    assert " ".join(expected.split()) in " ".join(result.output.split())
    assert isinstance(load_model(folder), type(loaded()[0]))
    (folder / "tokenizer.json").rename(folder / "gone")
    with pytest.raises(InputError, match=re.escape("save LavinProcessor(tokenizer, model.config)")):
        load_processor(folder)
    (folder / "gone").rename(folder / "tokenizer.json")


@pytest.mark.slow
@pytest.mark.shows("ONNX Runtime", "lavin")
def test_onnx_engine(tmp_path: Path) -> None:
    """Of LaVIN-EAS: an exit, a skip, adapters with a router per prompt, and its modality token."""
    plan = replace(adapters(True), exits=[StaticExit(1)])
    fast, ours = optimize(traced(), plan), processor()
    engine: Any = load_engine(export(fast, tmp_path / "e", processor=ours, forms=("staged",)), threads=1)
    model, given = loaded()[0], inputs("tittt", "ttttittttt")
    embeds, visual = embed(model, given["input_ids"], given["pixel_values"])
    oracle = Oracle(model, plan)
    expected = oracle.forward(embeds, visual, given["attention_mask"])
    output = engine.prefill(**given)
    assert_close(torch.from_numpy(output.logits), expected.logits[:, -1], 1e-4)
    assert output.exit_layer.tolist() == [1, 1]
    answers = oracle.generate(embeds, visual, given["attention_mask"], max_new_tokens=8).tokens
    assert engine.generate(**given, max_new_tokens=8, eos_token_ids=[]).tokens.tolist() == answers
    prompt = ours.apply_chat_template(question(picture()), add_generation_prompt=True, tokenize=True)
    answer = engine.chat("What is this?", picture(), max_new_tokens=5, eos_token_ids=[])
    tokens = fast.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.tokens == tokens[0, prompt["input_ids"].shape[1] :].tolist()
