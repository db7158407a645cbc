"""What optimize() makes of live objects of the authors' own code: their methods stay, and find the visual tokens.

Two kinds (vte_compile/families/live.py): a copy of a model in which the language model is an optimized one, and an
optimized language model whose own code makes embeddings.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.cache_name import CACHE_NAMES, given_cache
from vte_compile.families.live import EMBED, PREPARE, Live, find_splice, placeholder_id, spliced
from vte_compile.folded_weights import FoldReport
from vte_compile.inference_only import InferenceOnly
from vte_compile.module_tree import of_class, shallow_copy
from vte_compile.plan import Plan
from vte_compile.runtime.told import tell, told_within

ModelT = TypeVar("ModelT", bound=nn.Module)

_RUNS = ("forward", "generate")
# What LLaVA's relatives call their prompt, in forward() and generate().
_IDS = ("input_ids", "inputs")


class Placeholders:
    """Of InternVL and Eagle 2: a placeholder for each visual token."""

    def _vte_look(self, arguments: Mapping[str, Any]) -> Tensor | None:
        ids, token = arguments.get("input_ids"), placeholder_id(self)  # type: ignore[arg-type]
        return None if ids is None or token is None else ids == token


class Embeds:
    """Of VILA: one placeholder for an image."""

    def _vte_look(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return None

    def _embed(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The model's own."""
        result, visual = spliced(EMBED, super()._embed, args, kwargs)  # type: ignore[misc]
        if visual is not None:
            tell(visual)
        return result


