"""Model families: where the decoder is, which tokens are visual, and how inputs become decoder inputs."""

from vte_compile.families.decoder import DecoderSpec, describe
from vte_compile.families.inputs import DecoderInputs, decoder_inputs

__all__ = ["DecoderInputs", "DecoderSpec", "decoder_inputs", "describe"]
