"""The models that serving.py times, their prompts, and what each case does for a first token and each further one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import BASELINE, IMAGE_TOKEN, PREFIX, build_prompt, exit_candidates, llava_of, mixed_exits
from torch import Tensor
from transformers import LlamaConfig, StaticCache

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.flops import kv_bytes
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.growing import with_room

EAGER, NEVER, MIXED = "eager", "never", "mixed"
PARTS = ("1/4", "1/2", "3/4")
CASES = (EAGER, BASELINE, NEVER, *PARTS, MIXED)
"""The model as it comes, through torch.compile, and optimized: without exit, with exits behind a part of the layers for
all rows, and with gates that let rows leave at different ones."""
TEXT = 64
"""Tokens of a prompt that are not visual."""
WARM_STEPS = 8
"""Decode steps before any is timed: in those steps are compiled, recorded, and replays compared."""
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Preset:
    """A decoder, and how many visual tokens its prompts have."""

    decoder: dict[str, int]
    visual: int
    dtype: torch.dtype

    @property
    def seq(self) -> int:
        """Tokens of a prompt."""
        return self.visual + TEXT


_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": IMAGE_TOKEN + 1,
}
_TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": IMAGE_TOKEN + 1,
}
PRESETS = {
    "LLaVA-1.5-7B": Preset(_7B, 576, torch.bfloat16),
    "LLaVA-NeXT": Preset(_7B, 2880, torch.bfloat16),
    "tiny": Preset(_TINY, 24, torch.float32),
}


class Models:
    """A preset's model, and what is made of it once: presets with the same decoder share it."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self.model: Any = None
        self._without: Any = None

    def use(self, preset: Preset) -> Any:
        """The model of a preset."""
        key = preset.decoder, preset.dtype
        if key != self._key:
            self.model = self._without = None  # and so its memory
            self.model = llava_of(LlamaConfig(**preset.decoder), preset.visual, preset.dtype)
            self._key = key
        return self.model

    def optimized(self, plan: Plan) -> Any:
        """The model with a plan; all plans share what was traced and compiled."""
        if self._without is None:
            self._without = optimize(self.model, Plan())
        return optimize(self._without, plan)


@dataclass(frozen=True)
class Prompt:
    """A batch of embedded prompts, each with an image."""

    embeds: Tensor
    """[B, S, C]."""
    visual_mask: Tensor
    """[B, S] bool."""

    @classmethod
    def random(cls, model: Any, preset: Preset, batch: int) -> Prompt:
        torch.manual_seed(batch)
        rows = [build_prompt(model, preset.seq, preset.visual) for _ in range(batch)]
        return cls(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass(frozen=True)
class Served:
    """One case."""

    plan: Plan
    prefill: Callable[[], Any]
    """The decoder on the whole prompt: logits of the last tokens, and a cache."""
    steps: Callable[[], Callable[[], Tensor]]
    """Runs a prompt; the result runs a decode step, and gives its tokens [B, 1]."""
    runner: DecoderRunner | None = None
    """Of an optimized model."""

    def how(self) -> dict[str, Any]:
        """Of an optimized model that ran: in which phases attention is fused, and whether decode steps are replayed."""
        if self.runner is None:
            return {}
        fused = sorted(key[0] for key, done in self.runner._fused.items() if done)
        graphs = [graphs for graphs in self.runner._decode_graphs.values() if graphs is not None]
        return {"fused": fused, "replayed": any(own._recorded is not None for own in graphs)}


def serve(case: str, models: Models, prompt: Prompt, steps: int) -> Served:
    """What a case does.

    Args:
        case: Of ``CASES``.
        models: Of the preset in use.
        prompt: The batch.
        steps: How many decode steps there will be at most.
    """
    model: Any = models.model
    inputs = {"inputs_embeds": prompt.embeds, "logits_to_keep": 1, "use_cache": True}
    if case == BASELINE:
        torch._dynamo.reset()  # each batch size is compiled for itself; and what the last one recorded goes
        return Served(
            Plan(), _prefill(torch.compile(model, dynamic=False), inputs), _compiled_steps(model, inputs, steps)
        )
    plan = Plan()
    if case != EAGER:
        candidates = exit_candidates(model.config.text_config.num_hidden_layers)
        if case == MIXED:
            plan = Plan(mixed_exits(model, prompt.embeds, prompt.visual_mask, candidates))
        elif case != NEVER:
            plan = Plan([StaticExit(candidates[PARTS.index(case)])])
        model, inputs = models.optimized(plan), inputs | {"visual_mask": prompt.visual_mask}
    prefill = _prefill(model, inputs)

    def begin() -> Callable[[], Tensor]:
        output = prefill()
        cache, token = cache_of(output), _next(output)
        del output

        @torch.no_grad()
        def step() -> Tensor:
            nonlocal token
            token = _next(model(input_ids=token, use_cache=True, **{CACHE: cache}))
            return token

        return step

    return Served(plan, prefill, begin, getattr(model, "_vte_runner", None))


def _prefill(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return model(**inputs)

    return run


def _compiled_steps(model: Any, inputs: dict[str, Any], steps: int) -> Callable[[], Callable[[], Tensor]]:
    """transformers' own way to fast decode steps: a cache of fixed size, and CUDA graphs of what is compiled."""

    @torch.no_grad()
    def begin() -> Callable[[], Tensor]:
        batch, seq = inputs["inputs_embeds"].shape[:2]
        cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=seq + steps)
        # Uncompiled: as generate() does, and so that its buffers are no graph's own.
        token = _next(model(**inputs, **{CACHE: cache}))
        compiled = torch.compile(model, dynamic=False, mode="reduce-overhead")
        positions = torch.full((batch, 1), seq, device=token.device)

        @torch.no_grad()
        def step() -> Tensor:
            nonlocal token, positions
            torch.compiler.cudagraph_mark_step_begin()
            output = compiled(input_ids=token, position_ids=positions, use_cache=True, **{CACHE: cache})
            token, positions = _next(output), positions + 1
            return token

        return step

    return begin


def _next(output: Any) -> Tensor:
    """The likeliest tokens [B, 1]."""
    tokens: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return tokens


def relative_error(model: Any, served: Served, prompt: Prompt, output: Any) -> float | None:
    """Of the first rows' last logits, to the oracle's; None where rows left elsewhere there, at a gate's threshold."""
    rows = slice(0, CHECKED_ROWS)
    want = Oracle(model, served.plan).forward(prompt.embeds[rows], prompt.visual_mask[rows])
    exits = getattr(output, "exit_layer", None)
    if exits is not None and exits[rows].tolist() != want.exit_layer.tolist():
        return None
    expected = want.logits[:, -1].double()
    return float((output.logits[rows, -1].double() - expected).norm() / expected.norm())


def needed_bytes(model: Any, preset: Preset, batch: int, case: str, steps: int) -> int:
    """About how much memory a case takes at most: weights, keys and values, and what is between layers of a prompt."""
    columns = preset.seq + steps
    if case not in (EAGER, BASELINE):
        columns = max(columns, with_room(preset.seq))
    cache = batch * kv_bytes(model.config, columns, 0, -1, preset.dtype)
    text = model.config.text_config
    if case == EAGER:
        cache += 2 * cache // text.num_hidden_layers  # a layer's, while a step copies it
    between = batch * preset.seq * (8 * text.hidden_size + 4 * text.intermediate_size) * preset.dtype.itemsize
    return sum(p.nbytes for p in model.parameters()) + cache + between


def device_bytes(device: torch.device) -> int:
    """The memory there is."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


assert PREFIX < TEXT  # text stands behind the image, too