class Prepares:
    """Of LLaVA and its relatives: one placeholder for an image."""

    def _vte_look(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Without images their code embeds ids, and merges nothing."""
        ids = next((arguments[name] for name in _IDS if arguments.get(name) is not None), None)
        if ids is None or arguments.get("images") is not None:
            return None
        return torch.zeros_like(ids, dtype=torch.bool)

    def prepare_inputs_labels_for_multimodal(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The model's own."""
        method = super().prepare_inputs_labels_for_multimodal  # type: ignore[misc]
        result, visual = spliced(PREPARE, method, args, kwargs)
        if visual is not None:
            tell(visual)
        return result


class LiveModel(InferenceOnly):
    """What optimize() adds to a class of the authors' own that has a language model in it."""

    _vte_base: type
    _vte_live: Live

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle finds it through the model's own.
        return _blank, (self._vte_base, self._vte_live), self.__dict__

    @property
    def plan(self) -> Plan:
        """The plan that was applied."""
        return self._vte_language_model.plan

    @property
    def fold_reports(self) -> list[FoldReport]:
        """What became of each adapter of the plan, by layer."""
        return self._vte_language_model.fold_reports

    @property
    def _vte_language_model(self) -> Any:
        return getattr(self, self._vte_live.path)

    def forward(self, *args: Any, visual_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own. What it returns carries ``exit_layer`` [B] int64, unless it is a tuple.

        Args:
            args: As the model's own forward takes them.
            visual_mask: [B, T] bool of the tokens as the language model gets them; found if None.
            kwargs: As the model's own forward takes them.

        Raises:
            InputError: Its code went around the language model, or did not tell which tokens are visual.
        """
        return self._vte_run(super().forward, visual_mask, args, kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, visual_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own. The result carries ``exit_layer`` [rows of the result] int64, -1 = never.

        Arguments and errors are those of :meth:`forward`, and those of an optimized language model's generate().
        """
        return self._vte_run(super().generate, visual_mask, args, kwargs)  # type: ignore[misc]

    def _vte_run(
        self, method: Callable[..., Any], given: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with told_within(given) as call:
            call.found = self._vte_look(_by_name(method, args, kwargs))  # type: ignore[attr-defined]
            result = method(*args, **kwargs)
        if call.exit_layer is None:
            raise InputError(
                f"{type(self).__name__}.{method.__name__}() ran nothing of its {self._vte_live.path}, or parts of it "
                "without the plan: call generate(), or the original model."
            )
        if isinstance(result, ModelOutput) and getattr(result, "exit_layer", None) is None:
            result.exit_layer = call.exit_layer
        return result

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model as it was before, and the plan beside it, where optimize() finds it.

        Raises:
            InputError: The model has no longer the weights it had before: some were freed or folded.
        """
        self._vte_language_model._vte_refuse_to_save()
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        self.plan.save_pretrained(save_directory)


class SplicedModel(Prepares):
    """What optimize() adds, beside OptimizedModel, to a language model whose own code makes embeddings (LLaVA)."""

    def _vte_forward(self, arguments: Mapping[str, Any]) -> Any:
        """The model's forward, for inference; images and ids are merged by its own code."""
        if arguments.get("images") is None or arguments.get("inputs_embeds") is not None:
            return super()._vte_forward(arguments)  # type: ignore[misc]
        with told_within(arguments.get("visual_mask")):
            return super()._vte_forward(self._vte_merged(arguments))  # type: ignore[misc]

    def _vte_merged(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of forward() with embeddings in the place of ids and images."""
        given = dict(arguments) | {"past_key_values": given_cache(arguments)}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is not None and mask is not None:  # beside a cache it may be of all columns so far
            given["attention_mask"] = mask[:, -ids.shape[1] :]
        parameters = inspect.signature(self._vte_base.prepare_inputs_labels_for_multimodal).parameters  # type: ignore[attr-defined]
        # By the names that forward() has for them, as the model's own forward does it.
        takes = {name: given.get(name) for name in parameters if name in given or name in PREPARE.takes}
        with torch.no_grad():
            ids, positions, mask, _, embeds, labels = self.prepare_inputs_labels_for_multimodal(**takes)
        merged = dict(input_ids=ids, position_ids=positions, attention_mask=mask, inputs_embeds=embeds, labels=labels)
        rest = {name: value for name, value in arguments.items() if name not in parameters or name in CACHE_NAMES}
        return rest | merged

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(). The result carries ``exit_layer`` [rows of the result] int64, -1 = never.

        Arguments and errors are those of an optimized language model's generate().
        """
        own = functools.partial(self._vte_base.generate, self)  # type: ignore[attr-defined]
        with told_within() as call:
            call.found = self._vte_look(_by_name(own, args, kwargs))
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def mixins_of(model: nn.Module) -> tuple[type, ...]:
    """What an optimized language model is besides: of one whose own code makes embeddings, else nothing.

    Raises:
        UnsupportedModelError: A method was replaced on the object itself.
    """
    if find_splice(type(model)) != PREPARE:
        return ()
    refuse_replaced(model)
    return (SplicedModel,)


def wrap_live(model: ModelT, live: Live, language_model: nn.Module) -> ModelT:
    """A shallow copy of a model of its authors' own code, with an optimized language model in it.

    Raises:
        UnsupportedModelError: A method was replaced on the object itself, and would run the object's own.
    """
    refuse_replaced(model)
    kind: Any = type(model)
    fast = of_class(_live(getattr(kind, "_vte_base", kind), live), model)
    if (config := getattr(model, "generation_config", None)) is not None:
        fast.generation_config = copy.deepcopy(config)
    fast._modules[live.path] = language_model
    fast.training = False  # of this object; the shared modules stay as they are
    _adopt_encoders(fast, model)
    return fast


def refuse_replaced(model: nn.Module) -> None:
    """Refuse an object that has methods of its own, which are bound to it and know of no copy.

    Raises:
        UnsupportedModelError: It has.
    """
    names = {*_RUNS, EMBED.method, PREPARE.method}
    if found := sorted(names & vars(model).keys()):
        what = f"take that away (del model.{found[0]}); optimize() finds the visual tokens by itself"
        if hasattr(model, "_hf_hook"):
            what = "accelerate did it: load the model on one device (device_map with one entry, no offloading)"
        raise UnsupportedModelError(
            f"{type(model).__name__}: {', '.join(found)} was set on the object itself, and would run it and not the "
            f"optimized one: {what}."
        )


def _adopt_encoders(fast: Any, model: nn.Module) -> None:
    """Let the encoders of VILA, which know their model, know the copy: or the original would stay, weights and all."""
    encoders = vars(fast).get("encoders")  # no submodules, and so a dict of the copy's own
    for name, encoder in encoders.items() if isinstance(encoders, dict) else ():
        if (parent := getattr(encoder, "_parent", None)) and parent[0] is model:
            encoders[name] = shallow_copy(encoder)
            encoders[name]._parent = [fast]


@functools.cache
def _live(base: type, live: Live) -> type:
    """The subclass of a model's class, which carries the same name."""
    looks = {None: Placeholders, EMBED: Embeds, PREPARE: Prepares}[live.splice]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (LiveModel, looks, base), {**names, "_vte_base": base, "_vte_live": live})


def _blank(base: type, live: Live) -> Any:
    """An object to be filled by pickle or copy."""
    return object.__new__(_live(base, live))


def _by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; those without a parameter of their own, too."""
    return inspect.signature(method).bind(*args, **kwargs).arguments | kwargs
