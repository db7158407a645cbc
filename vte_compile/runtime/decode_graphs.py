"""Decode steps as CUDA graphs: their hundreds of launches are recorded once, and replayed at once.

Between two growths of the cache, three things of a step change: the token's embedding, its position, and how many
columns are filled. A recorded step reads them from tensors of its own, and keys and values from whole buffers. All else
it knows by address: buffers, where rows begin, what adapters know of the prompt, weights. So a graph is replayed where
all addresses are those of its recording; where one is another (a buffer grew, a weight was replaced, another request),
the step runs as it is, and from the second such step on it is recorded anew.

A wrong recording would give wrong tokens without an error: the first replays of each graph run beside the step itself,
whose result counts. If they differ, graphs are not used any more, with a warning.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vte_compile.runtime.steps import StepProgram
from vte_compile.runtime.verify import excess

logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
"""A process may record one graph at a time."""
_CHECKS = 2
"""Replays that are compared: the recorded step's own, and one with other inputs."""


def cuda_graph(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record what a function launches, without running it; the result replays it, and gives its one output."""
    graph = torch.cuda.CUDAGraph()
    with _one_at_a_time, torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@dataclass
class _Recorded:
    key: tuple[Any, ...]
    token: list[Tensor]
    """What the step reads of the token."""
    ends: Tensor
    replay: Callable[[], Tensor]
    checks: int = _CHECKS
    """How many replays are still to be compared."""


class DecodeGraphs:
    """Runs the decode steps of a program whose attentions take ``ends``; one graph at a time.

    Requests that take turns are not recorded: only a step whose addresses are those of the step before it is.
    """

    def __init__(self, program: StepProgram) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._latest: tuple[Any, ...] | None = None
        self._recorded: _Recorded | None = None
        self._works = True

    def run(
        self, token: Sequence[Tensor], buffers: Sequence[Tensor], given: Sequence[Tensor], filled: Sequence[int]
    ) -> Tensor:
        """One step, which writes the last of the filled columns.

        Args:
            token: Its embedding [B, 1, C] and position, as graphs take them.
            buffers: Keys and values of each layer that attends, in turn, [B, heads, columns with room, head size].
            given: The program's further inputs.
            filled: Of each layer that attends, how many columns are filled, the token's included.

        Returns:
            Logits [B, 1, vocabulary].
        """
        with self._lock:
            key = (
                tuple((x.shape, x.dtype) for x in token),
                tuple((x.data_ptr(), x.shape, x.stride()) for x in (*buffers, *given)),
                tuple(weight.data_ptr() for weight in self._program.read_weights()),
            )
            recorded = self._recorded if self._recorded is not None and self._recorded.key == key else None
            ends = _ends(filled, token[0])
            if recorded is not None and not recorded.checks:
                return _replay(recorded, token, ends).clone()
            logits = self._program.run([*token, *buffers, *given], ends=ends).logits
            if recorded is None and self._works and key == self._latest:
                recorded = self._record(key, token, buffers, given, ends)
            self._latest = key
            if recorded is not None:
                self._check(recorded, token, ends, logits, buffers, filled)
            return logits

    def _record(
        self,
        key: tuple[Any, ...],
        token: Sequence[Tensor],
        buffers: Sequence[Tensor],
        given: Sequence[Tensor],
        ends: Tensor,
    ) -> _Recorded | None:
        self._recorded = None  # and so its memory
        with torch.inference_mode(False):  # so that they can be written in and outside of inference mode
            own, own_ends = [x.clone() for x in token], ends.clone()
        try:
            replay = cuda_graph(
                lambda: self._program.run([*own, *buffers, *given], ends=own_ends).logits, token[0].device
            )
        except Exception as error:  # an operation that cannot be recorded
            self._give_up(f"a step cannot be recorded: {type(error).__name__}: {error}")
            return None
        self._recorded = _Recorded(key, own, own_ends, replay)
        return self._recorded

    def _check(
        self,
        recorded: _Recorded,
        token: Sequence[Tensor],
        ends: Tensor,
        logits: Tensor,
        buffers: Sequence[Tensor],
        filled: Sequence[int],
    ) -> None:
        """Replay a step that ran, and compare its logits and what it wrote; put back what it wrote wrongly."""
        # The column before, too: there a replay would write that still had the ends of the step before.
        columns = [buffers[i][:, :, max(0, filled[i // 2] - 2) : filled[i // 2]] for i in range(len(buffers))]
        written = [x.clone() for x in columns]
        for x in columns:
            x[:, :, -1].fill_(torch.nan)
        again = _replay(recorded, token, ends)
        error = excess(again, logits)
        if error is None:
            error = excess(torch.cat([x.flatten() for x in columns]), torch.cat([x.flatten() for x in written]))
        for x, before in zip(columns, written, strict=True):
            x.copy_(before)
        recorded.checks -= 1
        if error is not None:
            self._give_up(f"a replayed step differs from the step itself by {error:.1e}, relative to the largest.")

    def _give_up(self, reason: str) -> None:
        self._works, self._recorded = False, None
        logger.warning(
            "decode steps run without CUDA graphs: %s Please report this, with the GPU's name (vte-compile env).",
            reason,
        )


def _replay(recorded: _Recorded, token: Sequence[Tensor], ends: Tensor) -> Tensor:
    for own, new in zip((*recorded.token, recorded.ends), (*token, ends), strict=True):
        own.copy_(new)
    return recorded.replay()


def _ends(filled: Sequence[int], embeds: Tensor) -> Tensor:
    """[layers, B] int32."""
    columns = torch.tensor(filled, dtype=torch.int32)[:, None].expand(-1, len(embeds))
    return columns.contiguous().to(embeds.device, non_blocking=True)
