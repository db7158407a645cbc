"""Whether a model's multimodal positions are those that engines can make, told by the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vte_compile.errors import UnsupportedModelError
from vte_compile.export.grid_positions import IMAGE, VIDEO, Grids
from vte_compile.export.manifest import GridFacts
from vte_compile.families.inputs import image_positions


def grid_facts(fast: Any) -> GridFacts | None:
    """How an optimized model numbers the tokens of images and videos.

    Args:
        fast: From :func:`vte_compile.optimize`.

    Returns:
        None if its positions are one number each, or it takes no images.

    Raises:
        UnsupportedModelError: Its config does not say how, or its own code does it in another way.
    """
    spec = fast._vte_spec
    if spec.position_rows == 1 or not spec.is_multimodal:
        return None
    name, config = type(fast).__name__, fast.config
    vision = getattr(config, "vision_config", None)
    merge, image = getattr(vision, "spatial_merge_size", None), getattr(config, "image_token_id", None)
    if not isinstance(merge, int) or not isinstance(image, int):
        raise UnsupportedModelError(
            f"{name} has multimodal rotary positions, and its config has no image_token_id, or no "
            "vision_config.spatial_merge_size: engines cannot number its tokens."
        )
    seconds = getattr(vision, "tokens_per_second", None)
    video, reason = getattr(config, "video_token_id", None), ""
    # transformers 5.17 counts the time of videos in whole seconds, later versions do not.
    ways = [(whole, False) for whole in ((False, True) if seconds is not None else (False,))]
    for whole_seconds, frames_apart in (*ways, (False, True)):
        facts = GridFacts(image, video, merge, seconds, whole_seconds, frames_apart)
        found = [_difference(fast, facts, tried) for tried in ((None, 1.7) if seconds is not None else (None,))]
        if not any(found):
            return facts
        reason = reason or next(filter(None, found))
    raise UnsupportedModelError(
        f"{name} has multimodal rotary positions, and engines number images and videos as Qwen2-VL or Qwen3-VL does: "
        f"its own code, asked for those of a prompt with both, {reason}."
    )


def _difference(fast: Any, facts: GridFacts, seconds: float | None) -> str:
    """What the model's own code does otherwise, on a prompt with two images and a video; "" if nothing."""
    spec, merge = fast._vte_spec, facts.merge_size
    parts = [(IMAGE, [1, 3 * merge, 2 * merge]), (IMAGE, [1, merge, 4 * merge])]
    if facts.video_token_id is not None:
        parts.insert(1, (VIDEO, [3, 2 * merge, merge]))
    kinds = [0, 0]
    for kind, (time, height, width) in parts:
        runs = time if kind == VIDEO and facts.frames_apart else 1
        kinds += ([kind] * (time // runs * height * width // merge**2) + [0, 0]) * runs
    images, videos = ([grid for kind, grid in parts if kind == wanted] for wanted in (IMAGE, VIDEO))
    tokens = {0: next(i for i in range(len(spec.visual_token_ids) + 1) if i not in spec.visual_token_ids),
              IMAGE: facts.image_token_id, VIDEO: facts.video_token_id}  # fmt: skip
    places: dict[str, Any] = {
        "mm_token_type_ids": torch.tensor([kinds], device=spec.device),
        "image_grid_thw": torch.tensor(images, device=spec.device),
    }
    if videos:
        places["video_grid_thw"] = torch.tensor(videos, device=spec.device)
    timed = seconds is not None and bool(videos)
    if timed:
        places["second_per_grid_ts"] = torch.tensor([seconds], device=spec.device)
    ids = torch.tensor([[tokens[kind] for kind in kinds]], device=spec.device)
    try:
        with torch.no_grad():
            theirs = image_positions(fast, spec, ids, torch.ones_like(ids, dtype=torch.bool), places)
    except Exception as error:  # whatever the model's own code raises
        return f"raises {type(error).__name__} ({error})"
    if theirs is None:
        return "gives none"
    grids = Grids.of(facts, images, videos or None, [seconds] if timed else None)
    [ours] = grids.positions(facts, [np.array(kinds)])
    return "" if np.array_equal(theirs[:, 0].cpu().numpy(), ours) else "gives others"
