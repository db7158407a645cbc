"""Samples from conversations with images, through the processor's chat template."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.image_utils import load_image

from vte_compile.errors import InputError
from vte_compile.tuning.batches import image_token_ids
from vte_compile.tuning.samples import Sample, check_question

if TYPE_CHECKING:
    from PIL import Image

# How LLaVA's data name the speakers.
_ROLES = {"human": "user", "gpt": "assistant"}
_PLACEHOLDER = "<image>"
_IMAGE_SOURCES = ("image", "url", "path", "base64", "image_url")
Message = dict[str, Any]
"""`role`, and `content` as parts: {"type": "text", "text"} or {"type": "image", "image"}."""


def read_conversation(item: object, name: str, processor: Any | None) -> Sample | None:
    """The sample of one conversation; None if it has no image.

    Args:
        item: A list of messages, or a mapping with such, see :func:`vte_compile.tuning.samples.read_samples`.
        name: Of the sample, for messages.
        processor: The model's processor.

    Raises:
        InputError: It is no conversation, or the processor or its chat template does not do what is needed.
    """
    messages = _messages(item, name)
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        return None
    _check_processor(processor, name)
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError(f"{name}: no question: the message before the answer has to be the user's.")
    try:
        inputs = _processed(processor, prompt, name)
        answer = _answer(processor, prompt, messages[-1], name) if answered else None
    except InputError:
        raise
    except Exception as error:  # templates and processors of all models raise many kinds
        raise InputError(
            f"{name}: the processor or its chat template failed: {type(error).__name__}: {error}"
        ) from error
    check_question(inputs["input_ids"][0], image_token_ids(processor), name)
    return Sample.of(inputs, answer, name)


def _check_processor(processor: Any | None, name: str) -> None:
    if processor is None or not hasattr(processor, "apply_chat_template"):
        raise InputError(f"{name}: conversations need the model's processor: pass processor=.")
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{name}: has images, but {type(processor).__name__} has no image processor.")
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{name}: {type(processor).__name__} has no chat template: set processor.chat_template to the one that the "
            "model was trained with, or pass processor outputs."
        )


def _messages(item: object, name: str) -> list[Message]:
    """The conversation's messages, with all images in their places."""
    beside: list[Any] = []
    given: Any = item
    if isinstance(item, Mapping):
        if "role" in item:
            raise InputError(f"{name} is a message: pass a list of conversations, each a list of messages.")
        given = item.get("messages") or item.get("conversations") or _question_and_answer(item, name)
        images = item.get("images") or item.get("image") or []
        beside = list(images) if isinstance(images, list | tuple) else [images]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise InputError(f"{name}: expected a conversation (a list of messages), got {type(given).__name__}.")
    messages = [_message(message, f"{name}, message {index}") for index, message in enumerate(given)]
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if beside and not parts:
        # No place is marked: in front of the first question, as processors' templates have it.
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        parts = [{"type": "image", "image": None} for _ in beside]
        first["content"] = parts + first["content"]
    holes = [part for part in parts if part["image"] is None]
    if len(holes) != len(beside):
        raise InputError(f"{name}: {len(holes)} image placeholders, but {len(beside)} images beside the messages.")
    for part, image in zip(holes, beside, strict=True):
        part["image"] = image
    for index, part in enumerate(parts):
        part["image"] = _image(part["image"], f"{name}, image {index}")
    return messages


def _question_and_answer(item: Mapping[str, Any], name: str) -> list[Message]:
    if item.get("question") is None:
        raise InputError(
            f"{name}: expected messages, conversations, or question and answer; it has {', '.join(map(str, item))}."
        )
    messages = [{"role": "user", "content": item["question"]}]
    if item.get("answer") is not None:
        messages.append({"role": "assistant", "content": item["answer"]})
    return messages


def _message(message: object, name: str) -> Message:
    """A message in transformers' format or LLaVA's, its content as parts; images without a source are None."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name}: expected a message with role and content, got {type(message).__name__}.")
    role = message.get("role", message.get("from"))
    role = _ROLES.get(role, role)
    content = message.get("content", message.get("value"))
    if role not in ("system", "user", "assistant"):
        raise InputError(f"{name}: its role is {role!r}; expected system, user or assistant.")
    if isinstance(content, str):
        texts = content.split(_PLACEHOLDER)
        if len(texts) > 1:  # the line break behind a placeholder is the template's matter
            texts = [text.strip("\n") for text in texts]
        parts: list[Message] = []
        for index, text in enumerate(texts):
            parts += [{"type": "image", "image": None}] * (index > 0)
            parts += [{"type": "text", "text": text}] * bool(text)
        return {"role": role, "content": [dict(part) for part in parts]}
    if not isinstance(content, Sequence):
        raise InputError(f"{name}: expected text or a list of parts as content, got {type(content).__name__}.")
    return {"role": role, "content": [_part(part, name) for part in content]}


def _part(part: object, name: str) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if isinstance(part, Mapping) and kind in ("image", "image_url"):
        # Rows of a dataset have all fields of all parts, as None where a part lacks them.
        source = next((part[key] for key in _IMAGE_SOURCES if part.get(key) is not None), None)
        return {"type": "image", "image": source}
    raise InputError(f"{name}: a part of type {kind!r}; expected text or image.")


def _image(source: Any, name: str) -> Image.Image:
    """A picture from a PIL image, a path, a URL, base64, or what datasets stores for an image."""
    try:
        if isinstance(source, Mapping):
            stored = source.get("bytes")
            # As base64, which load_image() takes, as it takes paths.
            source = base64.b64encode(stored).decode() if stored else source.get("url") or source.get("path")
        return load_image(str(source) if isinstance(source, Path) else source)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: cannot be read: {error}") from error


def _processed(processor: Any, prompt: list[Message], name: str) -> dict[str, Any]:
    written = _written(processor, prompt)
    for part in prompt[-1]["content"]:
        # Some templates leave out what they do not expect, such as text in parts.
        if part["type"] == "text" and part["text"].strip() not in written:
            raise InputError(
                f"{name}: the chat template leaves out the text {part['text'][:40]!r}: it gives {written!r}."
            )
    outputs = processor.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(outputs)


def _written(processor: Any, prompt: list[Message]) -> str:
    """The prompt as the template writes it, up to where the answer begins."""
    return str(processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def _answer(processor: Any, prompt: list[Message], last: Message, name: str) -> list[int]:
    """The tokens that the template puts behind the prompt for the answer, up to the end token if it has one."""
    if not any(part.get("text", "").strip() for part in last["content"]):
        raise InputError(f"{name}: empty answer.")
    before = _written(processor, prompt)
    whole = str(processor.apply_chat_template([*prompt, last], tokenize=False))
    if not whole.startswith(before):
        raise InputError(
            f"{name}: the chat template writes the prompt otherwise when an answer follows: it ends {before[-40:]!r} "
            f"without, and is part of {whole[-80:]!r} with one."
        )
    tokenizer = processor.tokenizer
    text, end = whole[len(before) :], tokenizer.eos_token
    text = text.partition(end)[0] + end if end and end in text else text.rstrip()
    if not text:
        raise InputError(f"{name}: empty answer: the chat template leaves it out.")
    prefix, both = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (before, before + text))
    if both[: len(prefix)] == prefix:
        return list(both[len(prefix) :])
    # A token spans the border; what the model is to say begins behind the prompt's tokens all the same.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
