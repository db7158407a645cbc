"""Model classes of this package's own, for published layouts that transformers does not know: found by config.json."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class OwnFamily:
    """A model class and its processor, both with ``from_pretrained``."""

    module: str
    model_name: str
    processor_name: str
    field: str
    """Of config.json, which other models of the same model_type have not."""

    @property
    def model(self) -> Any:
        return getattr(importlib.import_module(self.module), self.model_name)

    @property
    def processor(self) -> Any:
        return getattr(importlib.import_module(self.module), self.processor_name)


_VILA = OwnFamily("vte_compile.families.vila", "VilaForConditionalGeneration", "VilaProcessor", "llm_cfg")
_EAGLE2 = ("vte_compile.families.eagle2", "Eagle2ForConditionalGeneration", "Eagle2Processor")
_LAVIN = ("vte_compile.families.lavin", "LavinForConditionalGeneration", "LavinProcessor")
_FAMILIES = {
    "lavin": OwnFamily(*_LAVIN, "feature_layers"),
    "llava_llama": _VILA,
    "vila": _VILA,
    "eagle_2_5_vl": OwnFamily(*_EAGLE2, "text_config"),
    "eagle_chat": OwnFamily(*_EAGLE2, "llm_config"),
}


def own_family(name: str | Path) -> OwnFamily | None:
    """The family of a checkpoint, a folder or hub id; None if it is for transformers, or cannot be read."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None
    family = _FAMILIES.get(str(config.get("model_type")))
    return family if family and family.field in config else None
