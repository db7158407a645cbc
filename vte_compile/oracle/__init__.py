"""The eager oracle: the reference that every other door of vte_compile is tested against.

It runs a Hugging Face decoder literally: row by row, without padding, one decoder layer after another. Where the plan
says so it drops the visual tokens of a row, skips an attention, or applies an adapter. No tracing, no batching, no
speed. The semantics are those of DyVTE (arXiv 2411.19628; exits.py) and EAS (arXiv 2403.15226; blocks.py), made precise
where the authors' code is not: any number of images at any place, padding, several rows, further turns.

Words used here: a *chunk* is what one forward call brings, T new tokens per row (prefill, a later turn, or one decode
token). Padding is never a token. *Question tokens* are the text tokens after the last visual token of the chunk. A
row's *prompt* is its first chunk with a token: what adapters know of it, they keep for all later chunks.
A plan's *companion token* goes along with a prompt: it runs beside it, layer by layer, as a sequence of its own.
"""

from vte_compile.oracle.embed import embed
from vte_compile.oracle.masks import layer_window
from vte_compile.oracle.oracle import Oracle
from vte_compile.oracle.rows import OracleCache, OracleGeneration, OracleOutput, RowCache, RowRun

__all__ = ["Oracle", "OracleCache", "OracleGeneration", "OracleOutput", "RowCache", "RowRun", "embed", "layer_window"]
