"""Token after token: what generation_config.json says, when rows end, and the loop itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError
from vte_compile.export.sampling import Array, Sampler, Sampling
from vte_compile.export.text_stream import TextStream

_LOGGER = logging.getLogger(__name__)
_WITHOUT_EFFECT: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "suppress_tokens": [],
    "bad_words_ids": [],
}
"""Settings that are not followed here, with the values at which they do nothing."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def read(cls, file: Path) -> GenerationDefaults:
        """The file's settings; a warning names those that are not followed here.

        Raises:
            EngineError: It is no JSON object, or a setting is not of its type.
        """
        try:
            config = json.loads(file.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise EngineError(f"{file}: cannot be read ({error}): export the model again.") from error
        if not isinstance(config, dict):
            raise EngineError(f"{file}: is no JSON object: export the model again.")
        ignored = [n for n, idle in _WITHOUT_EFFECT.items() if config.get(n) is not None and config[n] != idle]
        if ignored:
            _LOGGER.warning("%s: the runner of ONNX engines does not follow %s", file, ", ".join(ignored))
        kinds = {"max_new_tokens": int, "do_sample": bool, "temperature": (int, float), "top_k": int,
                 "top_p": (int, float)}  # fmt: skip
        given = {name: config[name] for name in kinds if config.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, kinds[name]):  # type: ignore[arg-type]
                raise EngineError(f"{file}: {name} is {value!r}: export the model again.")
        if given.get("top_k") == 0:  # transformers' way of saying: all
            del given["top_k"]
        return cls(**given)

    def sampling(
        self,
        do_sample: bool | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
    ) -> Sampling | None:
        """What a request asks for, with the gaps filled from here; None: always the likeliest token.

        Raises:
            InputError: A number that it cannot be.
        """
        asked = any(value is not None for value in (temperature, top_k, top_p))
        if not (asked or self.do_sample if do_sample is None else do_sample) or temperature == 0:
            return None
        return Sampling(
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else top_k,
            self.top_p if top_p is None else top_p,
            seed,
        )


class Stops:
    """When rows end.

    Args:
        tokens: Any of these ends a row.
        texts: A stream of each row, which ends it with a stop string; or none.
    """

    def __init__(self, tokens: list[int], texts: list[TextStream]) -> None:
        self._tokens, self._texts = tokens, texts

    def ended(self, tokens: Array, active: Array) -> Array:
        """[B] bool: which of the active rows end with these tokens [B]."""
        ended = np.isin(tokens, self._tokens)
        for b, text in enumerate(self._texts):
            if active[b]:
                text.push(int(tokens[b]))
                ended[b] |= text.stopped
        return ended & active


def generate_tokens(
    logits: Array,
    step: Callable[[Array, Array], Array],
    sampler: Sampler,
    stops: Stops,
    limit: int,
    padding: int,
    on_tokens: Callable[[Array], None] | None,
) -> tuple[Array, Array]:
    """Pick tokens until all rows have ended.

    Args:
        logits: [B, vocabulary], of each prompt's last token.
        step: Tokens [B], and which rows still run [B] -> the next logits.
        sampler: Picks.
        stops: Says when rows end.
        limit: At most so many tokens.
        padding: The token behind a row's end.
        on_tokens: Called with each step's tokens [B].

    Returns:
        Tokens [B, n], and how many of them each row has [B].
    """
    chosen: list[Array] = []
    active = np.ones(len(logits), bool)
    lengths = np.zeros(len(logits), np.int64)
    while True:
        tokens = np.where(active, sampler.pick(logits), padding)
        chosen.append(tokens)
        lengths += active
        active = active & ~stops.ended(tokens, active)
        if on_tokens is not None:
            on_tokens(tokens)
        if len(chosen) == limit or not active.any():
            return np.stack(chosen, 1), lengths
        logits = step(tokens, active)
