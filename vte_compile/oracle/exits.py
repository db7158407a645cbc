"""When the visual tokens of a row leave."""

from __future__ import annotations

import torch
from torch import nn

from vte_compile.oracle.rows import RowRun
from vte_compile.plan import GateExit, StaticExit


def fires(candidate: GateExit | StaticExit, run: RowRun) -> bool:
    """Whether the row, which has visual tokens, exits here (DyVTE, arXiv 2411.19628, the "hyper-network").

    Question tokens are what follows the last visual token. With none, nothing exits. With only one, the mean is that of
    no token at all: NaN, which keeps.
    """
    last_visual = int(run.visual.nonzero().max())
    question = run.hidden[0, last_visual + 1 :]
    if question.shape[0] == 0:
        return False
    if isinstance(candidate, StaticExit):
        return True
    question = question.to(torch.promote_types(question.dtype, torch.float32))
    feature = torch.cat([question[:-1].mean(0), question[-1]])
    z = candidate.w2.to(feature) @ nn.functional.gelu(candidate.w1.to(feature) @ feature)
    run.features[candidate.layer] = feature
    run.gate_logits[candidate.layer] = z
    return bool(z[1] - z[0] > candidate.threshold)
