"""lmms-eval's benchmarks on an optimized model: ``lmms-eval --model vte_compile --model_args pretrained=...,plan=...``.

Written against lmms-eval 0.7.3, which imports this module itself (lmms_eval_plugin.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from vte_compile.errors import InputError
from vte_compile.loading import load_model, load_processor
from vte_compile.optimizer import optimize
from vte_compile.plan import Plan

# What tasks may ask of generate(); the rest of their generation arguments is for other models.
_GENERATION = ("max_new_tokens", "num_beams", "temperature", "top_p")
_MAX_NEW_TOKENS = 1024


class OptimizedChatModel(lmms):
    """A model under a plan, which answers one prompt at a time, in one process.

    `pretrained`, `plan`: folder or hub id; no plan: the one beside the model, or none. `exit`: False keeps the visual
    tokens in all layers. `compile`: as for optimize(). `device`: None is a GPU if there is one.

    Raises InputError for another batch size than 1, or where a checkpoint is not found.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        exit: bool = True,
        compile: bool | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval hands it to every model
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise InputError(f"batch_size={batch_size}: prompts are answered one by one: leave it at 1.")
        wanted = (Plan.from_pretrained(plan) if plan is not None else None) if exit else Plan()
        self._model = optimize(load_model(pretrained, device), wanted, compile=compile)
        self._processor = load_processor(pretrained)
        self.exit_layers: list[int] = []
        """Behind which layer the visual tokens of each answered prompt left; -1: never."""

    @property
    def model(self) -> Any:
        """The optimized model."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to some requests of lmms-eval, each up to its stop strings.

        Raises:
            InputError: A prompt with videos or sound.
        """
        answers = []
        for request in tqdm(requests, "answering", unit="request", dynamic_ncols=True):
            context, to_messages, options, document, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            answer = self._answer(messages, options)
            self.cache_hook.add_partial("generate_until", (context, options), answer)
            answers.append(answer)
        return answers

    def _answer(self, messages: Any, options: dict[str, Any]) -> str:
        _, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise InputError("vte_compile takes prompts of text and images: leave tasks with videos or sound out.")
        inputs = self._processor.apply_chat_template(
            messages.to_hf_messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device, self._model.dtype)
        given = {name: options[name] for name in _GENERATION if options.get(name) is not None}
        sampled = given.get("temperature", 0) > 0
        if not sampled:  # a temperature of 0 is how tasks ask for greedy decoding
            given = {name: value for name, value in given.items() if name not in ("temperature", "top_p")}
        arguments = {"max_new_tokens": _MAX_NEW_TOKENS, **given, "do_sample": sampled}
        with torch.no_grad():
            output = self.model.generate(**inputs, **arguments)
        self.exit_layers.append(int(output.exit_layer[0]))
        text = self._processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return str(text.strip())

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: it compares given answers, and an exit is decided before an answer."""
        raise NotImplementedError("vte_compile: tasks that compare likelihoods are not supported.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("vte_compile: tasks with several rounds are not supported.")
