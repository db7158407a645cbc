"""Samples from batches of a processor's outputs, padded on either side, with labels or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.families.decoder import VISUAL_TOKEN_FIELDS
from vte_compile.tuning.samples import Sample, check_question

_PIXELS = ("pixel_", "images")
"""How names of images begin: those of transformers, and of LLaVA's own code."""
IGNORE = -100
"""The label of a token that is no part of an answer, as in transformers."""


def read_batch(batch: Mapping[str, Any], name: str, processor: Any | None) -> Iterator[Sample | None]:
    """A sample for each row of a batch; None for rows without an image.

    Args:
        batch: `input_ids` [B, S], `attention_mask` [B, S], `labels` [B, S] (optional), `pixel_values` and whatever else
            the processor gave.
        name: Of the batch, for messages.
        processor: Knows the id of the image token; needed if there is more than one row.

    Raises:
        InputError: Shapes that do not fit, labels that are no answer at the end of the row, or images of which it
            cannot be known to which rows they belong.
    """
    tensors = {key: value for key, value in batch.items() if value is not None}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: {key} is a {type(value).__name__}: call the processor with return_tensors='pt'.")
    ids = tensors.pop("input_ids")
    if ids.ndim != 2:
        raise InputError(f"{name}: input_ids: expected [batch, tokens], got {list(ids.shape)}.")
    rows = len(ids)
    mask, labels = tensors.pop("attention_mask", None), tensors.pop("labels", None)
    if mask is None and rows > 1:
        raise InputError(f"{name}: {rows} rows without attention_mask: which tokens are padding cannot be known.")
    for key, value in (("attention_mask", mask), ("labels", labels)):
        if value is not None and value.shape != ids.shape:
            raise InputError(f"{name}: {key} {list(value.shape)} is not aligned with input_ids {list(ids.shape)}.")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    image_tokens = image_token_ids(processor)
    parts = _split(tensors, ids, real, image_tokens, name)
    for row in range(rows):
        where = f"{name}, row {row}" if rows > 1 else name
        tokens = ids[row, real[row]]
        visual = bool(torch.isin(tokens, tokens.new_tensor(image_tokens)).any())
        pixels = any(key.startswith(_PIXELS) and len(value) for key, value in parts[row].items())
        if visual and not pixels:
            raise InputError(f"{where}: input_ids has image tokens, but there are no pixel_values.")
        if not pixels:
            yield None
            continue
        if image_tokens and not visual:
            raise InputError(f"{where}: there are pixel_values, but no image token ({image_tokens}) in input_ids.")
        answer = None if labels is None else _answer(tokens, labels[row, real[row]], where)
        prompt = tokens if answer is None else tokens[: -len(answer)]
        check_question(prompt, image_tokens, where)
        own = {
            key: value[:, : len(prompt)] if value.shape == (1, len(tokens)) else value
            for key, value in parts[row].items()
        }
        inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])} | own
        yield Sample.of(inputs, answer, where)


def image_token_ids(source: Any | None) -> list[int]:
    """The ids of tokens that stand for visual features, from a processor or a model's config; empty if not known."""
    ids = {getattr(source, field, None) for field in VISUAL_TOKEN_FIELDS}
    return sorted(token for token in ids if isinstance(token, int))


def _answer(tokens: Tensor, labels: Tensor, name: str) -> tuple[int, ...]:
    """The labelled tokens, which have to be the last ones of the row."""
    answered = labels != IGNORE
    count = int(answered.sum())
    if count == 0:
        raise InputError(f"{name}: empty answer: all labels are {IGNORE}.")
    if not bool((labels == tokens)[answered].all()):
        raise InputError(
            f"{name}: labels are misaligned with input_ids: where a label is not {IGNORE}, it has to be the token of "
            "input_ids at the same place (the model shifts them itself)."
        )
    if not bool(answered[-count:].all()):
        raise InputError(
            f"{name}: the labels are not one answer at the end of the row, without a gap: label the last answer only, "
            "and let the row end with it."
        )
    return tuple(labels[answered].tolist())


def _split(
    tensors: Mapping[str, Tensor], ids: Tensor, real: Tensor, image_tokens: list[int], name: str
) -> list[dict[str, Tensor]]:
    """Everything of a batch but ids, mask and labels, row by row, without padding."""
    rows = len(ids)
    images = None
    if rows > 1 and "pixel_values" in tensors:
        images = _images_per_row(tensors, ids, real, image_tokens, name)
    parts: list[dict[str, Tensor]] = [{} for _ in range(rows)]
    for key, value in tensors.items():
        if value.shape == ids.shape:
            pieces = [value[row, real[row]][None] for row in range(rows)]
        elif rows == 1:
            pieces = [value]
        elif images is not None and value.ndim and len(value) == sum(images):
            pieces = list(value.split(images))
        elif value.ndim and len(value) == rows:
            pieces = list(value.split(1))
        else:
            raise InputError(f"{name}: it cannot be known what of {key} {list(value.shape)} belongs to which row.")
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece
    return parts


def _images_per_row(
    tensors: Mapping[str, Tensor], ids: Tensor, real: Tensor, image_tokens: list[int], name: str
) -> list[int]:
    """How many entries of pixel_values each row has: as many as runs of image tokens, or in proportion to them.

    Raises:
        InputError: Neither fits, or they contradict each other.
    """
    images = len(tensors["pixel_values"])
    if not image_tokens:
        raise InputError(
            f"{name}: which of {images} images belong to which of {len(ids)} rows cannot be known without the image "
            "token: pass the processor, or batches of one row."
        )
    visual = torch.isin(ids, ids.new_tensor(image_tokens)) & real
    before = torch.nn.functional.pad(visual[:, :-1], (1, 0))
    runs, tokens = (visual & ~before).sum(1).tolist(), visual.sum(1).tolist()
    candidates = []
    if sum(runs) == images:
        candidates.append(runs)
    # Images next to each other are one run, tiles of one image too; if all take the same number of tokens, that tells.
    sizes = tensors.get("image_sizes")
    same_size = sizes is None or len(sizes.unique(dim=0)) == 1
    if same_size and sum(tokens) and all(count * images % sum(tokens) == 0 for count in tokens):
        candidates.append([count * images // sum(tokens) for count in tokens])
    if not candidates or candidates[0] != candidates[-1]:
        raise InputError(
            f"{name}: which of {images} images belong to which row cannot be known: the rows have {runs} runs of image "
            f"tokens, {tokens} image tokens in all. Pass batches of one row."
        )
    return candidates[0]
