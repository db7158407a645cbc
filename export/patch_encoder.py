"""The encoder of images of any size, cut into patches (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), as a function of one frame.

Its own code cuts attention at lengths that it reads from tensors, which cannot be traced. Here one frame is one run, so
that all of it attends to itself; windows are gathered into rows of one length, and masked behind their last patch. What
depends on the grid, transformers' encoders take ready made (transformers.vision_utils); export/patches.py makes it.
"""

from __future__ import annotations

import contextvars
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vte_compile.capture.model_state import evaluating
from vte_compile.errors import CaptureError, UnsupportedModelError
from vte_compile.export.encoder_function import EncoderFunction, of_module
from vte_compile.export.manifest import GridFacts, PatchFacts, VisionCall
from vte_compile.export.own_features import check_features, own_features
from vte_compile.export.patches import encoder_inputs, frame_inputs

# Named so that encoders hand over the bounds of what attends to each other, instead of cutting by themselves.
_ATTENTION = "vte_flash_attention_patches"
WHOLE = "vte_whole_attention"
"""Of an encoder that gets one image: all of it attends to itself, whatever mask the encoder makes."""
_EXAMPLE, _TRIED = (6, 10), ((2, 2), (4, 10), (10, 4))
"""Height and width of frames, in tokens of the merged size: the traced one, and those that are compared."""

_DIMS = {"window_index": {0: "frame_tokens"}, "windows": {0: "windows", 1: "longest_window"}}
"""Of the encoder's inputs; the others are as many as there are patches."""

_places: contextvars.ContextVar[Tensor] = contextvars.ContextVar("vte_window_places")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, heads, n, size] each -> [1, n, heads, size]; ``cu_seq_lens_q`` [W, L]: windows, else all attend to all."""
    if cu_seq_lens_q is None or cu_seq_lens_q.ndim != 2:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    windows, heads, size = cu_seq_lens_q, query.shape[1], query.shape[3]
    inside = windows >= 0
    index = torch.where(inside, windows, 0).flatten()  # TensorRT does not clamp integers
    query, key, value = (
        x[0].index_select(1, index).unflatten(1, windows.shape).transpose(0, 1) for x in (query, key, value)
    )
    scaled = query * (size**-0.5 if scaling is None else scaling)
    # torch's own attention asks for NaN where there is a mask, which TensorRT does not know.
    scores = torch.where(inside[:, None, None], scaled @ key.transpose(2, 3), torch.finfo(query.dtype).min)
    flat = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(-1, heads, size)
    return flat.index_select(0, _places.get())[None], None


AttentionInterface.register(_ATTENTION, _attention)
AttentionInterface.register(WHOLE, _attention)


class _Encoder(nn.Module):
    def __init__(self, visual: nn.Module, facts: PatchFacts) -> None:
        super().__init__()
        self.visual, self._windowed, self._learned = visual, facts.window is not None, facts.learned is not None

    def forward(self, pixel_values: Tensor, position_ids: Tensor, *more: Tensor) -> tuple[Tensor]:
        whole = position_ids[:, 0]  # no numbers are read from it
        given: dict[str, Any] = {"position_ids": position_ids, "cu_seqlens": whole, "max_seqlen": 1}
        if self._learned:
            *windows, index, weights = more
            given |= {"interp_indices": index, "interp_weights": weights}
        else:
            windows = list(more)
        if self._windowed:
            index, bounds, places = windows
            given |= {"window_index": index, "cu_window_seqlens": bounds, "max_window_seqlen": 1}
            token = _places.set(places)
        try:
            grid = torch.ones(1, 3, dtype=torch.long)
            output = self.visual(pixel_values, grid_thw=grid, **given)
            added = getattr(output, "deepstack_features", None) or ()
            return (torch.cat([output.pooler_output, *added], dim=-1),)
        finally:
            if self._windowed:
                _places.reset(token)


@torch.no_grad()
def patch_encoder(fast: Any, grids: GridFacts) -> EncoderFunction:
    """The function that does for one frame what the model's own code does.

    Raises:
        UnsupportedModelError: The model's encoder is none of this kind, or computes something else.
        CaptureError: It does not take what it is given ready made.
    """
    name, spec = type(fast).__name__, fast._vte_spec
    visual: Any = getattr(fast.get_submodule(spec.path.rpartition(".")[0]), "visual", None)
    embed = getattr(visual, "patch_embed", None)
    sizes: list[Any] = [getattr(embed, size, None) for size in ("in_channels", "temporal_patch_size", "patch_size")]
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedModelError(f"{name} has no encoder of patches with channels, frames and size (visual).")
    channels, frames, patch = sizes
    window = getattr(visual, "window_size", None)
    window = None if window is None else window // grids.merge_size // patch
    learned = getattr(visual, "num_grid_per_side", None)
    facts = PatchFacts(channels * frames * patch**2, grids.merge_size, window, learned)
    encoder = _Encoder(visual, facts)
    sizes_tried = (_EXAMPLE, *_TRIED)
    examples = [_frame(fast, facts, *size) for size in sizes_tried]
    function, weights = of_module(encoder, len(examples[0]), visual.config, _ATTENTION)
    for size, example in zip(sizes_tried, examples, strict=True):
        tokens, grid = size[0] * size[1], [[1, size[0] * facts.merge_size, size[1] * facts.merge_size]]
        with evaluating(visual):
            want = own_features(
                fast,
                tokens,
                "its patches and grid alone",
                pixel_values=example[0],
                image_grid_thw=torch.tensor(grid, device=spec.device),
            )
        try:
            [got] = function(*example, *weights.values())
        except Exception as error:  # whatever code of the model's author raises on what it does not know
            raise CaptureError(f"{name}: its image encoder does not take its frames' layouts: {error}") from error
        check_features(fast, got, want, "attend within frames and windows")
    named = {key.removeprefix("visual."): weight for key, weight in weights.items()}
    dims = [_DIMS.get(name, {0: "patches"}) for name in encoder_inputs(facts)]
    return EncoderFunction(function, examples, dims, named, VisionCall("", [], [], patches=facts))


def _frame(fast: Any, facts: PatchFacts, height: int, width: int) -> list[Tensor]:
    spec = fast._vte_spec
    rows, columns = height * facts.merge_size, width * facts.merge_size
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randn(rows * columns, facts.numbers, generator=generator).to(spec.device, spec.dtype)
    known = frame_inputs(facts, rows, columns)
    return [
        pixels,
        *(torch.from_numpy(np.ascontiguousarray(known[n])).to(spec.device) for n in encoder_inputs(facts)[1:]),
    ]
