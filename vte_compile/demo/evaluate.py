"""Measure the demo's model in several configurations: answers, exit layers, FLOPs, KV bytes, times.

The cost of an exit is the number of decoder layers that see the visual tokens: exit after layer k costs k + 1, and a
sample that never exits costs all L layers. How plans compare with baselines: vte_compile/tuning/evaluate.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

import vte_compile
from vte_compile.demo.data import Question
from vte_compile.flops import decode_flops, kv_bytes, prefill_flops
from vte_compile.loading import prompt
from vte_compile.oracle import embed
from vte_compile.plan import Plan
from vte_compile.timing import Phases, Summary, phases, time_phases

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
TIMED_RUNS = 3
_DECODE_TOKENS = 8
FULL, NO_EXIT, LEARNED, WITH_SKIPS = "full model", "no exit", "learned exit", "learned exit + skips"


@dataclass
class Configuration:
    """One way of running the model, and what came of it."""

    name: str
    kind: str
    """"original" (transformers, eager), "none", "learned" or "skips"."""
    model: Any
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    """Of all answers, in batches."""
    prefill: list[Summary] = field(default_factory=list)
    """Of the timed questions."""
    decode: list[Summary] = field(default_factory=list)
    """Per token, of the timed questions."""


@dataclass(frozen=True)
class Answer:
    """What one question got."""

    tokens: list[int]
    text: str
    exit_layer: int
    prompt_tokens: int
    visual_tokens: int


def configurations(model: Any, plans: Mapping[str, Plan], compile: bool | None) -> list[Configuration]:
    """The original model, the optimized one without exit, and with each of the plans.

    Args:
        model: The model.
        plans: The learned exits as `LEARNED`, and those on top of skipped attentions as `WITH_SKIPS`.
        compile: As for optimize().
    """
    fast: Any = vte_compile.optimize(model, Plan(), compile=compile)
    return [
        Configuration(FULL, "original", model),
        Configuration(NO_EXIT, "none", fast),
        Configuration(LEARNED, "learned", vte_compile.optimize(fast, plans[LEARNED])),
        Configuration(WITH_SKIPS, "skips", vte_compile.optimize(fast, plans[WITH_SKIPS])),
    ]


class Evaluation:
    """A processor, some questions, and the configurations that answer them."""

    def __init__(self, processor: Any, questions: Sequence[Question], configurations: Sequence[Configuration]) -> None:
        self.processor, self.configurations = processor, list(configurations)
        # By type, so that short answers do not wait for long ones of the same batch.
        self.questions = sorted(questions, key=lambda question: question.type)
        self.config = configurations[0].model.config
        self.layers: int = self.config.get_text_config().num_hidden_layers

    def __getitem__(self, name: str) -> Configuration:
        return next(c for c in self.configurations if c.name == name)

    def answer_all(self, *, progress: bool = True) -> None:
        """Let every configuration answer every question, batch by batch in turns."""
        batches = [self.questions[i : i + BATCH] for i in range(0, len(self.questions), BATCH)]
        for configuration in self.configurations:  # compiles what is not compiled yet
            answer(configuration.model, self.processor, self._encode(batches[0]))
        bar = tqdm(
            total=len(self.questions) * len(self.configurations), desc="answering", unit="answer", disable=not progress
        )
        with bar:
            for questions in batches:
                inputs = self._encode(questions)
                for configuration in self.configurations:
                    start = time.perf_counter()
                    configuration.answers += answer(configuration.model, self.processor, inputs)
                    configuration.seconds += time.perf_counter() - start
                    bar.update(len(questions))

    def time_all(self, questions: Sequence[Question], *, progress: bool = True) -> None:
        """Time prefill and decode of every configuration, one prompt at a time, in turns."""
        calls = len(questions) * len(self.configurations) * (TIMED_RUNS + 1) * 2
        with tqdm(total=calls, desc="timing", unit="run", disable=not progress) as bar:
            for question in questions:
                cases = self._phases(question)
                device = self.configurations[0].model.device
                prefill, decode = time_phases(cases, TIMED_RUNS, TIMED_RUNS, device=device, after_each=bar.update)
                for configuration in self.configurations:
                    configuration.prefill.append(prefill[configuration.name])
                    configuration.decode.append(decode[configuration.name].scaled(1 / _DECODE_TOKENS))

    def _phases(self, question: Question) -> dict[str, Phases]:
        model = self.configurations[0].model
        with torch.no_grad():
            embeds, visual_mask = embed(model, **self._encode([question]))
        return {c.name: phases(c.model, embeds, visual_mask, _DECODE_TOKENS) for c in self.configurations}

    def _encode(self, questions: Sequence[Question]) -> Any:
        return encode(self.processor, questions, self.configurations[0].model.device)

    def cost(self, exit_layer: int) -> int:
        """Layers that see the visual tokens, 1..L."""
        return self.layers if exit_layer < 0 else exit_layer + 1

    def summary(self, configuration: Configuration) -> dict[str, Any]:
        """One configuration's numbers, for the report."""
        right = [a.text == q.answer for a, q in zip(configuration.answers, self.questions, strict=True)]
        same = self.agrees(configuration)
        flops = [self._flops(a, configuration) for a in configuration.answers]
        dtype, plan = configuration.model.dtype, getattr(configuration.model, "plan", None)
        kv = [
            kv_bytes(self.config, a.prompt_tokens, a.visual_tokens, a.exit_layer, dtype, plan)
            for a in configuration.answers
        ]
        result: dict[str, Any] = {
            "name": configuration.name,
            "kind": configuration.kind,
            "accuracy": _rate(right),
            "agreement": _rate(same),
            "mean_cost": _mean([self.cost(a.exit_layer) for a in configuration.answers]),
            "exit_histogram": self._histogram(configuration.answers),
            "prefill_flops": _mean([prefill for prefill, _ in flops]),
            "answer_flops": _mean([prefill + decode for prefill, decode in flops]),
            "kv_bytes": _mean(kv),
            "questions_per_s": len(right) / configuration.seconds,
            "by_type": {},
        }
        if configuration.prefill:
            per_token = _mean([times.median_s for times in configuration.decode])
            result |= {
                "prefill_s": _mean([times.median_s for times in configuration.prefill]),
                "prefill_min_s": min(times.min_s for times in configuration.prefill),
                "prefill_max_s": max(times.max_s for times in configuration.prefill),
                "decode_tokens_per_s": 1 / per_token,
            }
        for kind in sorted({q.type for q in self.questions}):
            at = [i for i, q in enumerate(self.questions) if q.type == kind]
            answers = [configuration.answers[i] for i in at]
            result["by_type"][kind] = {
                "accuracy": _rate([right[i] for i in at]),
                "agreement": _rate([same[i] for i in at]),
                "mean_cost": _mean([self.cost(a.exit_layer) for a in answers]),
                "exit_histogram": self._histogram(answers),
            }
        return result

    def agrees(self, configuration: Configuration) -> list[bool]:
        """For each question: token for token the full model's answer?"""
        full = self[FULL].answers
        return [a.tokens == b.tokens for a, b in zip(configuration.answers, full, strict=True)]

    def _flops(self, answer: Answer, configuration: Configuration) -> tuple[int, int]:
        """Of prefill, and of decoding the answer: the first token comes out of prefill."""
        where = (self.config, answer.prompt_tokens, answer.visual_tokens, answer.exit_layer)
        plan = getattr(configuration.model, "plan", None)
        return prefill_flops(*where, plan=plan), decode_flops(*where, tokens=len(answer.tokens) - 1, plan=plan)

    def _histogram(self, answers: Sequence[Answer]) -> dict[str, int]:
        """How many samples left after each layer; "-1": never."""
        counts = Counter(a.exit_layer for a in answers)
        return {str(layer): counts[layer] for layer in (*range(self.layers), -1)}


def encode(processor: Any, questions: Sequence[Question], device: torch.device) -> Any:
    """The processor's output for some questions, one picture each, padded to one length."""
    pictures = []
    for question in questions:
        with Image.open(question.image) as picture:
            pictures.append(picture.convert("RGB"))
    texts = [prompt(processor, question.text, images=1) for question in questions]
    return processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(device)


def answer(model: Any, processor: Any, inputs: Any) -> list[Answer]:
    """Greedy answers of one batch, as :func:`encode` gives it."""
    with torch.no_grad():
        output: Tensor = model.generate(**inputs, do_sample=False)
    exits = getattr(output, "exit_layer", None)
    exits = [-1] * len(output) if exits is None else exits.tolist()
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    tokens = [_until_end(row, model) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return [Answer(*parts) for parts in zip(tokens, texts, exits, lengths, visual, strict=True)]


def _until_end(tokens: list[int], model: Any) -> list[int]:
    """Without the padding behind the end-of-sequence token."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(hits: Sequence[bool]) -> dict[str, float]:
    """A share with its 95% confidence interval (Wilson)."""
    n, share, z = len(hits), _mean(hits), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"n": n, "value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
