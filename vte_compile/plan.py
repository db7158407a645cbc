"""The plan: a validated description of what to do to a model, here after which decoder layers visual tokens leave.

Gates are those of DyVTE (arXiv 2411.19628, section on the "hyper-network"); the files a plan is stored in are
described in vte_compile/plan_files.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vte_compile.errors import PlanError, PlanMismatchError
from vte_compile.fingerprint import Fingerprint, decoder_facts
from vte_compile.plan_fields import check_pair, check_values, finite, float_tensor, integer


@dataclass(frozen=True, eq=False, repr=False)
class GateExit:
    """Visual tokens leave after `layer` in the samples whose gate says so (DyVTE, arXiv 2411.19628).

    With f = [mean of the question tokens except the last ; last token], taken from the layer's output [2C]::

        z = w2 @ gelu(w1 @ f)        exact (erf) GELU, no biases
        exit after this layer  iff  z[1] - z[0] > threshold      (strict: a tie or a NaN keeps)

    Args:
        layer: decoder layer whose output the gate reads, counted from 0.
        w1: [M, 2C], floating point; C is the decoder's hidden size, M the gate's own width (2048 in the paper).
        w2: [2, M], same dtype and device as `w1`; row 0 is "keep", row 1 is "exit".
        threshold: in units of the logits; 0 is the paper's rule.

    Raises:
        PlanError: a field is of the wrong type, shape or dtype, or is not finite; the message starts with its name.
    """

    layer: int
    w1: Tensor
    w2: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))
        object.__setattr__(self, "threshold", finite("threshold", self.threshold))
        for name in ("w1", "w2"):
            object.__setattr__(self, name, float_tensor(name, getattr(self, name), 2))
        if self.w1.shape[0] == 0 or self.w1.shape[1] == 0 or self.w1.shape[1] % 2:
            raise PlanError(f"w1: expected shape [M, 2C], got {list(self.w1.shape)}")
        check_pair("w2", self.w2, [2, self.width], "w1", self.w1)
        check_values("w1", self.w1)
        check_values("w2", self.w2)

    @property
    def width(self) -> int:
        """M, the gate's own width."""
        return self.w1.shape[0]

    @property
    def hidden_size(self) -> int:
        """C, the hidden size of the decoder the gate reads."""
        return self.w1.shape[1] // 2

    def __repr__(self) -> str:
        return f"GateExit(layer={self.layer}, width={self.width}, threshold={self.threshold:g})"


@dataclass(frozen=True)
class StaticExit:
    """Visual tokens of every sample leave after `layer` (counted from 0).

    Raises:
        PlanError: `layer` is not an integer, or is negative.
    """

    layer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", integer("layer", self.layer, 0))


Exit = GateExit | StaticExit

