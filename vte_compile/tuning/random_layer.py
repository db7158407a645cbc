"""The paper's own way to train gates (DyVTE, arXiv 2411.19628): per step one layer is drawn, and only its gate learns.

Layers 0..k run once; the batch then continues twice, with and without the visual tokens, which gives the label. The
model is frozen. That costs two prefills and more for one gate's labels; vte_compile/tuning/examine.py has those of all
gates for less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from vte_compile.errors import CalibrationError, InputError, UnsupportedModelError
from vte_compile.families.decoder import find_decoder
from vte_compile.families.inputs import decoder_inputs
from vte_compile.families.logits import capped, softcap_of
from vte_compile.tuning.answered import placed
from vte_compile.tuning.batches import IGNORE
from vte_compile.tuning.examine import AGREEING_POSITIONS, LOSS_RATIO, Examiner, own_answer
from vte_compile.tuning.gates import WARM_UP, Gates
from vte_compile.tuning.samples import Sample


@dataclass(frozen=True)
class Batch:
    """B prompts with their answers behind them, as the decoder takes them; padding may stand anywhere.

    Args:
        inputs_embeds: [B, S, C], visual features in place.
        attention_mask: [B, S] bool, False at padding.
        visual_mask: [B, S] bool.
        labels: [B, S] int64, the token ids where the answer is, else -100.

    Raises:
        InputError: The shapes differ, or a row has no visual token, no answer, or fewer than two question tokens.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    visual_mask: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = self.inputs_embeds.shape[:2]
        for name in ("attention_mask", "visual_mask", "labels"):
            if getattr(self, name).shape != shape:
                raise InputError(f"{name}: expected {list(shape)}, got {list(getattr(self, name).shape)}.")
        for row in range(len(self.labels)):
            if not bool(self.visual_mask[row].any()) or not bool((self.labels[row] != IGNORE).any()):
                raise InputError(f"row {row} has no visual token or no answer: it gives no label.")
            if int(self.question(row).sum()) < 2:
                raise InputError(f"row {row} has fewer than two question tokens: gates read nothing there.")

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        """Prompts of different lengths: of each its embeddings [S, C], visual mask [S] and labels [S]."""
        embeds, visual, labels = (list(parts) for parts in zip(*rows, strict=True))
        real = pad_sequence([torch.ones_like(mask) for mask in visual], batch_first=True)
        padded = pad_sequence(embeds, batch_first=True), real, pad_sequence(visual, batch_first=True)
        return cls(*padded, pad_sequence(labels, batch_first=True, padding_value=IGNORE))

    def question(self, row: int) -> Tensor:
        """[S] bool: the text tokens behind the last visual token, and before the answer."""
        after = torch.zeros_like(self.visual_mask[row])
        first = int((self.labels[row] != IGNORE).nonzero()[0])
        after[int(self.visual_mask[row].nonzero()[-1]) + 1 : first] = True
        return after & self.attention_mask[row].bool()


@dataclass(frozen=True)
class StepResult:
    """What one step found; the gradients of `loss` are those of one layer's gate."""

    features: Tensor
    """[B, 2C], what the gate read."""
    labels: Tensor
    """[B] bool, True where the sample may exit."""
    full_ce: Tensor
    """[B], mean cross-entropy of the answer with the visual tokens."""
    exit_ce: Tensor
    """[B], and without them behind the layer."""
    logits: Tensor
    """[B, 2], the gate's, [keep, exit]."""
    loss: Tensor
    """[], the mean cross-entropy of the gate's logits."""


def random_layer_step(model: nn.Module, gates: Sequence[tuple[Tensor, Tensor]], batch: Batch, layer: int) -> StepResult:
    """One step for the gate after `layer`, drawn by the caller; ``loss.backward()`` gives its weights' gradients.

    Args:
        model: A causal LM or MLLM of transformers, whose attention takes a mask ("sdpa" or "eager").
        gates: w1 [M, 2C] and w2 [2, M] of each layer's gate; features are cast to their dtype.
        batch: On the model's device.
        layer: Decoder layer, counted from 0.

    Raises:
        InputError: There is no such gate.
    """
    if not 0 <= layer < len(gates):
        raise InputError(f"layer={layer}: there are gates for the layers 0..{len(gates) - 1}.")
    features, full, exited = _both_ways(model, batch, layer)
    answers = [row != IGNORE for row in batch.labels]
    labels, losses = [], []
    for row, answer in enumerate(answers):
        target = batch.labels[row, answer]
        full_ce, exit_ce = (F.cross_entropy(logits, target) for logits in (full[row], exited[row]))
        same = (full[row].argmax(-1) == exited[row].argmax(-1)).double().mean()
        labels.append((same > AGREEING_POSITIONS) & (exit_ce < LOSS_RATIO * full_ce))
        losses.append(torch.stack([full_ce, exit_ce]))
    may_exit = torch.stack(labels)
    w1, w2 = gates[layer]
    features = features.to(w1)
    logits = F.gelu(features @ w1.mT) @ w2.mT
    full_ce, exit_ce = torch.stack(losses).unbind(-1)
    return StepResult(features, may_exit, full_ce, exit_ce, logits, F.cross_entropy(logits, may_exit.long()))


