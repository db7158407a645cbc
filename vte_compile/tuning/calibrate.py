"""calibrate(): from a model and samples to a plan of gates, with a guarantee on how often answers change.

Every sample is examined once: its features, and what an exit after each layer would do to its answer (examine.py).
Half of the samples then train the gates (gates.py, or the paper's way, random_layer.py), a fifth chooses which layers
have one, and with which thresholds (policies.py), and the rest tests the guarantee (guarantee.py, docs/guarantee.md):
calibrate_examined.py.
"""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from vte_compile.errors import CalibrationError, InputError
from vte_compile.families.decoder import describe
from vte_compile.fingerprint import Fingerprint
from vte_compile.plan import GateExit, Plan
from vte_compile.tuning.binomial import check_share, samples_needed
from vte_compile.tuning.calibrate_examined import Choice, Costing, Promise, Splits, candidates, choose, fit_gates
from vte_compile.tuning.costs import LayerCosts, flop_costs, measure_costs
from vte_compile.tuning.examine import Examined, Examiner
from vte_compile.tuning.gates import Gates, accuracy, accuracy_by_width
from vte_compile.tuning.random_layer import Batch, labelled_row, train_random_layer
from vte_compile.tuning.report import CalibrationReport, LayerReport
from vte_compile.tuning.samples import read_samples
from vte_compile.tuning.splits import PARTS, Divided, samples_for
from vte_compile.tuning.store import collect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_BATCH = 8  # samples per step of the paper's procedure
_Costs = LayerCosts | Literal["flops", "measured"]


def calibrate(
    model: PreTrainedModel,
    samples: object,
    *,
    processor: Any = None,
    max_disagreement: float = 0.02,
    delta: float = 0.05,
    target_speedup: float | None = None,
    width: int = 64,
    epochs: int = 30,
    slack: float = 0.0,
    procedure: Literal["all_layers", "random_layer"] = "all_layers",
    widths: Sequence[int] = (),
    costs: _Costs = "flops",
    base: Plan | None = None,
    max_new_tokens: int = 64,
    work: str | os.PathLike[str] | None = None,
    seed: int = 0,
    report: Callable[[CalibrationReport], object] | None = None,
) -> Plan:
    """Train exit gates for a model, and choose layers and thresholds such that few answers change.

    P(the answer differs from the full model's) <= `max_disagreement` holds with confidence 1 - `delta` for prompts like
    the samples; what that means and assumes is in docs/guarantee.md. An answer is what greedy decoding gives, up to
    `max_new_tokens`.

    Args:
        model: An MLLM of transformers, in eval mode, not optimized.
        samples: As :func:`vte_compile.tuning.samples.read_samples` takes them. Answers that they have train the gates;
            layers, thresholds and the guarantee are about the model's own answers, which also train where there are
            no others.
        processor: The model's, where the samples are not its outputs already.
        max_disagreement: The share of answers that may differ.
        delta: The probability, over the draw of the samples, with which more may.
        target_speedup: Instead of `max_disagreement`: how many times cheaper prefill is to be in the mean. How many
            answers then differ at most is in the report.
        width: M, the gates' own width.
        epochs: Of the gates' training; the paper's procedure has one.
        slack: Nats by which an answer's loss may grow, beside the paper's factor of 1.03, in a sample that may exit;
            for models that are so sure of their answers that a ratio of losses is noise.
        procedure: How the gates are trained: "random_layer" is the paper's way, at a far higher price. It passes over
            the samples again, so they cannot be a stream.
        widths: Of gates to compare in the report.
        costs: What is to be saved: "flops" of each sample, times "measured" here for a mean sample, or other ones.
        base: Skips and adapters that are to be in the plan too, such as :func:`vte_compile.search_skips` finds. The
            gates learn from the model with them; the answers that may not differ are those of the model without them,
            so the guarantee covers the whole plan. What is saved is counted against the model with them.
        max_new_tokens: Of an answer.
        work: Folder that keeps what was found of each sample, so that an interrupted run goes on, and a later one only
            trains. None: nothing is kept.
        seed: Of the split and of the training.
        report: Called with what was found, such as ``rich.print`` or ``list.append``.

    Raises:
        InputError: Arguments out of range, or samples that cannot be used.
        PlanError: The base is for another model (PlanMismatchError).
        CalibrationError: The samples do not support the request; the message says how many would, where any can.
        UnsupportedModelError: A model that cannot be examined, or whose FLOPs are not known (pass other costs).
    """
    least = 1 if target_speedup is not None else samples_needed(max_disagreement, delta)
    assert least is not None  # no answer differs
    _check(model, samples, delta, target_speedup, procedure, costs, (width, *widths), epochs, base)
    knows_images = model.config if processor is None else processor
    divided = Divided(read_samples(samples, knows_images), seed)
    if 0 < operator.length_hint(divided) < samples_for(least):
        raise CalibrationError(_too_few(operator.length_hint(divided), least, "in all"))

    examined = collect(model, divided, work, max_new_tokens, base=base)
    counts = {part: divided.parts.count(part) for part in PARTS}
    try:
        if min(counts.values()) == 0 or counts["certification"] < least:
            raise CalibrationError(_too_few(counts["certification"], least, "in the certification split"))
        _warn_of_dependence(divided, counts["certification"])
        splits = Splits.of(examined, divided.parts)
        training: dict[str, Any] = {"epochs": epochs, "seed": seed, "device": model.device}
        if procedure == "all_layers":
            gates = fit_gates(splits.train, slack=slack, width=width, **training)
        else:
            again = Divided(read_samples(samples, knows_images), seed)
            gates = _train_the_papers_way(model, again, counts["train"], width, max_new_tokens, seed)
        known = _measured(model, examined, width, base) if costs == "measured" else None if costs == "flops" else costs
        promise, costing = Promise(max_disagreement, delta, target_speedup), Costing(model.config, base, known)
        choice = choose(gates, splits, slack, promise, costing)
    except CalibrationError as error:
        shares = ", ".join(f"{count} for {part}" for part, count in counts.items())
        saved = "" if work is None else f"; what was found of them is saved in {work}"
        raise CalibrationError(f"{error} (Of the samples, {shares}{saved}.)") from error

    if report is not None:
        settings = {"width": width, "epochs": epochs, "slack": slack, "procedure": procedure, "seed": seed}
        compared = accuracy_by_width(*candidates(splits.train, slack), widths, **training) if widths else []
        report(
            CalibrationReport(
                samples=counts,
                settings={**settings, "max_new_tokens": max_new_tokens, "target_speedup": target_speedup},
                layers=_layers(splits, slack, choice),
                certificate=choice.certificate,
                cost_unit={"flops": "FLOPs", "measured": "seconds"}[costs] if isinstance(costs, str) else "as given",
                widths=tuple(compared),
            )
        )
    exits = [
        GateExit(layer, gates.w1[layer].clone(), gates.w2[layer].clone(), threshold)
        for layer, threshold in enumerate(choice.certificate.thresholds)
        if math.isfinite(threshold)
    ]
    return replace(base or Plan(), exits=exits, fingerprint=Fingerprint.of(model))


