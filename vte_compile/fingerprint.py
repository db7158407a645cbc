"""What model a plan was made for: the decoder's sizes, and a few of its weights as a probe.

A gate is trained on one decoder's hidden states and means nothing on another's, even one of the same shape. The
probe tells such decoders apart by a handful of sampled weights, so nothing has to be hashed, and a cast to fp16 or
bf16 does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vte_compile.errors import PlanError, PlanMismatchError, UnsupportedModelError
from vte_compile.families.decoder import find_decoder

_PROBED_LAYERS = 4
_VALUES_PER_PARAMETER = 16
# bf16 keeps 8 significant bits, so rounding moves a value by up to 0.2% of itself; 1% leaves room for several casts.
_TOLERANCE = 0.01
# Other dtypes hold quantized codes, which say nothing about the weight until they are scaled.
_COMPARABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = "load the checkpoint the plan was made for, or make a new plan for this model"


class DecoderFacts(NamedTuple):
    """The sizes of a model's decoder, from its config."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Probe:
    """A few values of one decoder parameter.

    Args:
        name: the parameter's name inside the decoder, such as ``layers.0.mlp.up_proj.weight``.
        shape: the parameter's shape.
        values: the values at :func:`_positions` of the flattened parameter.

    Raises:
        PlanError: no values, or a value that is not finite.
    """

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise PlanError("values: expected at least one value")
        if not all(math.isfinite(value) for value in self.values):
            raise PlanError("values: must be finite")

    def differs_from(self, values: Sequence[float]) -> bool:
        """Whether `values`, read at the same positions, are more than rounding away."""
        if len(values) != len(self.values):
            return True
        rms = math.hypot(*self.values) / math.sqrt(len(self.values))
        # `not <=` rather than `>`: a NaN in the model differs.
        return any(
            not abs(mine - other) <= _TOLERANCE * max(rms, abs(mine))
            for mine, other in zip(self.values, values, strict=True)
        )


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan was made for.

    Args:
        model_type: the decoder's ``config.model_type``.
        num_layers: number of decoder layers.
        hidden_size: width C of the residual stream.
        vocab_size: size of the decoder's vocabulary.
        probe: sampled weights of layers spread over the decoder; empty if none could be read.

    Raises:
        PlanError: a size is not positive, or a parameter is probed twice.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    probe: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}: must be positive, got {getattr(self, name)}")
        names = [probe.name for probe in self.probe]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlanError(f"probe[{index}].name: {name!r} is probed twice")

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a Hugging Face model, causal LM or MLLM.

        Parameters without values (meta device, offloaded) or with quantized codes are left out of the probe.

        Raises:
            UnsupportedModelError: the decoder, or one of its sizes, cannot be found.
        """
        decoder = find_decoder(model)
        facts = decoder_facts(model)
        parameters = dict(decoder.named_parameters())
        probe = []
        for name in _probed_names(parameters, facts.num_layers):
            values = _sample(parameters[name])
            if values is not None and all(map(math.isfinite, values)):
                probe.append(Probe(name, tuple(parameters[name].shape), values))
        return cls(*facts, probe=tuple(probe))

    def check(self, model: nn.Module) -> None:
        """Make sure that `model` is the model the plan was made for.

        Probed parameters whose values cannot be read now (meta device, offloaded, quantized, or freed by optimize())
        are not compared.

        Raises:
            PlanMismatchError: it is not; the message gives each difference as plan's value, model's value.
            UnsupportedModelError: the decoder, or one of its sizes, cannot be found.
        """
        facts = decoder_facts(model)
        differences = [
            f"{name}: plan {getattr(self, name)!r}, model {value!r}"
            for name, value in facts._asdict().items()
            if getattr(self, name) != value
        ]
        if not differences:  # weights of differently shaped decoders differ anyway
            decoder = find_decoder(model)
            parameters = dict(decoder.named_parameters())
            probes = [probe for probe in self.probe if not _is_freed(probe.name, decoder)]
            differences = [found for probe in probes if (found := _compare(probe, parameters))]
        if differences:
            raise PlanMismatchError(
                f"fingerprint: this plan is for another model ({'; '.join(differences)}); {_REMEDY}"
            )


def decoder_facts(model: nn.Module) -> DecoderFacts:
    """The sizes of `model`'s decoder.

    Raises:
        UnsupportedModelError: the decoder cannot be found, or its config lacks one of the sizes.
    """
    decoder = find_decoder(model)
    config: Any = getattr(decoder, "config", None)
    if hasattr(config, "get_text_config"):  # a remote-code decoder may carry the config of the whole MLLM
        config = config.get_text_config(decoder=True)
    sizes: list[int] = []
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        size = getattr(config, name, None)
        if not isinstance(size, int):
            raise UnsupportedModelError(
                f"the config of decoder {type(decoder).__name__} has no {name}; is it a transformers text decoder?"
            )
        sizes.append(size)
    return DecoderFacts(str(getattr(config, "model_type", "")), *sizes)


def _probed_names(parameters: Mapping[str, Tensor], num_layers: int) -> list[str]:
    """For layers spread from the first to the last: the first weight vector (a norm) and weight matrix of each."""
    layers = sorted({round(i * (num_layers - 1) / (_PROBED_LAYERS - 1)) for i in range(_PROBED_LAYERS)})
    names: list[str] = []
    for layer in layers:
        for ndim in (1, 2):
            found = (
                name
                for name, weight in parameters.items()
                if weight.ndim == ndim and name.endswith("weight") and _layer_of(name) == layer
            )
            names.extend(islice(found, 1))
    return names


def _layer_of(name: str) -> int | None:
    """The layer a parameter of the decoder belongs to: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _positions(numel: int) -> Tensor:
    """Where to read a flattened parameter: fixed, and scattered so that the values are not all of one column."""
    return torch.tensor([2654435761 * (i + 1) % numel for i in range(min(_VALUES_PER_PARAMETER, numel))])


def _sample(parameter: Tensor) -> tuple[float, ...] | None:
    """Values at the probed positions, or None where the parameter has none that can be compared."""
    if parameter.is_meta or parameter.dtype not in _COMPARABLE_DTYPES or parameter.numel() == 0:
        return None
    flat = parameter.detach().reshape(-1)
    return tuple(flat[_positions(flat.numel()).to(flat.device)].double().tolist())


def _is_freed(name: str, decoder: nn.Module) -> bool:
    """Whether a module has a parameter of this name that is None."""
    path, _, last = name.rpartition(".")
    try:
        return decoder.get_submodule(path)._parameters.get(last, decoder) is None
    except AttributeError:
        return False


def _compare(probe: Probe, parameters: Mapping[str, Tensor]) -> str | None:
    """What is different about the probed parameter, or None."""
    parameter = parameters.get(probe.name)
    if parameter is None:
        return f"weights: the model has no {probe.name}, which the plan probes"
    values = _sample(parameter)
    if values is None:
        return None
    if tuple(parameter.shape) != probe.shape:
        return f"weights: {probe.name} has shape {list(probe.shape)} in the plan, {list(parameter.shape)} in the model"
    if probe.differs_from(values):
        there, here = (", ".join(f"{value:.4g}" for value in some[:3]) for some in (probe.values, values))
        return f"weights: {probe.name} starts {there} in the plan's probe, {here} in the model"
    return None
