"""target="aoti": an engine of AOTInductor packages, which torch alone runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from vte_compile.errors import CaptureError
from vte_compile.export import aoti
from vte_compile.export.folder import check_target_folder, facts_of, whole_folder
from vte_compile.export.manifest import MANIFEST, Manifest, PieceCall, encode
from vte_compile.export.staged import Staged, stage
from vte_compile.runtime.inductor import missing_compiler

logger = logging.getLogger(__name__)
_SHARD = 1 << 30


def write(fast: Any, path: Path) -> None:
    """See :func:`vte_compile.export`."""
    check_target_folder(path)
    staged = stage(fast)
    device = fast._vte_spec.device
    if missing := missing_compiler(device):
        raise CaptureError(f"export: {missing}")
    with whole_folder(path) as folder:
        (folder / "pieces").mkdir()
        files = {}
        for piece in tqdm(staged.pieces, desc="compile pieces", leave=False):
            files[piece.name] = f"pieces/{piece.name}.pt2"
            try:
                arguments = (piece.module, piece.key, piece.examples, folder / files[piece.name])
                aoti.compile_piece(*arguments, piece.tried, piece.shortest)
            except CaptureError as error:
                raise CaptureError(f"{piece.name}: {error}") from error
        weights = _write_weights(staged.weights, folder)
        fast.plan.save_pretrained(folder / "plan")
        manifest = Manifest(
            target="aoti",
            built=aoti.built(device),
            model=staged.model,
            plan=fast.plan.describe(),
            routed=staged.routed,
            embedding=staged.embedding,
            vision=None if staged.vision is None else replace(staged.vision, piece=files[staged.vision.piece]),
            vision_missing=staged.vision_missing,
            phases=_with_files(staged, files),
            weights=weights,
            files=facts_of(folder),
        )
        (folder / MANIFEST).write_bytes(encode(manifest))
    logger.info("export: %d pieces, %d weights in %s", len(files), len(staged.weights), path)


def _with_files(staged: Staged, files: Mapping[str, str]) -> dict[str, Any]:
    """The phases, with pieces called by their files."""
    return {
        name: replace(
            phase,
            steps=[replace(s, piece=files[s.piece]) if isinstance(s, PieceCall) else s for s in phase.steps],
        )
        for name, phase in staged.phases.items()
    }


def _write_weights(weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """In files of about a GiB, so that writing takes little memory beside the model."""
    names = []
    for number, shard in enumerate(_shards(weights), 1):
        names.append(f"weights-{number:05d}.safetensors")
        # Copies: tensors may be views of each other, which safetensors refuses.
        copies = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in shard.items()}
        safetensors.torch.save_file(copies, folder / names[-1])
    return names


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
