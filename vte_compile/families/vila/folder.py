"""The published layout of a VILA checkpoint: where it is, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vte_compile.errors import InputError
from vte_compile.families.local_folder import local_folder

LLM, VISION_TOWER, MM_PROJECTOR = "llm", "vision_tower", "mm_projector"
"""The folders of a checkpoint."""
_SENTINEL = "<vila/sentinel>"


def checkpoint_folder(name: Any, **hub: Any) -> Path:
    """The folder of a checkpoint, downloaded if `name` is no folder; its parts may be in a folder ``model`` in it.

    Raises:
        InputError: There is no such folder, and no such repository on the hub.
    """
    folder = local_folder(name, **hub)
    return folder / "model" if (folder / "model").is_dir() else folder


def load_tokenizer(folder: Path, media_tokens: Sequence[str]) -> Any:
    """The tokenizer of a checkpoint, with the tokens of media added that it lacks, in the order in which VILA does.

    Raises:
        InputError: There is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / LLM, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / LLM}: no tokenizer: {error}") from error
    # Where the checkpoint has them already (NVILA), nothing is added. The sentinel is one of VILA's training.
    tokenizer.add_tokens([_SENTINEL, *media_tokens], special_tokens=True)
    if tokenizer.pad_token is None:  # any will do: attention masks say what is padding
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's end of sequence, and the special one that its chat template writes
    behind answers."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = tokenizer(text.rpartition(_SENTINEL)[2], add_special_tokens=False).input_ids
        ids += [token for token in behind[:1] if token in tokenizer.added_tokens_decoder]
    return list(dict.fromkeys(ids))
