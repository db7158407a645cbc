"""VILA and NVILA (github.com/NVlabs/VILA) from transformers' parts, in the layout in which they are published."""

from vte_compile.families.vila.config import VilaConfig
from vte_compile.families.vila.model import VilaForConditionalGeneration, VilaModel
from vte_compile.families.vila.processor import VilaProcessor
from vte_compile.families.vila.projector import VilaProjector, VilaProjectorConfig

__all__ = [
    "VilaConfig",
    "VilaForConditionalGeneration",
    "VilaModel",
    "VilaProcessor",
    "VilaProjector",
    "VilaProjectorConfig",
]