# Whatever stands before it, such as `base_model.model.` of a PEFT checkpoint, does not matter.
_DYVTE_KEY = re.compile(r"(?:^|\.)visual_gates_router\.(?P<rest>.+)$")
_DYVTE_WEIGHT = re.compile(r"(?P<layer>[0-9]{1,6})\.(?P<weight>w1|w2)\.weight")


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What to do to a model: after which decoder layers its visual tokens may leave.

    Exits are tried from the lowest layer upward, in prefill, per sample, until the first that fires.

    Args:
        exits: in any order; kept as a tuple sorted by layer. At most one per layer, and none above a static exit,
            which always fires first.
        fingerprint: the model the plan was made for; None leaves only layers and widths to check.

    Raises:
        PlanError: exits contradict each other or the fingerprint; the message names the exit by its sorted index.
    """

    exits: Sequence[Exit] = ()
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.exits, Iterable):
            raise PlanError(f"exits: expected a sequence of exits, got {type(self.exits).__name__}")
        exits = tuple(self.exits)
        for index, exit_ in enumerate(exits):
            if not isinstance(exit_, GateExit | StaticExit):
                raise PlanError(f"exits[{index}]: expected a GateExit or StaticExit, got {type(exit_).__name__}")
        object.__setattr__(self, "exits", tuple(sorted(exits, key=lambda exit_: exit_.layer)))
        if self.fingerprint is not None and not isinstance(self.fingerprint, Fingerprint):
            raise PlanError(f"fingerprint: expected a Fingerprint or None, got {type(self.fingerprint).__name__}")
        hidden_size = next((exit_.hidden_size for exit_ in self.exits if isinstance(exit_, GateExit)), None)
        for index, exit_ in enumerate(self.exits):
            below = self.exits[index - 1] if index else None
            if below is not None and below.layer == exit_.layer:
                raise PlanError(f"exits[{index}].layer: layer {exit_.layer} already has exits[{index - 1}]")
            if isinstance(below, StaticExit):
                raise PlanError(
                    f"exits[{index}].layer: {exit_.layer} is never reached, because the static exit after layer "
                    f"{below.layer} always fires; remove one of the two"
                )
            if isinstance(exit_, GateExit) and exit_.hidden_size != hidden_size:
                raise PlanError(
                    f"exits[{index}].w1: is for hidden size {exit_.hidden_size}, but the first gate for {hidden_size}"
                )
        if self.fingerprint is not None:
            self._check_sizes(self.fingerprint.num_layers, self.fingerprint.hidden_size, PlanError)

    def _check_sizes(self, num_layers: int, hidden_size: int, error: type[PlanError]) -> None:
        for index, exit_ in enumerate(self.exits):
            if exit_.layer >= num_layers:
                raise error(
                    f"exits[{index}].layer: {exit_.layer} is out of range: the decoder has {num_layers} layers "
                    f"(0..{num_layers - 1})"
                )
            if isinstance(exit_, GateExit) and exit_.hidden_size != hidden_size:
                raise error(
                    f"exits[{index}].w1: has {exit_.w1.shape[1]} columns, but the decoder's hidden size {hidden_size} "
                    f"takes 2 * {hidden_size} = {2 * hidden_size}"
                )

    def check(self, model: nn.Module) -> None:
        """Make sure that the plan can be applied to `model`, a Hugging Face causal LM or MLLM.

        Raises:
            PlanMismatchError: it cannot; the message names the field, and the plan's and the model's value.
            UnsupportedModelError: the model's decoder, or one of its sizes, cannot be found.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(model)
        facts = decoder_facts(model)
        self._check_sizes(facts.num_layers, facts.hidden_size, PlanMismatchError)

    def describe(self) -> list[dict[str, Any]]:
        """One row per exit, for tables: layer, kind ("gate" or "static"), threshold and width (None if static)."""
        return [
            {"layer": exit_.layer, "kind": "gate", "threshold": exit_.threshold, "width": exit_.width}
            if isinstance(exit_, GateExit)
            else {"layer": exit_.layer, "kind": "static", "threshold": None, "width": None}
            for exit_ in self.exits
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan to `folder`, which is created where missing, as ``vte_plan.json`` + ``vte_plan.safetensors``.

        Each file replaces its predecessor in one step, the JSON last, and the JSON holds the other's SHA-256: after
        a crash a reader finds a whole plan or a clear error, never a mixture.

        Raises:
            PlanError: `folder` is a file.
            OSError: the files cannot be written.
        """
        from vte_compile.plan_files import save_plan

        save_plan(self, folder)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Plan:
        """Read a plan from a folder, or from the Hugging Face Hub if there is no such folder.

        Everything is validated, and no file can run code or name a path.

        Args:
            folder_or_hub_id: a folder, or a Hub model id such as ``"user/llava-vte"``.
            revision: branch, tag or commit on the Hub; only with a Hub id.

        Raises:
            PlanError: files that are missing, damaged, inconsistent or of a newer schema; file and field are named.
            InputError: a revision was given for a folder.
        """
        from vte_compile.plan_files import load_plan

        return load_plan(folder_or_hub_id, revision)

    @classmethod
    def from_dyvte_checkpoint(
        cls,
        state_dict: Mapping[str, Tensor],
        thresholds: Mapping[int, float] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Plan:
        """Take the gates from a checkpoint of the DyVTE authors' code (DoubtedSteam/DyVTE).

        Args:
            state_dict: holds ``model.visual_gates_router.{layer}.w1.weight`` [M, 2C] and ``.w2.weight`` [2, M], with
                or without a prefix; everything outside ``visual_gates_router`` is ignored.
            thresholds: by layer; 0, the authors' rule, where absent.
            layers: which gates to take; all by default.

        Returns:
            A plan without a fingerprint, because the checkpoint does not say what model it is for.

        Raises:
            PlanError: no gates, half a gate, a gate of another form, or a layer that has no gate in the checkpoint.
        """
        found: dict[int, dict[str, str]] = {}
        for key in state_dict:
            router = _DYVTE_KEY.search(key)
            if router is None:
                continue
            weight = _DYVTE_WEIGHT.fullmatch(router["rest"])
            if weight is None:
                raise PlanError(f"{key}: not a gate of two bias-free linears w1 and w2, as DyVTE has it")
            other = found.setdefault(int(weight["layer"]), {}).setdefault(weight["weight"], key)
            if other != key:
                raise PlanError(f"{key}: the checkpoint has this weight twice, also as {other}")
        if not found:
            raise PlanError("state_dict: no DyVTE gates (keys like model.visual_gates_router.0.w1.weight)")
        thresholds = dict(thresholds or {})
        wanted = sorted(found) if layers is None else sorted(set(layers))
        for argument, named in (("layers", wanted), ("thresholds", thresholds)):
            if unknown := [layer for layer in named if layer not in found]:
                raise PlanError(f"{argument}: no gate for {unknown}; the checkpoint has gates for {sorted(found)}")
        exits = []
        for layer in wanted:
            keys = found[layer]
            for name, other_name in (("w1", "w2"), ("w2", "w1")):
                if name not in keys:
                    raise PlanError(f"{keys[other_name]}: the checkpoint lacks its {name}.weight")
            try:
                exits.append(
                    GateExit(layer, state_dict[keys["w1"]], state_dict[keys["w2"]], thresholds.get(layer, 0.0))
                )
            except PlanError as error:
                raise PlanError(f"visual_gates_router.{layer}: {error}") from error
        return cls(exits)

    def __repr__(self) -> str:
        made_for = "any model" if self.fingerprint is None else self.fingerprint.model_type
        return f"Plan({', '.join(map(repr, self.exits)) or 'no exits'}; for {made_for})"