@torch.no_grad()
def labelled_row(examiner: Examiner, sample: Sample, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample as a row for :meth:`Batch.of`, with the model's own answer where it has none.

    Raises:
        InputError: The model does not take the sample.
        UnsupportedModelError: The model's decoder takes more than embeddings, counted positions and a causal mask.
    """
    spec = examiner.spec
    if spec.position_rows > 1 or spec.token_inputs or spec.has_windows:
        raise UnsupportedModelError(
            f"{type(examiner.model).__name__} has multimodal positions, features behind layers, blocks of tokens or "
            "sliding windows: the paper's way to train gates, a layer at a time, counts positions as of text, and lets "
            "each token attend to all before it. Take the way that examines all layers (the default)."
        )
    answered = sample if sample.answer else own_answer(examiner, sample, max_new_tokens)
    inputs = placed(examiner.spec, answered)
    prompt = inputs.pop("input_ids")
    answer = prompt.new_tensor(answered.answer)[None]
    chunk = decoder_inputs(
        examiner.model,
        examiner.spec,
        input_ids=torch.cat([prompt, answer], 1),
        inputs_embeds=None,
        visual_mask=None,
        may_exit=True,
        multimodal={name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")},
    )
    labels = torch.cat([torch.full_like(prompt, IGNORE), answer], 1)
    return chunk.embeds[0], chunk.visual_mask[0], labels[0]


def train_random_layer(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    width: int,
    seed: int = 0,
    rate: float = 6e-5,
    weight_decay: float = 0.0,
) -> Gates:
    """Train gates after all layers but the last, one of them per batch, as the paper does, by default with its numbers.

    AdamW with a cosine schedule behind a warm-up; first weights as those of ``nn.Linear``.

    Args:
        model: As in :func:`random_layer_step`; nothing of it is trained.
        batches: On the model's device; each is used once.
        steps: How many batches there are.
        width: M, the gates' own width (2048 in the paper).
        seed: Of the first weights and of the layers drawn.
        rate: The highest learning rate.
        weight_decay: Of AdamW.

    Raises:
        CalibrationError: The loss is not finite.
    """
    decoder: Any = find_decoder(model)
    inputs, device = 2 * decoder.config.hidden_size, next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    def linear(out: int, in_: int) -> Tensor:
        weight = (2 * torch.rand(out, in_, generator=generator) - 1) * in_**-0.5
        return weight.to(device).requires_grad_()

    gates = [(linear(width, inputs), linear(2, width)) for _ in range(len(decoder.layers) - 1)]
    weights = [weight for gate in gates for weight in gate]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    progress = tqdm(batches, "gates, a layer at a time", total=steps, unit="batch", dynamic_ncols=True)
    for step, batch in enumerate(progress):
        layer = int(torch.randint(len(gates), (), generator=generator))
        loss = random_layer_step(model, gates, batch, layer).loss
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"The loss of the gate after layer {layer} is {loss.item()} in step {step + 1} of {steps}: train with "
                f"a lower rate (it is {rate:g}), or, if hidden states overflow, run the model in bfloat16 or float32."
            )
        optimizer.zero_grad()  # to None: gates that were not drawn stay as they are
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    first, second = (torch.stack([weight.detach().cpu() for weight in kind]) for kind in zip(*gates, strict=True))
    return Gates(first, second)


@torch.no_grad()
def _both_ways(model: nn.Module, batch: Batch, layer: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Features [B, 2C] behind `layer`, and each row's logits [answer, vocab] with the visual tokens and without."""
    decoder: Any = find_decoder(model)
    real = batch.attention_mask.bool()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    hidden, mask = batch.inputs_embeds, _visible(real, batch.inputs_embeds.dtype)
    for index in range(layer + 1):
        hidden = _run_layer(decoder, index, hidden, mask, positions)
    features = []
    for row in range(len(hidden)):
        question = hidden[row, batch.question(row)]
        features.append(torch.cat([question[:-1].mean(0), question[-1]]))
    kept = real & ~batch.visual_mask
    # The token before each token of the answer predicts it.
    predicts = F.pad(batch.labels != IGNORE, (0, 1))[:, 1:]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    softcap, logits = softcap_of(model, decoder.config), []
    for keep in (real, kept):
        rows = zip(hidden, positions, predicts, keep, strict=True)
        parts = [(states[here], place[here], marked[here]) for states, place, marked, here in rows]
        states, places, marks = (pad_sequence(list(part), batch_first=True) for part in zip(*parts, strict=True))
        lengths = keep.sum(1, keepdim=True)
        mask = _visible(torch.arange(states.shape[1], device=lengths.device) < lengths, states.dtype)
        for index in range(layer + 1, len(decoder.layers)):
            states = _run_layer(decoder, index, states, mask, places)
        answered = [state[mark] for state, mark in zip(states, marks, strict=True)]
        logits.append([capped(head(decoder.norm(state)), softcap) for state in answered])
    return torch.stack(features), logits[0], logits[1]


def _run_layer(decoder: Any, index: int, hidden: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """One decoder layer over hidden [B, T, C], without a cache."""
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    output = decoder.layers[index](
        hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False
    )
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _visible(real: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T] of real tokens [B, T]: causal, and padding sees itself, so that nothing is NaN."""
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    visible = (real[:, None, :] & torch.ones_like(itself).tril()) | itself
    return torch.zeros(visible.shape, dtype=dtype, device=real.device).masked_fill(~visible, -torch.inf)[:, None]
