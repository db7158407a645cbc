"""What scripts that write tiny random checkpoints share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough for attention to matter; norms and biases that show."""
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = random.standard_normal(shape) * (0.3 if len(shape) == 1 else 0.25)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def write_weights(folder: Path, weights: dict[str, Tensor], files: str) -> None:
    if files == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return
    if files != "shards":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    where = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(half, file)
    total = sum(weight.numel() * 4 for weight in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
