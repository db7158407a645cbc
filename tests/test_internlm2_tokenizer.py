"""InternLM2's tokenizer without its code: ids and texts are those of the authors' class.

data/internlm2_tokenizer.npz holds what InternLM2Tokenizer (the code beside InternLM2's and InternVL's checkpoints, run
aside with sentencepiece 0.2.3 and transformers 4.46.3) gives: ids of some texts, and the texts of those ids, and of
others that no text gives, without special tokens. Its two models were trained on a few words with InternLM2's settings
(byte pairs, single bytes for what is unknown, digits apart): "prefix" puts a blank in front of texts, "plain" does not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_internvl import VARIANTS, write_internvl
from tiny_models import DATA

from vte_compile.errors import InputError
from vte_compile.families import internlm2_tokenizer
from vte_compile.families.internlm2_tokenizer import MODEL, is_internlm2, load_internlm2_tokenizer
from vte_compile.loading import load_processor

INTERNLM2 = list(VARIANTS)[1]


@functools.cache
def golden() -> dict[str, Any]:
    with np.load(DATA / "internlm2_tokenizer.npz") as data:
        models = {name: data[f"{name}.model"].tobytes() for name in ("prefix", "plain")}
        return {"models": models, **json.loads(data["golden"].tobytes())}


def write(folder: Path, name: str, **changed: Any) -> Path:
    """The files of a checkpoint's tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_bytes(golden()["models"][name])
    config = golden()[name]["config"] | changed
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["prefix", "plain"])
def test_ids_and_texts_are_the_authors(tmp_path: Path, name: str) -> None:
    """Blanks, line breaks, other scripts, bytes, added tokens that replace pieces and others, a piece that is whole."""
    ours, want = load_internlm2_tokenizer(write(tmp_path, name)), golden()[name]
    assert ours(golden()["texts"])["input_ids"] == want["ids"][: len(golden()["texts"])]
    assert ours.batch_decode(want["ids"], skip_special_tokens=True) == want["decoded"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == ("<s>", "</s>", "</s>", "<unk>")
    assert ours.model_max_length == 8192


def test_files_of_former_transformers(tmp_path: Path) -> None:
    """Ids in added_tokens.json, and what is special in special_tokens_map.json."""
    config = golden()["prefix"]["config"]
    decoder, special = config["added_tokens_decoder"], config["additional_special_tokens"]
    folder = write(tmp_path, "prefix", added_tokens_decoder=None, additional_special_tokens=None)
    ids = {fields["content"]: int(token) for token, fields in decoder.items()}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": special}))
    ours = load_internlm2_tokenizer(folder)
    assert ours(golden()["texts"])["input_ids"] == golden()["prefix"]["ids"][: len(golden()["texts"])]
    assert ours.decode(list(ids.values()), skip_special_tokens=True) == ""


def test_processor_of_a_checkpoint(tmp_path: Path) -> None:
    """Chats begin with <s>, as the authors' do; what is saved is a tokenizer of transformers'."""
    folder = write(write_internvl(tmp_path / "checkpoint", **VARIANTS[INTERNLM2]), "prefix")
    assert is_internlm2(folder)
    ours: Any = load_processor(folder)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    ids = ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"][0]
    start, image = (ours.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<IMG_CONTEXT>"))
    assert (ids[:2], ours.image_token_id) == ([1, start], image)
    question = "<|im_start|>user\nWhat is this?<|im_end|><|im_start|>assistant\n"
    at = golden()["texts"].index(question)
    assert ids[-len(golden()["prefix"]["ids"][at]) + 1 :] == golden()["prefix"]["ids"][at][1:]
    ours.save_pretrained(tmp_path / "saved")
    again: Any = type(ours).from_pretrained(tmp_path / "saved")
    assert again.tokenizer(golden()["texts"])["input_ids"] == ours.tokenizer(golden()["texts"])["input_ids"]
    (folder / "tokenizer.json").write_text("{}")
    assert not is_internlm2(folder)  # a fast one is there: transformers' business


def test_what_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = golden()["plain"]["config"]
    gap = {"400": {"content": "<late>", "special": True}}
    folder = write(tmp_path, "plain", added_tokens_decoder=config["added_tokens_decoder"] | gap)
    with pytest.raises(InputError, match=r"<late> has id 400 in its files, but 366 follows from tokenizer\.model"):
        load_internlm2_tokenizer(folder)
    (folder / MODEL).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"tokenizer\.model: cannot read it"):
        load_internlm2_tokenizer(folder)
    (folder / MODEL).write_bytes(b"")
    with pytest.raises(InputError, match="expected sentencepiece's model of byte pairs"):
        load_internlm2_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot read it"):
        is_internlm2(folder)

    def missing() -> Any:
        raise ImportError("protobuf")

    monkeypatch.setattr(internlm2_tokenizer, "import_protobuf", missing)
    with pytest.raises(InputError, match="reading it needs protobuf: pip install protobuf"):
        load_internlm2_tokenizer(write(tmp_path, "plain"))
