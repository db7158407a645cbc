"""Eagle 2 and 2.5 (github.com/NVlabs/Eagle) from transformers' parts, in the layout in which they are published."""

from vte_compile.families.eagle2.configuration import Eagle2Config
from vte_compile.families.eagle2.image_processor import Eagle2ImageProcessor
from vte_compile.families.eagle2.modeling import Eagle2ForConditionalGeneration, Eagle2Model
from vte_compile.families.eagle2.processor import Eagle2Processor

__all__ = [
    "Eagle2Config",
    "Eagle2ForConditionalGeneration",
    "Eagle2ImageProcessor",
    "Eagle2Model",
    "Eagle2Processor",
]
