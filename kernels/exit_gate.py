"""The exit gate: should the visual tokens leave after this layer? (DyVTE, arXiv 2411.19628, section 4.)

    f = [mean of the question tokens except the last; last token]
    z = W2 . GELU(W1 . f)          exit iff z[1] - z[0] > threshold

The question tokens are the text tokens behind the last visual token. ``exit_logits`` is the naive reference;
``vte::exit_gate`` and ``vte::static_exit`` are the ops that rewritten graphs hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exit_logits(question: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Logits (keep, exit) of one sample's gate.

    Args:
        question: [Q, C] hidden states behind the layer, of the text tokens after the last visual token.
        w1: [M, 2C], and w2: [2, M]; computed in float32, or wider where ``question`` is.

    Returns:
        [2]; NaN where Q < 2, since the mean is then over nothing (which keeps, as any NaN does).
    """
    dtype = torch.promote_types(question.dtype, torch.float32)
    question, w1, w2 = (x.to(question.device, dtype) for x in (question, w1, w2))
    features = torch.cat([question[:-1].mean(0), question[-1]])
    return w2 @ F.gelu(w1 @ features)


def question_start(visual_mask: Tensor) -> int:
    """Index of the first token behind the last visual one; ``visual_mask`` [S] has at least one."""
    return int(visual_mask.nonzero()[-1]) + 1


@torch.library.custom_op("vte::exit_gate", mutates_args=())
def exit_gate(hidden_states: Tensor, visual_mask: Tensor, w1: Tensor, w2: Tensor, threshold: float) -> Tensor:
    """[1, S, C], [1, S] bool -> [] bool: whether the gate fires; never without visual tokens or a question."""
    if not static_exit(visual_mask):
        return torch.zeros((), dtype=torch.bool, device=hidden_states.device)
    logits = exit_logits(hidden_states[0, question_start(visual_mask[0]) :], w1, w2)
    return logits[1] - logits[0] > threshold


@exit_gate.register_fake
def _(hidden_states: Tensor, visual_mask: Tensor, w1: Tensor, w2: Tensor, threshold: float) -> Tensor:
    return hidden_states.new_empty((), dtype=torch.bool)


@torch.library.custom_op("vte::static_exit", mutates_args=())
def static_exit(visual_mask: Tensor) -> Tensor:
    """[1, S] bool -> [] bool: whether visual tokens are there and text follows the last of them."""
    return visual_mask.any() & ~visual_mask[0, -1]


@static_exit.register_fake
def _(visual_mask: Tensor) -> Tensor:
    return visual_mask.new_empty(())
