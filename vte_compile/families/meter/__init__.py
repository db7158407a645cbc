"""METER (arXiv 2111.02387): CLIP's image encoder and RoBERTa, joined by levels of co-attention layers."""

from vte_compile.families.meter.checkpoint import MeterCheckpoint, load_meter, read_meter_checkpoint
from vte_compile.families.meter.configuration import MeterConfig
from vte_compile.families.meter.modeling import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
)

__all__ = [
    "MeterCheckpoint",
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterModel",
    "load_meter",
    "read_meter_checkpoint",
]
