"""What optimize() makes of a model: an object of its class whose forward runs the rewritten decoder."""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vte_compile.errors import InputError
from vte_compile.families.cache_name import CACHE, given_cache
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.inputs import chunk_tokens, decoder_inputs, image_positions
from vte_compile.folded_weights import FoldReport
from vte_compile.inference_only import InferenceOnly
from vte_compile.module_tree import of_class
from vte_compile.plan import Plan
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.exit_cache import ExitCache
from vte_compile.runtime.told import report_exits, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound="PreTrainedModel")

# What the decoder's runner handles itself; everything else a forward takes belongs to the model's merging code.
_DECODER_ARGUMENTS = frozenset(
    "input_ids inputs_embeds attention_mask position_ids cache past_key_values visual_mask labels use_cache "
    "logits_to_keep return_dict output_attentions output_hidden_states cache_position kwargs".split()
)


# What else generate() gives.
_OF_GENERATE = (CACHE, "cache_position")


@dataclass
class CausalLMOutputWithExit(CausalLMOutputWithPast):
    """A model's usual output, and where the visual tokens left."""

    image_hidden_states: Any = None
    exit_layer: Tensor | None = None
    """[B] int64: the layer after which each row's visual tokens left in this call; -1 = never."""


def wrap(model: ModelT, spec: DecoderSpec, runner: DecoderRunner, *mixins: type) -> ModelT:
    """A shallow copy of the model, of a subclass that carries the same name; `mixins` come before OptimizedModel."""
    kind: Any = type(model)
    fast = of_class(_optimized(kind, *mixins), model)
    fast.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    fast.training = False  # of this object; the shared modules stay as they are
    fast._vte_spec, fast._vte_runner = spec, runner
    return fast


