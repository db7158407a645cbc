"""LaVIN (arXiv 2305.15023) and LaVIN-EAS: CLIP with adapters, six visual tokens, LLaMA with adapters."""

from vte_compile.families.lavin.checkpoint import (
    LavinCheckpoint,
    lavin_plan,
    load_lavin,
    read_lavin_checkpoint,
)
from vte_compile.families.lavin.configuration import LavinConfig
from vte_compile.families.lavin.meta_llama import load_meta_llama
from vte_compile.families.lavin.modeling import LavinForConditionalGeneration, LavinModel
from vte_compile.families.lavin.processor import LavinProcessor

__all__ = [
    "LavinCheckpoint",
    "LavinConfig",
    "LavinForConditionalGeneration",
    "LavinModel",
    "LavinProcessor",
    "lavin_plan",
    "load_lavin",
    "load_meta_llama",
    "read_lavin_checkpoint",
]
