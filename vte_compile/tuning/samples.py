"""What tools of tuning learn from: prompts with images and their answers, one by one, from what a Trainer user has.

Accepted are conversations (a list, or a dataset with such a column; see conversations.py) and batches of a processor's
outputs, such as a DataLoader gives them (see batches.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vte_compile.errors import InputError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with images, and its answer.

    `inputs`: the processor's output of the prompt, batch 1, no padding; it ends where the answer begins. `answer`:
    token ids, with the end token if that is part of the labels; None: the full model's own answer is to be the label.
    `key`: a hash of the content, the same in each run. `name`: where it stands in the user's data, for messages.
    """

    inputs: Mapping[str, Tensor]
    answer: tuple[int, ...] | None
    key: str
    name: str = "sample"

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], answer: Iterable[int] | None, name: str = "sample") -> Sample:
        """A sample with the key of its content."""
        answer = None if answer is None else tuple(answer)
        return cls(inputs, answer, _key(inputs, answer), name)


def read_samples(samples: object, processor: Any | None = None) -> Iterator[Sample]:
    """The samples in `samples`, in order.

    Gates learn nothing of text-only ones: they are left out, with one warning at the end.

    Args:
        samples: An iterable of any of

            - conversations: lists of messages in transformers' format, or mappings (rows of a datasets.Dataset) with
              `messages`, with LLaVA's `conversations`, or with `question` and `answer`, and images in the messages or
              beside them as `image` or `images`. If the last message is the assistant's, it is the answer.
            - batches of a processor's outputs, padded on either side, with optional `labels` (-100 but for the answer).
            - samples.
        processor: For conversations, the model's processor. For batches of more than one row, anything that knows the
            id of the image token: the processor or the model's config.

    Returns:
        An iterator; `operator.length_hint()` tells how many samples there are at most, or 0 where that is not known.

    Raises:
        InputError: `samples` is none of these. While iterating: a sample cannot be used, or none has an image; the
            message names the sample.
    """
    if isinstance(samples, Mapping):
        what = (
            "one batch: pass a list of it" if "input_ids" in samples else "a mapping: pass one of its values (a split)"
        )
        raise InputError(f"samples: expected an iterable of samples, got {what}.")
    if isinstance(samples, str) or not (hasattr(samples, "__iter__") or hasattr(samples, "__getitem__")):
        raise InputError(
            f"samples: expected a dataset, a list of conversations or batches of processor outputs, got "
            f"{type(samples).__name__}."
        )
    return _Samples(_read(samples, processor), _count(samples))


class _Samples(Iterator[Sample]):
    """An iterator that knows how many samples there are at most, unless `count` is None."""

    def __init__(self, found: Iterator[Sample], count: int | None) -> None:
        self._found, self._count = found, count

    def __next__(self) -> Sample:
        return next(self._found)

    def __length_hint__(self) -> int:
        return NotImplemented if self._count is None else self._count


def _count(samples: Any) -> int | None:
    """Number of samples, None if it takes reading them."""
    if isinstance(samples, DataLoader):  # its own length is that in batches
        samples = samples.dataset
    elif isinstance(samples, Sequence) and samples and _is_batch(samples[0]):
        return sum(len(batch["input_ids"]) for batch in samples)
    try:
        return len(samples)
    except TypeError:  # a stream
        return None


def _read(samples: Any, processor: Any | None) -> Iterator[Sample]:
    """See :func:`read_samples`."""
    # Here, since both import this file for what they make.
    from vte_compile.tuning.batches import read_batch
    from vte_compile.tuning.conversations import read_conversation

    text_only = with_images = 0
    for index, item in enumerate(samples):
        name = f"samples[{index}]"
        found: Iterable[Sample | None]
        if isinstance(item, Sample):
            found = [item]
        elif _is_batch(item):
            found = read_batch(item, name, processor)
        else:
            found = [read_conversation(item, name, processor)]
        for sample in found:
            if sample is None:
                text_only += 1
            else:
                with_images += 1
                yield sample
    if not with_images:
        what = f"all {text_only} are text only, of which gates learn nothing" if text_only else "there are none"
        raise InputError(f"samples: {what}; pass prompts with images.")
    if text_only:
        _logger.warning("%d of %d samples have no image and are left out", text_only, text_only + with_images)


def _is_batch(item: object) -> bool:
    return isinstance(item, Mapping) and "input_ids" in item


def check_question(ids: Tensor, image_token_ids: Sequence[int], name: str) -> None:
    """Make sure that behind the images of a prompt `ids` [n] there are the two tokens that a gate needs.

    It reads the last token, and the mean of the others behind the images.

    Raises:
        InputError: There are fewer.
    """
    visual = torch.isin(ids, ids.new_tensor(image_token_ids)).nonzero()
    if len(visual) and (behind := len(ids) - 1 - int(visual.max())) < 2:
        raise InputError(
            f"{name}: no question behind the image: {behind} tokens of the prompt follow it, a gate reads 2 or more."
        )


def _key(inputs: Mapping[str, Tensor], answer: tuple[int, ...] | None) -> str:
    digest = hashlib.sha256(repr(answer).encode())
    for name, value in sorted(inputs.items()):
        if name != "attention_mask":  # all ones, if there is one
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
