"""Decoders and co-attention layers, traced by torch.export into the graphs that the passes rewrite."""

from vte_compile.capture.chunk import capture_chunk
from vte_compile.capture.decoder_graph import DecoderGraph
from vte_compile.capture.phases import capture

__all__ = ["DecoderGraph", "capture", "capture_chunk"]
