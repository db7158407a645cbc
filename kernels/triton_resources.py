"""What the Triton kernels take on a chip: compiled ahead of time with Triton's own ptxas, so no GPU is needed.

Not where TRITON_INTERPRET is set: kernels are then no longer something to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vte_compile.kernels import triton_decode_attention, triton_packed_exit, triton_varlen_attention
from vte_compile.kernels.triton_settings import Settings, table

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_TYPES = {
    "*i32": "positions cu_queries cu_seqlens past_lengths starts ends block_table question_starts arrived "
    "new_positions new_cu_seqlens",
    "*i1": "keep fires",
    "*fp32": "parts logs",
    "fp32": "scale softcap threshold",
    "i32": "window longest splits per_split width middle tokens half bounds",
}
"""Of the kernels' arguments; those that begin with ``stride`` are i32, all others tensors of the model's dtype."""
_DEFAULTS = Settings(0, 0, 4, 3, None)
"""Of kernels that are launched with Triton's own number of stages, whatever they work on."""


@dataclass(frozen=True)
class Resources:
    """Of one kernel, as it is launched."""

    kernel: str
    chip: int
    """Compute capability, times 10."""
    size: int
    """Of a head."""
    dtype: str
    variant: str
    registers: int
    """Of a thread."""
    spills: int
    """Bytes stored to and loaded from local memory, of a thread."""
    shared: int
    """Bytes of a block."""


def resources(
    chip: int,
    size: int,
    dtype: torch.dtype,
    windows: bool = True,
    settings: Mapping[str, Settings] | None = None,
) -> Iterator[Resources]:
    """Of all kernels, for one head size and dtype.

    Args:
        chip: Compute capability, times 10.
        size: Of a head.
        dtype: Of queries and caches.
        windows: Also those with a window and soft-capping, and pages.
        settings: By the name of an attention: other settings than the shipped ones, and of no other kernels.
    """
    half, padded = triton.next_power_of_2(size // 2), triton.next_power_of_2(size)
    name = str(dtype).removeprefix("torch.")
    varlen, decode = (
        (settings or {}).get(kernel) or table(kernel, size, dtype, chip)
        for kernel in ("varlen_attention", "decode_attention")
    )
    extras = [(False, 0)] + ([(True, 16)] if windows else [])
    launches: list[tuple[Any, Settings, str, dict[str, Any]]] = []
    own: dict[str, Any] = {"HALF": half, "BLOCK": triton_varlen_attention.APPEND_BLOCK, "PAST": True}
    launches.append((triton_varlen_attention.append_kernel, _DEFAULTS, "", own))
    for masked, page in extras:
        variant = "window, softcap" if masked else ""
        masks = {"WINDOW": masked, "SOFTCAP": masked}
        own = {"GROUP": 4, "HALF": half, "PADDED": padded, "BLOCK_M": varlen.block_m, "BLOCK_N": varlen.block_n}
        own |= {"COMPUTE": varlen.compute, "PAST": masked, **masks}
        launches.append((triton_varlen_attention.attention_kernel, varlen, variant, own))
        own = {"GROUP": 4, "GROUP_PADDED": decode.block_m, "PADDED": padded, "PAGE": page, "BLOCK_N": decode.block_n}
        own |= {"COMPUTE": decode.compute, "STARTS": True, "ENDS": masked, "ROTATE": True, "APPEND": True, **masks}
        launches.append((triton_decode_attention.split_kernel, decode, variant + ", pages" * masked, own))
    own = {"PADDED": padded, "SPLITS_PADDED": 64}
    launches.append((triton_decode_attention.combine_kernel, _DEFAULTS, "", own))
    own = {"BLOCK_M": triton_packed_exit.BLOCK_M, "BLOCK_C": triton_packed_exit.BLOCK_C}
    own |= {"BLOCK_Q": triton_packed_exit.BLOCK_Q, "BLOCKS_PADDED": 64}
    launches.append((triton_packed_exit.decide_kernel, _DEFAULTS, "", own))
    own = {"BLOCK_T": triton_packed_exit.BLOCK_T, "BLOCK_C": triton_packed_exit.BLOCK_C}
    own |= {"SCAN": triton_packed_exit.SCAN, "HALF_PADDED": half}
    launches.append((triton_packed_exit.compact_kernel, _DEFAULTS, "", own))
    for kernel, chosen, variant, constants in launches:
        if settings is not None and chosen not in settings.values():
            continue
        if "SIZE" in kernel.arg_names:
            constants["SIZE"] = size
        compiled = _compiled(kernel, constants, dtype, chip, chosen)
        yield Resources(kernel.__name__, chip, size, name, variant, **compiled)


def _compiled(
    kernel: Any, constants: dict[str, Any], dtype: torch.dtype, chip: int, chosen: Settings
) -> dict[str, int]:
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in kernel.arg_names}
    # As at run time: pointers are aligned, and so are strides of whole heads.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name.startswith("stride")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    told = _ptxas(compiled.asm["ptx"], chip)
    registers = re.search(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas reports neither registers nor spills: {told}")
    return {"registers": int(registers[1]), "spills": sum(map(int, spills)), "shared": compiled.metadata.shared}


def _type(name: str, dtype: torch.dtype) -> str:
    if name.startswith("stride"):
        return "i32"
    return next((kind for kind, names in _TYPES.items() if name in names.split()), _POINTERS[dtype])


def _ptxas(ptx: str, chip: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        name = f"sm_{chip}a" if chip >= 90 else f"sm_{chip}"
        command = [get_ptxas(chip).path, "-v", f"--gpu-name={name}", str(file), "-o", str(Path(folder) / "cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
