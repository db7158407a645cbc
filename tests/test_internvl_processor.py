"""InternVL's processor of the authors' layout: their prompts and pixels, the command line, engines.

The prompts are what the authors' conversation.py and chat() (OpenGVLab/InternVL) make of the same questions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_internvl import IMAGE, PATCH, SIDE, TOKENS, VARIANTS, VOCAB, inputs, write_internvl, write_tokenizer
from tiny_models import assert_close, one_thread  # noqa: F401
from typer.testing import CliRunner

from vte_compile import Plan, StaticExit, export, load_engine, optimize
from vte_compile.cli import app
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.internvl import load_internvl
from vte_compile.families.internvl_processor import InternVLChatProcessor
from vte_compile.families.tiles import tiles
from vte_compile.loading import load_model, load_processor

WORDS = ["user", "assistant", "system", "What", "is", "this?", "A", "cat."]
TILE = SIDE * PATCH
_FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
_LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001


def checkpoint(folder: Path, **changed: Any) -> Path:
    write_internvl(folder, **VARIANTS["qwen2"], **changed)
    write_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("internvl") / "checkpoint")


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def question(*images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            name,
            f"<|im_start|>system\n{system}<|im_end|>{line}"
            f"<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>{line}"
            f"<|im_start|>assistant\nA cat.<|im_end|>{line}<|im_start|>user\nWhat?<|im_end|>{line}"
            "<|im_start|>assistant\n",
        )
        for name, system, line in (
            ("Hermes-2", _FIRST, ""),
            ("internlm2-chat", _FIRST, ""),
            ("internvl2_5", _LATER, "\n"),
        )
    ],
)
def test_chats_are_the_authors(tmp_path: Path, template: str, expected: str) -> None:
    ours = InternVLChatProcessor.from_pretrained(checkpoint(tmp_path / "c", template=template))
    chat = [*question("a.png"), {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "What?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == expected
    own = ours.apply_chat_template([{"role": "system", "content": "Be brief."}, *chat], tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>")


@pytest.mark.parametrize(
    ("size", "count"), [((8, 8), 1), ((20, 9), 3), ((45, 20), 11), ((9, 40), 6), ((100, 70), 7)], ids=str
)
def test_pixels_are_tiles_of_the_picture(folder: Path, size: tuple[int, int], count: int) -> None:
    ours, image = load_processor(folder), picture(*size)
    made = ours(images=[image], text="<IMG_CONTEXT>\nWhat is this?", return_tensors="pt")
    cut = tiles(image, TILE, 1, 12)
    values = np.stack([np.asarray(tile, np.float32) / 255 for tile in cut])
    expected = (values - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert len(cut) == count
    assert_close(made["pixel_values"], torch.from_numpy(expected).permute(0, 3, 1, 2).float(), 1e-5)
    assert made["input_ids"].tolist() == [[IMAGE - 2, *[IMAGE] * (count * TOKENS), IMAGE - 1, 4, 5, 6]]


def test_batches_and_a_checkpoint_without_tiles(folder: Path, tmp_path: Path) -> None:
    ours, pictures = load_processor(folder), [picture(20, 9), picture(8, 8)]
    texts = ["<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat is this?", "What is this?"]
    batch = ours(images=pictures, text=texts, padding=True, return_tensors="pt")
    assert len(batch["pixel_values"]) == 4
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [4 * TOKENS, 0]
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - 3) + [1] * 3
    whole = ours.apply_chat_template(question(*pictures), tokenize=True, return_dict=True, return_tensors="pt")
    assert_close(whole["pixel_values"], batch["pixel_values"])
    with pytest.raises(InputError, match="videos: pass their frames as images"):
        ours(text="What", videos=[pictures])
    single = load_processor(checkpoint(tmp_path / "c", dynamic_image_size=False))
    assert len(single(images=pictures, text=texts, padding=True)["pixel_values"]) == 2


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    for number, (changed, message) in enumerate(
        (
            ({"template": "phi3-chat"}, "template: 'phi3-chat': expected one of Hermes-2, internlm2-chat"),
            ({"pad2square": True}, "pad2square True"),
            ({"use_thumbnail": False}, "use_thumbnail False"),
        )
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            load_processor(checkpoint(tmp_path / str(number), **changed))
    folder = tmp_path / "0"
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("phi3-chat", "Hermes-2"))
    (folder / "tokenizer.json").rename(folder / "gone")
    settings = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["internlm2.InternLM2", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no tokenizer"):  # tokenizer.model: tests/test_internlm2_tokenizer.py
        load_processor(folder)
    (folder / "gone").rename(folder / "tokenizer.json")
    assert load_processor(folder).image_token_id == IMAGE


def test_command_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    picture(20, 9).save(file)
    arguments = ["generate", str(folder), "What is this?", "--image", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--no-compile", "--max-new-tokens", "5"])
    assert result.exit_code == 0, result.output
    model, ours = load_model(folder), load_processor(folder)
    given = ours.apply_chat_template(
        question(file.as_posix()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**given, max_new_tokens=5, do_sample=False)
    expected = ours.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.split()
    assert " ".join(expected.split()) in " ".join(result.output.split())


def test_answers_end_where_messages_do(tmp_path: Path) -> None:
    """Whatever generation_config.json says; the authors' chat() passes that token itself."""
    folder = checkpoint(tmp_path / "c")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_internvl(folder).generation_config.eos_token_id == [7, VOCAB - 1]


@pytest.mark.slow
@pytest.mark.shows("ONNX Runtime", "internvl_chat")
def test_onnx_engine(folder: Path, tmp_path: Path) -> None:
    """Its pictures are this processor's business, which an engine's folder has."""
    model, ours = load_internvl(folder), load_processor(folder)
    fast = optimize(model, Plan([StaticExit(1)]), compile=False)
    engine: Any = load_engine(export(fast, tmp_path / "e", processor=ours, forms=("staged",)), threads=1)
    given = inputs()
    with torch.no_grad():
        expected = fast(**given)
    output = engine.prefill(**given)
    assert_close(torch.from_numpy(output.logits), expected.logits[:, -1], 1e-4)
    assert output.exit_layer.tolist() == [1, 1, -1]
    prompt = ours.apply_chat_template(
        question(picture(20, 9)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = engine.chat("What is this?", picture(20, 9), max_new_tokens=5, eos_token_ids=[])
    tokens = fast.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.tokens == tokens[0, prompt["input_ids"].shape[1] :].tolist()
