"""Model classes of this package's own, for published layouts that transformers does not know: found by config.json."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

_HERE = "vte_compile.families"


@dataclass(frozen=True)
class OwnFamily:
    """What loads a model and its processor from a folder or hub id: ``module:name`` each, imported when asked for."""

    model: str
    processor: str
    field: str
    """Of config.json, which other models of the same model_type have not."""

    @property
    def load_model(self) -> Callable[..., Any]:
        load: Callable[..., Any] = pkgutil.resolve_name(self.model)
        return load

    @property
    def load_processor(self) -> Callable[..., Any]:
        load: Callable[..., Any] = pkgutil.resolve_name(self.processor)
        return load


def _of_classes(module: str, name: str, field: str) -> OwnFamily:
    kinds = ("ForConditionalGeneration", "Processor")
    model, processor = (f"{_HERE}.{module}:{name}{kind}.from_pretrained" for kind in kinds)
    return OwnFamily(model, processor, field)


_VILA = _of_classes("vila", "Vila", "llm_cfg")
_INTERNVL_PROCESSOR = f"{_HERE}.internvl_processor:InternVLChatProcessor.from_pretrained"
_FAMILIES = {
    "lavin": _of_classes("lavin", "Lavin", "feature_layers"),
    "llava_llama": _VILA,
    "vila": _VILA,
    "eagle_2_5_vl": _of_classes("eagle2", "Eagle2", "text_config"),
    "eagle_chat": _of_classes("eagle2", "Eagle2", "llm_config"),
    "internvl_chat": OwnFamily(f"{_HERE}.internvl:load_internvl", _INTERNVL_PROCESSOR, "llm_config"),
}
_PROCESSORS = {"InternVLChatProcessor": _INTERNVL_PROCESSOR}
"""Of processors that were saved without their model's config.json."""


def own_family(name: str | Path) -> OwnFamily | None:
    """The family of a checkpoint, a folder or hub id; None if it is for transformers, or cannot be read."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None
    family = _FAMILIES.get(str(config.get("model_type")))
    return family if family and family.field in config else None


def own_processor(name: str | Path) -> Callable[..., Any] | None:
    """What loads the processor of a checkpoint of such a family, or one that was saved by itself; None as above."""
    if family := own_family(name):
        return family.load_processor
    try:
        settings = json.loads((Path(name) / "processor_config.json").read_bytes())
        found = _PROCESSORS.get(settings["processor_class"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found is None else pkgutil.resolve_name(found)
