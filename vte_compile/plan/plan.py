"""The plan: a validated description of what to do to a model.

After which decoder layers visual tokens leave, with the gates of DyVTE (arXiv 2411.19628, section on the
"hyper-network"); which attentions are skipped, and which adapters take their place or stand before those that are kept
(EAS, arXiv 2403.15226; vte_compile/adapters.py). The parts are in parts.py, those of co-attention layers in
co_attention.py, and the files a plan is stored in in files.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from vte_compile.adapters import Adapter
from vte_compile.errors import PlanError, PlanMismatchError
from vte_compile.families.co_attention import CoAttentionSpec, find_co_attention
from vte_compile.field_checks import check_values, float_tensor
from vte_compile.fingerprint import Fingerprint, decoder_facts
from vte_compile.plan.co_attention import CoAttention
from vte_compile.plan.parts import Exit, GateExit, KeptAdapter, SkippedAttention, StaticExit, place


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What to do to a model: after which decoder layers its visual tokens may leave, and which attentions it skips.

    Exits are tried from the lowest layer upward, in prefill, per sample, until the first that fires. Exits, skips and
    adapters are independent of each other: any of them may be on the same layer, but for a skip and a `KeptAdapter`.

    Args:
        exits: in any order; kept as a tuple sorted by layer. At most one per layer, and none above a static exit,
            which always fires first.
        fingerprint: the model the plan was made for; None leaves only layers and widths to check.
        skips: in any order; kept as a tuple sorted by layer. At most one per layer.
        adapters: of attentions that are kept; in any order; kept as a tuple sorted by layer. At most one per layer,
            and none on a skipped layer.
        co_attention: what to do to the co-attention layers of a model that has them and no decoder (BridgeTower); in
            any order; kept as a tuple, the text side's first, each side sorted by level. At most one per layer.
        companion: [C], the embedding of a token that goes along with each prompt (LaVIN-EAS's "modality" token): it
            attends to itself, no other token attends to it, and nothing of it is cached. The means that PIAs pool count
            it as one token more; those of routers do not.

    Raises:
        PlanError: parts contradict each other or the fingerprint; the message names the part by its sorted index.
    """

    exits: Sequence[Exit] = ()
    fingerprint: Fingerprint | None = None
    skips: Sequence[SkippedAttention] = ()
    adapters: Sequence[KeptAdapter] = ()
    co_attention: Sequence[CoAttention] = ()
    companion: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", _sorted_parts("exits", self.exits, GateExit, StaticExit))
        object.__setattr__(self, "skips", _sorted_parts("skips", self.skips, SkippedAttention))
        object.__setattr__(self, "adapters", _sorted_parts("adapters", self.adapters, KeptAdapter))
        object.__setattr__(self, "co_attention", _sorted_parts("co_attention", self.co_attention, CoAttention))
        if self.fingerprint is not None and not isinstance(self.fingerprint, Fingerprint):
            raise PlanError(f"fingerprint: expected a Fingerprint or None, got {type(self.fingerprint).__name__}")
        if self.companion is not None:
            object.__setattr__(self, "companion", float_tensor("companion", self.companion, 1))
            check_values("companion", self.companion)
            if not any(skip.adapter is not None for skip in self.skips):
                raise PlanError("companion: nothing reads it: no skipped attention has an adapter; leave it out")
        for index, (below, exit_) in enumerate(pairwise(self.exits), 1):
            if isinstance(below, StaticExit):
                raise PlanError(
                    f"exits[{index}].layer: {exit_.layer} is never reached, because the static exit after layer "
                    f"{below.layer} always fires; remove one of the two"
                )
        skipped = {skip.layer: index for index, skip in enumerate(self.skips)}
        for index, kept in enumerate(self.adapters):
            if kept.layer in skipped:
                raise PlanError(
                    f"adapters[{index}].layer: the attention of layer {kept.layer} is skipped, by "
                    f"skips[{skipped[kept.layer]}]; remove one of the two"
                )
        sizes = self._hidden_sizes()
        for name, hidden_size in sizes.items():
            first, first_size = next(iter(sizes.items()))
            if hidden_size != first_size:
                raise PlanError(f"{name}: is for hidden size {hidden_size}, but {first} for {first_size}")
        if self.fingerprint is not None:
            self._check_sizes(self.fingerprint.num_layers, self.fingerprint.hidden_size, PlanError)

    def _hidden_sizes(self) -> dict[str, int]:
        """The hidden size that each field with weights is for."""
        gates = {f"exits[{i}].w1": exit_ for i, exit_ in enumerate(self.exits) if isinstance(exit_, GateExit)}
        pias = {f"skips[{i}].adapter": skip.adapter for i, skip in enumerate(self.skips) if skip.adapter is not None}
        plain = {f"adapters[{i}].adapter": kept.adapter for i, kept in enumerate(self.adapters)}
        co_attention = {
            f"co_attention[{i}].{name}": adapter
            for i, part in enumerate(self.co_attention)
            for name, adapter in part.adapters()
        }
        parts: dict[str, GateExit | Adapter] = {**gates, **pias, **plain, **co_attention}
        companion = {} if self.companion is None else {"companion": len(self.companion)}
        return {name: part.hidden_size for name, part in parts.items()} | companion

    def _check_sizes(self, num_layers: int, hidden_size: int, error: type[PlanError]) -> None:
        for field in ("exits", "skips", "adapters"):
            for index, part in enumerate(getattr(self, field)):
                if part.layer >= num_layers:
                    raise error(
                        f"{field}[{index}].layer: {part.layer} is out of range: the decoder has {num_layers} layers "
                        f"(0..{num_layers - 1})"
                    )
        for name, size in self._hidden_sizes().items():
            if size != hidden_size:
                raise error(f"{name}: is for hidden size {size}, but the decoder's is {hidden_size}")

    def check(self, model: nn.Module) -> None:
        """Make sure that the plan can be applied to `model`: a Hugging Face causal LM or MLLM, or a BridgeTower.

        Raises:
            PlanMismatchError: it cannot; the message names the field, and the plan's and the model's value.
            UnsupportedModelError: the model's decoder, or one of its sizes, cannot be found.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(model)
        spec = find_co_attention(model)
        if spec is not None:
            self._check_co_attention(type(model).__name__, spec)
            return
        if self.co_attention:
            raise PlanMismatchError(
                f"co_attention[0]: {type(model).__name__} has no co-attention layers (only BridgeTower's are known)"
            )
        facts = decoder_facts(model)
        self._check_sizes(facts.num_layers, facts.hidden_size, PlanMismatchError)

    def _check_co_attention(self, model: str, spec: CoAttentionSpec) -> None:
        for field in ("exits", "skips", "adapters"):
            if getattr(self, field):
                raise PlanMismatchError(
                    f"{field}[0]: is for the layers of a decoder, but {model} has co-attention layers and none of a "
                    "decoder: its parts are those of co_attention"
                )
        for index, part in enumerate(self.co_attention):
            if part.level >= spec.levels:
                raise PlanMismatchError(
                    f"co_attention[{index}].level: {part.level} is out of range: {model} has {spec.levels} levels of "
                    f"co-attention (0..{spec.levels - 1})"
                )
        for name, size in self._hidden_sizes().items():
            if size != spec.hidden_size:
                raise PlanMismatchError(f"{name}: is for hidden size {size}, but that of {model} is {spec.hidden_size}")

    def describe(self) -> list[dict[str, Any]]:
        """One row per exit, skip and adapter, in this order, then those of the co-attention layers, for tables.

        Columns: layer (or level); kind ("gate", "static", "skip" or "adapter"; of co-attention such as "text self
        skip"); threshold, of a gate, else None; width, of the gate or adapter, else None (a static exit, a
        training-free skip).
        """
        rows: list[dict[str, Any]] = []
        for exit_ in self.exits:
            if isinstance(exit_, GateExit):
                rows.append(_row(exit_.layer, "gate", exit_.threshold, exit_.width))
            else:
                rows.append(_row(exit_.layer, "static", None, None))
        for skip in self.skips:
            rows.append(_row(skip.layer, "skip", None, None if skip.adapter is None else skip.adapter.width))
        for kept in self.adapters:
            rows.append(_row(kept.layer, "adapter", None, kept.adapter.width))
        for part in self.co_attention:
            rows += [_row(part.level, kind, None, width) for kind, width in part.describe()]
        return rows

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan to `folder`, which is created where missing, as ``vte_plan.json`` + ``vte_plan.safetensors``.

        Each file replaces its predecessor in one step, the JSON last, and the JSON holds the other's SHA-256: after
        a crash a reader finds a whole plan or a clear error, never a mixture.

        Raises:
            PlanError: `folder` is a file.
            OSError: the files cannot be written.
        """
        from vte_compile.plan.files import save_plan

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
        from vte_compile.plan.files import load_plan

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
        from vte_compile.plan.dyvte_checkpoint import read_dyvte_checkpoint

        return read_dyvte_checkpoint(state_dict, thresholds, layers)

    @classmethod
    def from_eas_checkpoint(
        cls, state_dict: Mapping[str, Tensor], skip: Iterable[int], temperature: float = 10.0, scale: float = 1.0
    ) -> Plan:
        """Take the adapters from a checkpoint of the EAS authors' code (DoubtedSteam/EAS).

        LLaVA-EAS and LaVIN-EAS:

        Layers in `skip` get their PIA, ``layers.{i}.replaced_adapter.*``; the others keep their attention, with the
        plain adapter ``layers.{i}.adapter_attn.*`` in front where there is one. Each has ``conv_A`` (and, a PIA,
        ``conv_C``), ``conv_B``, ``conv_D`` and ``expert_weights``, with ``.weight`` and ``.bias``; only the router's
        bias may be absent. Prefixes such as ``model.`` do not matter, and all other keys are ignored.

        The checkpoint says neither which attentions are skipped, nor the temperature and scale: these are arguments.
        The number of groups follows from the shapes. Assumed is the method of the paper on a model of transformers:
        means over all prompt tokens, and decode with the prompt's router weights and pooled vectors. (LaVIN-EAS's
        "modality" token is another for prompts with and without an image: families.lavin.lavin_plan() adds it.)

        METER-EAS: of L levels, attentions 0 to L - 1 are the text side's self attentions by level, the next L its cross
        attentions, then the image side's self and cross attentions. Skipped ones get ``adapter_self_attn`` or
        ``adapter_cross_attn`` of ``cross_modal_{text,image}_layers.{level}``, kept ones and FFNs their ``adapter``.
        The authors' code takes 3 L and above for the image side's *self* attentions once more: to run what a
        checkpoint of theirs was trained as, subtract L from these.

        Args:
            state_dict: linears as [out, in] or, as the authors' kernel-1 convolutions, [out, in, 1].
            skip: the layers whose attentions are skipped; of METER, the attentions.
            temperature: of all routers (METER has none).
            scale: of all adapters.

        Returns:
            A plan without a fingerprint, because the checkpoint does not say what model it is for.

        Raises:
            PlanError: no adapters, half an adapter, an adapter of another form, or a layer of `skip` without a PIA.
        """
        from vte_compile.plan.eas_checkpoint import read_eas_checkpoint
        from vte_compile.plan.meter_eas_checkpoint import is_meter_eas, read_meter_eas

        if is_meter_eas(state_dict):
            return read_meter_eas(state_dict, skip, scale)
        return read_eas_checkpoint(state_dict, skip, temperature, scale)

    def __repr__(self) -> str:
        made_for = "any model" if self.fingerprint is None else self.fingerprint.model_type
        parts = [repr(part) for part in (*self.exits, *self.skips, *self.adapters, *self.co_attention)]
        parts += [] if self.companion is None else ["a companion token"]
        return f"Plan({', '.join(parts) or 'no exits'}; for {made_for})"


def _sorted_parts(field: str, parts: object, *types: type) -> tuple[Any, ...]:
    """`parts` as a tuple sorted by layer, if they are of `types` and each has a layer of its own."""
    if not isinstance(parts, Iterable):
        raise PlanError(f"{field}: expected a sequence, got {type(parts).__name__}")
    parts = tuple(parts)
    for index, part in enumerate(parts):
        if not isinstance(part, types):
            expected = " or ".join(type_.__name__ for type_ in types)
            raise PlanError(f"{field}[{index}]: expected a {expected}, got {type(part).__name__}")
    ordered = tuple(sorted(parts, key=place))
    for index, (below, part) in enumerate(pairwise(ordered), 1):
        if place(part) == place(below):
            name, where = ("level", f"{part.side} level") if isinstance(part, CoAttention) else ("layer", "layer")
            raise PlanError(f"{field}[{index}].{name}: {where} {getattr(part, name)} already has {field}[{index - 1}]")
    return ordered


def _row(layer: int, kind: str, threshold: float | None, width: int | None) -> dict[str, Any]:
    return {"layer": layer, "kind": kind, "threshold": threshold, "width": width}