def _check(
    model: PreTrainedModel,
    samples: object,
    delta: float,
    target_speedup: float | None,
    procedure: str,
    costs: _Costs,
    widths: Sequence[int],
    epochs: int,
    base: Plan | None,
) -> None:
    """Refuse now what would be refused when all samples have been examined."""
    check_share("delta", delta)
    if target_speedup is not None and not 1.0 < target_speedup < math.inf:
        raise InputError(f"target_speedup={target_speedup}: expected a number above 1.")
    for name, value in (("epochs", epochs), *(("width", width) for width in widths)):
        if value < 1:
            raise InputError(f"{name}={value}: expected at least 1.")
    if procedure not in ("all_layers", "random_layer"):
        raise InputError(f"procedure={procedure!r}: expected 'all_layers' or 'random_layer'.")
    if procedure == "random_layer" and base is not None:
        raise InputError("base: procedure='random_layer' trains on the model as it is, without skips and adapters.")
    if procedure == "random_layer" and isinstance(samples, Iterator):
        raise InputError("samples: are a stream, which procedure='random_layer' would need twice: pass a list.")
    if isinstance(costs, LayerCosts):
        if len(costs.exits) != (layers := describe(model).num_layers):
            raise InputError(f"costs: expected {layers} exits, one per layer, got {len(costs.exits)}.")
    elif costs == "flops":
        flop_costs(model.config, torch.tensor([2]), torch.tensor([1]), base)
    elif costs != "measured":
        raise InputError(f"costs={costs!r}: expected 'flops', 'measured' or LayerCosts.")


def _warn_of_dependence(divided: Divided, certified: int) -> None:
    if divided.repeated:
        logger.warning("%d samples are left out: their prompts came before", divided.repeated)
    if (pictures := len(divided.pictures["certification"])) < certified:
        logger.warning(
            "the guarantee takes prompts for independent, but %d of the certification split are about %d pictures: "
            "better one question per picture",
            certified, pictures,
        )  # fmt: skip


def _too_few(samples: int, least: int, where: str) -> str:
    return (
        f"There are too few samples: {samples} {where}. At least {least} are needed for certification, so about "
        f"{samples_for(least)} in all, if no answer differs; more if some do."
    )


def _train_the_papers_way(
    model: PreTrainedModel, divided: Divided, samples: int, width: int, max_new_tokens: int, seed: int
) -> Gates:
    examiner = Examiner(model)

    def batches() -> Iterator[Batch]:
        rows = (labelled_row(examiner, sample, max_new_tokens) for sample in divided if divided.parts[-1] == "train")
        while part := list(islice(rows, _BATCH)):
            yield Batch.of(part)

    return train_random_layer(model, batches(), steps=-(-samples // _BATCH), width=width, seed=seed)


def _measured(model: PreTrainedModel, examined: Examined, width: int, base: Plan | None) -> LayerCosts:
    tokens, visual = (round(count.double().mean().item()) for count in (examined.tokens, examined.visual))
    return measure_costs(model, tokens=tokens, visual=visual, width=width, base=base)


def _layers(splits: Splits, slack: float, choice: Choice) -> tuple[LayerReport, ...]:
    labels = candidates(splits.train, slack)[1]
    features, truth = candidates(splits.selection, slack)
    measured = accuracy(choice.gates.margins(features), truth)
    certified, thresholds = choice.certification, choice.certificate.thresholds
    exits = certified.exits(torch.tensor(thresholds, dtype=torch.float64))
    changed = certified.changed(exits)
    rows = []
    for layer, threshold in enumerate(thresholds):
        here = exits == layer
        rows.append(
            LayerReport(
                layer=layer,
                may_exit=labels[:, layer].double().mean().item(),
                balanced_accuracy=measured[layer].balanced_accuracy,
                auc=measured[layer].auc,
                threshold=threshold if math.isfinite(threshold) else None,
                exits=here.double().mean().item(),
                changed=int((changed & here).sum()),
            )
        )
    return tuple(rows)
