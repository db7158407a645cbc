"""The tokenizer of an Eagle 2 checkpoint, without the code beside it."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from vte_compile.errors import InputError

IMAGE_TOKEN = "<IMG_CONTEXT>"
"""One for each visual token."""


def load_tokenizer(name: Any, **hub: Any) -> Any:
    """The tokenizer in a folder or hub repository.

    Args:
        name: Folder, or hub id.
        hub: Of transformers' from_pretrained (``revision``, ``token`` ...).

    Raises:
        InputError: There is none.
    """
    try:
        # Else transformers reads config.json, and asks whether to run the authors' code that it names.
        return AutoTokenizer.from_pretrained(name, **hub, config=PreTrainedConfig(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer: {error}") from error


def image_token_id(tokenizer: Any, name: Any, token: str = IMAGE_TOKEN) -> int:
    """The id of the token for visual tokens.

    Raises:
        InputError: The tokenizer has none.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise InputError(f"{name}: its tokenizer has no {token}.")
    return int(found)
