"""decoder.onnx of an engine, run as any user of ONNX Runtime would: one session, numpy arrays, present becomes past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor


class SingleGraph:
    """Rows are aligned at the start, caches as well; ``past_lengths`` says how much of them is filled.

    ``behind``: so many places are free behind the rows of a first chunk.
    """

    def __init__(self, folder: Path, behind: int = 0) -> None:
        self.behind = behind
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "decoder.onnx", options, ["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past: dict[str, np.ndarray] = {}
        self.positions = np.zeros(0, np.int64)

    def run(self, embeds: Tensor, visual: Tensor, real: Tensor) -> dict[str, Tensor]:
        """One chunk [B, T, C] with padding anywhere; logits are [B, 1, vocabulary] of each row's last token."""
        rows = [row.nonzero()[:, 0] for row in real]
        lengths = np.array([len(row) for row in rows])
        if not self.past:
            self._begin(len(rows), "float16" in self.inputs["inputs_embeds"].type)
        longest = int(lengths.max()) + (0 if self.positions.any() else self.behind)
        dtype = next(v for k, v in self.past.items() if k.startswith("past_key_values")).dtype
        x = np.full((len(rows), longest, embeds.shape[2]), 7, dtype)  # what is padding does not matter
        mask = np.zeros((len(rows), longest), bool)
        for b, row in enumerate(rows):
            x[b, : len(row)], mask[b, : len(row)] = embeds[b, row].numpy(), visual[b, row].numpy()
        positions = self.positions[:, None] + np.arange(longest)
        feeds = {"inputs_embeds": x, "visual_mask": mask, "position_ids": positions, "new_lengths": lengths}
        feeds = {name: value for name, value in {**feeds, **self.past}.items() if name in self.inputs}
        names = [o.name for o in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.positions = self.positions + lengths
        for name in self.past:
            self.past[name] = results[name.replace("past_key_values", "present").replace("past_", "present_", 1)]
        return {name: torch.from_numpy(np.asarray(value)) for name, value in results.items()}

    def _begin(self, batch: int, half: bool) -> None:
        self.positions = np.zeros(batch, np.int64)
        for name, spec in self.inputs.items():
            if name == "past_lengths":
                self.past[name] = np.zeros((spec.shape[0], batch), np.int64)
            elif name.startswith("past_"):
                sizes = [size if isinstance(size, int) else 0 for size in spec.shape]
                self.past[name] = np.zeros([batch, *sizes[1:]], np.float16 if half else np.float32)
