"""Trains exit gates on stored features and labels, all side by side, and measures how well they tell labels apart.

A gate and its label are those of DyVTE (arXiv 2411.19628; kernels/exit_gate.py). The paper trains one layer's gate per
step; here every gate learns from every sample. The paper's own procedure: vte_compile/tuning/random_layer.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from vte_compile.errors import CalibrationError, InputError

logger = logging.getLogger(__name__)

WARM_UP = 0.03
"""Share of the steps, as in the paper."""
_HELD_OUT = 0.2  # share of the samples on which widths are compared
_CHUNK = 1024  # samples whose margins are computed at once


@dataclass(frozen=True, eq=False)
class Gates:
    """One gate after each of the decoder layers 0..G-1, all of one width M.

    `w1` [G, M, 2C] and `w2` [G, 2, M], float32 on the CPU, as :class:`vte_compile.GateExit` takes them. A gate of zeros
    knows nothing: its margin is 0 for all samples, so it fires for all or for none.
    """

    w1: Tensor
    w2: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """z = [keep, exit] of each gate: features [n, G, 2C] -> [n, G, 2]."""
        return _logits(features.transpose(0, 1).to(self.w1), self.w1, self.w2).transpose(0, 1)

    def margins(self, features: Tensor) -> Tensor:
        """z[exit] - z[keep] of each gate: features [n, G, 2C] -> [n, G]; NaN where a feature is."""
        logits = torch.cat([self.logits(part) for part in features.split(_CHUNK)])
        return logits[..., 1] - logits[..., 0]


@dataclass(frozen=True)
class GateAccuracy:
    """How well the gate of one layer tells apart the samples that may exit and those that may not."""

    layer: int
    may_exit: float
    """The share of the samples with this label."""
    balanced_accuracy: float | None
    """At threshold 0: the mean of the shares of both kinds that are told right; None if there is one kind only."""
    auc: float | None
    """The chance that of two samples, one of each kind, the one that may exit has the larger margin; None likewise."""


@dataclass(frozen=True)
class WidthAccuracy:
    """How well gates of one width do on held-out samples: means over the layers that have both labels."""

    width: int
    parameters: int
    """Of one gate."""
    balanced_accuracy: float
    auc: float


def train_gates(
    features: Tensor,
    labels: Tensor,
    *,
    width: int = 64,
    epochs: int = 30,
    seed: int = 0,
    rate: float = 3e-3,
    weight_decay: float = 1.0,
    batch: int = 64,
    device: torch.device | str | None = None,
) -> Gates:
    """Train one gate per layer, all side by side, with AdamW and a cosine schedule behind a warm-up.

    A layer with one kind of label only has nothing to learn: its gate is left at zeros, and a warning says so.

    Args:
        features: [n, G, 2C], what the gate after each of the layers 0..G-1 reads.
        labels: [n, G] bool, True where the sample may exit after the layer.
        width: M, the gates' own width (2048 in the paper).
        epochs: Passes over the samples.
        seed: Of the first weights and of the samples' order: the same seed gives the same gates on the same machine.
        rate: The highest learning rate, for features of unit size: they are scaled to it in training, which w1 absorbs.
        weight_decay: Of AdamW, which multiplies it by the rate. Samples are often fewer than weights.
        batch: Samples per step; the last step of an epoch has what is left.
        device: Where to train; None: where the features are.

    Raises:
        InputError: Wrong shapes or dtypes, no samples, features that are not finite, or a setting out of range.
        CalibrationError: All layers have one kind of label only, or the loss is not finite.
    """
    _check(features, labels)
    for name, value in (("width", width), ("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}={value}: expected at least 1.")
    constant = _one_label_only(labels)
    samples, layers, inputs = features.shape
    device = torch.device(device) if device is not None else features.device
    generator = torch.Generator().manual_seed(seed)
    norms = torch.linalg.vector_norm(features, dim=0, dtype=torch.float32)
    scale = (norms / samples**0.5).clamp(min=1e-6)[:, None].to(device)  # [G, 1, 2C]
    w1 = (torch.randn(layers, width, inputs, generator=generator) * inputs**-0.5).to(device)
    w2 = (torch.randn(layers, 2, width, generator=generator) * width**-0.5).to(device)
    weights = [w1.requires_grad_(), w2.requires_grad_()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay)
    steps = epochs * -(-samples // batch)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    progress = tqdm(range(epochs), "gates", unit="epoch", dynamic_ncols=True)
    for epoch in progress:
        for chosen in torch.randperm(samples, generator=generator).to(features.device).split(batch):
            scaled = features[chosen].transpose(0, 1).to(device, torch.float32) / scale
            logits = _logits(scaled, w1, w2)  # [G, batch, 2]
            # A mean over the samples and a sum over the gates, which share nothing.
            loss = F.cross_entropy(logits.permute(1, 2, 0), labels[chosen].long().to(device)) * layers
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"The gates' loss is {loss.item()} in epoch {epoch + 1} of {epochs}: train with a lower rate "
                f"(it is {rate:g})."
            )
        progress.set_postfix(loss=f"{loss.item() / layers:.3f}")
    w1, w2 = ((weight.detach() * ~constant[:, None, None].to(device)) for weight in (w1 / scale, w2))
    return Gates(w1.cpu(), w2.cpu())


def accuracy(margins: Tensor, labels: Tensor) -> list[GateAccuracy]:
    """How well each gate tells labels apart, on samples it was not trained on, for a fair answer.

    Args:
        margins: [n, G], as :meth:`Gates.margins` gives them.
        labels: [n, G] bool.
    """
    return [_accuracy(layer, margins[:, layer], labels[:, layer]) for layer in range(labels.shape[1])]


def accuracy_by_width(
    features: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    *,
    epochs: int = 30,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[WidthAccuracy]:
    """Train gates of several widths on four fifths of the samples, and measure them on the rest.

    The paper's width of 2048 is not light: 537 M parameters on a 7B model. Arguments as for :func:`train_gates`.

    Raises:
        InputError: As in :func:`train_gates`, or no widths.
        CalibrationError: As in :func:`train_gates`, or no layer has both labels among the held-out samples.
    """
    _check(features, labels)
    if not widths:
        raise InputError("widths: expected at least one width.")
    samples = len(features)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).to(features.device)
    held_out, rest = order.tensor_split([round(_HELD_OUT * samples)])
    mixed = [layer for layer, both in enumerate((~_uniform(labels[held_out])).tolist()) if both]
    if not mixed:
        raise CalibrationError(
            f"Widths cannot be compared: of the {len(held_out)} held-out samples, all or none may exit after any layer."
        )
    rows = []
    for width in widths:
        gates = train_gates(features[rest], labels[rest], width=width, epochs=epochs, seed=seed, device=device)
        measured = accuracy(gates.margins(features[held_out])[:, mixed], labels[held_out][:, mixed])
        balanced = [each.balanced_accuracy for each in measured if each.balanced_accuracy is not None]
        areas = [each.auc for each in measured if each.auc is not None]
        parameters = gates.w1[0].numel() + gates.w2[0].numel()
        rows.append(WidthAccuracy(width, parameters, sum(balanced) / len(mixed), sum(areas) / len(mixed)))
    return rows


def _logits(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """[G, n, 2C] -> [G, n, 2]."""
    return F.gelu(features @ w1.mT) @ w2.mT


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 3 or 0 in features.shape or not features.is_floating_point():
        raise InputError(f"features: expected [n, G, 2C] floating point, got {list(features.shape)} {features.dtype}.")
    if labels.shape != features.shape[:2] or labels.dtype != torch.bool:
        raise InputError(
            f"labels: expected {list(features.shape[:2])} bool, as many as there are features, got "
            f"{list(labels.shape)} {labels.dtype}."
        )
    for index, sample in enumerate(features):  # one by one: no second copy of gigabytes
        if not bool(torch.isfinite(sample).all()):
            raise InputError(
                f"features: those of sample {index} are not finite. A prompt without a question behind its image has "
                "none to train on; else the model's hidden states overflow: run it in bfloat16 or float32."
            )


def _one_label_only(labels: Tensor) -> Tensor:
    """[G], which layers have one kind of label only; warns of them, and refuses if there are no others."""
    uniform = _uniform(labels)
    for layer in uniform.nonzero().flatten().tolist():
        which = "may" if labels[0, layer] else "may not"
        logger.warning(
            "layer %d: all %d training samples %s exit there, so its gate learns nothing and stays constant",
            layer, len(labels), which,
        )  # fmt: skip
    if bool(uniform.all()):
        raise CalibrationError(
            f"After each of the {labels.shape[1]} layers all or none of the {len(labels)} training samples may exit: "
            "there is nothing for gates to learn. Use more and more diverse samples; or, if exits change nothing from "
            "some layer on, a StaticExit after it."
        )
    return uniform


def _uniform(labels: Tensor) -> Tensor:
    return (labels == labels[:1]).all(0)


def _accuracy(layer: int, margins: Tensor, labels: Tensor) -> GateAccuracy:
    may_exit = labels.double().mean().item()
    if may_exit in (0.0, 1.0):
        return GateAccuracy(layer, may_exit, None, None)
    right = (margins > 0) == labels
    balanced = (right[labels].double().mean() + right[~labels].double().mean()).item() / 2
    # Mann and Whitney: the area under the curve from the ranks, which samples of the same margin share.
    _, place, count = margins.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[place].double()
    positive, negative = int(labels.sum()), int((~labels).sum())
    auc = (ranks[labels].sum().item() - positive * (positive + 1) / 2) / (positive * negative)
    return GateAccuracy(layer, may_exit, balanced, auc)