@functools.cache
def _optimized(base: type, *mixins: type) -> type:
    """The subclass of a model's class."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    forward = _forward_like(inspect.signature(base.forward))  # type: ignore[attr-defined]
    own = {"_vte_base": base, "_vte_mixins": mixins, "forward": forward}
    return type(base.__name__, (*mixins, OptimizedModel, base), {**names, **own})


def _blank(base: type, *mixins: type) -> Any:
    """An object to be filled by pickle or copy."""
    return object.__new__(_optimized(base, *mixins))


def _forward_like(signature: inspect.Signature) -> Any:
    """A forward with the model's own signature, which generate() inspects, and visual_mask.

    One that takes nothing but what it names may be of code that knows older transformers (LLaVA's).
    """
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    # generate() leaves out logits_to_keep where it is not named, and with it which is a row's last token.
    names = ["visual_mask", "logits_to_keep", *(_OF_GENERATE if at == len(parameters) else ())]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in names
        if name not in signature.parameters
    ]
    extended = signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])

    def forward(self: OptimizedModel, *args: Any, **kwargs: Any) -> CausalLMOutputWithExit | tuple[Any, ...]:
        bound = extended.bind(self, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self")
        for parameter in extended.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        return self._vte_forward(arguments)

    forward.__signature__ = extended  # type: ignore[attr-defined]
    forward.__doc__ = OptimizedModel._vte_forward.__doc__
    return forward


# Ways to generate that show the model a part of the prompt, or the prompt and guessed tokens.
_UNUSABLE_IN_GENERATE = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")

# generate() discards the outputs of its first call; this is where it finds the exit layers of it.
_generation_exits: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("vte_exits", default=None)


class OptimizedModel(InferenceOnly):
    """What :func:`optimize` adds to a model's class."""

    _vte_base: type
    _vte_mixins: tuple[type, ...]
    _vte_spec: DecoderSpec
    _vte_runner: DecoderRunner

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle finds it through the model's own.
        return _blank, (self._vte_base, *self._vte_mixins), self.__dict__

    @property
    def plan(self) -> Plan:
        """The plan that was applied."""
        return self._vte_runner.plan

    @property
    def fold_reports(self) -> list[FoldReport]:
        """What became of each adapter of the plan, by layer."""
        return [report for _, report in sorted(self._vte_runner.folded.reports.items())]

    def _vte_forward(self, arguments: Mapping[str, Any]) -> CausalLMOutputWithExit | tuple[Any, ...]:
        """The model's forward, for inference.

        Takes what the model's own forward takes, and ``visual_mask`` [B, T] bool (found from the placeholder ids if
        None). Rows may be padded on either side; each gives what it would give alone.

        Returns:
            The usual output, with ``exit_layer`` [B] int64. ``logits`` are zeros where a token was removed or is
            padding; ``logits_to_keep=1`` gives each row's last real token. ``cache`` (``past_key_values`` before
            transformers 5.24) is a DynamicCache whose layers differ in length (``.lengths``).

        Raises:
            InputError: Contradicting, misshaped or unsupported arguments; the message says which.
        """
        given = arguments.get
        self._refuse_unsupported(arguments)
        cache = self._cache(given_cache(arguments))
        tokens = chunk_tokens(given("input_ids"), given("inputs_embeds"))
        decoding = tokens.shape[1] == 1 and not cache.is_empty
        batch, length = tokens.shape[:2]
        mask = _chunk_mask(given("attention_mask"), batch, length, cache.get_seq_length(), self._vte_spec.device)
        positions = _positions(given("position_ids"), self._vte_spec.position_rows, mask)
        extra = {k: v for k, v in arguments.items() if k not in _DECODER_ARGUMENTS and v is not None}
        visual_mask = given("visual_mask")
        if visual_mask is None and given("inputs_embeds") is not None and not decoding:
            visual_mask = told(tokens)
        with torch.no_grad():
            inputs = decoder_inputs(
                self,  # type: ignore[arg-type]
                self._vte_spec,
                input_ids=given("input_ids"),
                inputs_embeds=given("inputs_embeds"),
                visual_mask=visual_mask,
                may_exit=bool(self.plan.exits) and not decoding,
                multimodal=extra,
                attention_mask=mask,
                position_ids=positions,
                continued=not cache.is_empty,
            )
            if inputs.position_ids is not None:
                positions = _counted_on(inputs.position_ids, cache)
            keep: Any = given("logits_to_keep")
            keep = 0 if keep is None else keep
            last = isinstance(keep, int) and keep == 1
            output = self._vte_runner.run(
                inputs.embeds,
                inputs.visual_mask,
                None if given("attention_mask") is None else mask,
                positions,
                cache,
                last=last,
                token_inputs=inputs.token_inputs,
            )
        report_exits(output.exit_layer)
        record = _generation_exits.get()
        if record is not None and not record:
            record.append(output.exit_layer)
        logits = output.logits if last else _keep_logits(output.logits, keep)
        use_cache = given("use_cache") if given("use_cache") is not None else self._vte_spec.config.use_cache
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        result = CausalLMOutputWithExit(
            loss=self._loss(logits, given("labels"), keep),
            logits=logits,
            image_hidden_states=inputs.image_hidden_states,
            exit_layer=output.exit_layer,
            **kept,
        )
        return result.to_tuple() if given("return_dict") is False else result

    def _refuse_unsupported(self, arguments: Mapping[str, Any]) -> None:
        config: Any = self.config  # type: ignore[attr-defined]
        for name in ("output_attentions", "output_hidden_states"):
            wanted = arguments.get(name)
            if wanted or (wanted is None and getattr(config, name, False)):
                raise InputError(f"{name}: an optimized decoder does not keep them. Ask the original model, or Oracle.")

    @staticmethod
    def _cache(given: Any) -> ExitCache:
        if given is None:
            return ExitCache.adopt(DynamicCache())
        if isinstance(given, ExitCache) or (type(given) is DynamicCache and given.get_seq_length() == 0):
            return ExitCache.adopt(given)
        if type(given) is DynamicCache:
            raise InputError(
                "past_key_values holds tokens that another model cached: pass a cache this model returned, or an "
                "empty one."
            )
        raise InputError(
            f"past_key_values: a {type(given).__name__} cannot hold layers of different lengths: use a DynamicCache "
            "(leave cache_implementation unset)."
        )

    def _loss(self, logits: Tensor, labels: Tensor | None, keep: Any) -> Tensor | None:
        if labels is None:
            return None
        if not isinstance(keep, int) or keep != 0:
            raise InputError("labels need all logits: leave logits_to_keep at 0.")
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The model's own, with ``visual_mask`` cut to the tokens of this call."""
        visual_mask = kwargs.pop("visual_mask", None)
        if visual_mask is None and inputs_embeds is not None:
            visual_mask = told(inputs_embeds)
        # generate() looks for the name inputs_embeds in this signature before it accepts them.
        kwargs["inputs_embeds"] = inputs_embeds
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if visual_mask is not None and kwargs.get("is_first_iteration"):  # else a decode step: text
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            cache = inputs.get(CACHE)
            seen = cache.get_seq_length() if cache is not None else 0
            whole = visual_mask.ndim == 2 and visual_mask.shape[1] == seen + tokens.shape[1]
            inputs["visual_mask"] = visual_mask[:, seen:] if whole else visual_mask
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Multimodal positions [3, B, T] of the prompt's new tokens. Of text None: the runner counts each row's tokens.

        The usual ones of text go wrong behind padding on the right.
        """
        ids = model_kwargs.get("input_ids")
        ids = ids if ids is not None and ids.shape[1] else inputs_tensor
        if self._vte_spec.position_rows == 1 or ids.ndim != 2:
            return None
        cache, mask = model_kwargs.get(CACHE), model_kwargs["attention_mask"]
        seen = cache.get_seq_length() if cache is not None else 0
        if ids.shape[1] == mask.shape[1]:  # else these are the new tokens alone
            ids = ids[:, seen:]
        mask = _chunk_mask(mask, ids.shape[0], ids.shape[1], seen, ids.device)
        positions = image_positions(self, self._vte_spec, ids, mask, model_kwargs)  # type: ignore[arg-type]
        if positions is None:
            return None
        # generate() counts on from the last column: behind padding on the right, that is the row's last token.
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = (mask * columns).amax(1, keepdim=True)
        return _counted_on(positions.gather(-1, columns.minimum(last).expand_as(positions)), cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(). The result carries ``exit_layer`` [rows of the result] int64, -1 = never.

        Raises:
            InputError: ``use_cache=False``, ``prefill_chunk_size`` or assisted decoding: exits are decided once, on
                the whole prompt and nothing else.
        """
        config = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        unusable = {name: kwargs.get(name, getattr(config, name, None)) for name in _UNUSABLE_IN_GENERATE}
        unusable["use_cache"] = False if kwargs.get("use_cache", config.use_cache) is False else None
        for name, value in unusable.items():
            if value is not None:
                shown = value if isinstance(value, int) else type(value).__name__
                raise InputError(
                    f"generate({name}={shown}): exits are decided once, on the whole prompt and nothing else: leave it "
                    "unset."
                )
        if kwargs.get("return_dict", ...) is None:
            # As code from before transformers 5 hands it on (InternVLChatModel); generate() would pass it twice.
            del kwargs["return_dict"]
        record: list[Tensor] = []
        token = _generation_exits.set(record)
        try:
            result = super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _generation_exits.reset(token)
        prompts = next((kwargs[n] for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        prompts = args[0] if args and args[0] is not None else prompts
        sequences = result if isinstance(result, Tensor) else result.sequences
        if record:
            result.exit_layer = _per_sequence(record[0], 1 if prompts is None else len(prompts), len(sequences))
        return result

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model as it was before, and the plan beside it, where optimize() finds it.

        Raises:
            InputError: The model has no longer the weights it had before: some were freed or folded.
        """
        self._vte_refuse_to_save()
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        self.plan.save_pretrained(save_directory)

    def _vte_refuse_to_save(self) -> None:
        if self._vte_spec.freed:
            raise InputError(
                f"save_pretrained: {len(self._vte_spec.freed)} weights were freed or folded (the plan skips attentions "
                "or has adapters): save the original model, and the plan beside it with plan.save_pretrained(folder)."
            )


def _chunk_mask(mask: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """[B, T] bool of this call's tokens, from a mask of them or of all columns so far."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise InputError(
            f"attention_mask: expected shape [{batch}, {past + length}] ([batch, tokens so far]), got "
            f"{list(mask.shape)}."
        )
    return mask[:, -length:].to(device=device, dtype=torch.bool)


def _positions(position_ids: Tensor | None, rows: int, mask: Tensor) -> Tensor | None:
    """[B or 1, T], or [rows, B or 1, T] where positions have several rows, of a chunk with a mask [B, T]."""
    if position_ids is None:
        return None
    batch, length = mask.shape
    leads: list[tuple[int, ...]] = [()] if rows == 1 else [(), (rows,), (rows + 1,)]
    lead, chunk = position_ids.shape[:-2], position_ids.shape[-2:]
    if lead not in leads or chunk not in ((1, length), (batch, length)):
        expected = " or ".join(str([*known, batch, length]) for known in leads)
        raise InputError(f"position_ids: expected shape {expected}, got {list(position_ids.shape)}.")
    if rows == 1 or lead != (rows + 1,):
        return position_ids
    # One row more, in front, numbers the tokens as text: where it starts anew, so does another sequence.
    text = position_ids[0].expand_as(mask)
    if bool(((text[:, 1:] <= text[:, :-1]) & mask[:, 1:] & mask[:, :-1]).any()):
        raise InputError("position_ids: rows of several packed sequences are not supported: pass them as a batch.")
    return position_ids[1:]


def _counted_on(positions: Tensor, cache: Any) -> Tensor:
    """Positions [3, B, T] that count from 0 in each row, behind what the row has cached."""
    if not isinstance(cache, ExitCache) or cache.is_empty:
        return positions
    return positions + cache.next_positions[:, None].to(positions.device)


def _keep_logits(logits: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, int):
        return logits[:, -keep:] if keep else logits
    return logits[:, keep]


def _per_sequence(exit_layer: Tensor, prompts: int, sequences: int) -> Tensor:
    """Exit layers of generate()'s rows (beams, samples) as those of its results: all rows of a prompt agree."""
    return exit_layer[:: len(exit_layer) // prompts].repeat_interleave(sequences // prompts)
