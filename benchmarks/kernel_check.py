"""What the Triton kernels take, compiled ahead of time with the shipped settings: kernels.py --check, no GPU needed."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_all(chip: int, size: int, dtype: str) -> list[dict[str, Any]]:
    """What every kernel takes, with the shipped settings."""
    from vte_compile.kernels.attention_support import HEAD_SIZES
    from vte_compile.kernels.triton_resources import resources
    from vte_compile.kernels.triton_settings import CHIPS, SHARED_MEMORY

    wanted = [
        (c, s, d)
        for c, s, d in itertools.product(CHIPS, HEAD_SIZES, DTYPES)
        if chip in (0, c) and size in (0, s) and dtype in ("", str(d).removeprefix("torch."))
    ]
    rows = []
    for c, s, d in tqdm(wanted, desc="compile", unit="shape"):
        for taken in resources(c, s, d):
            fits = taken.spills == 0 and taken.shared <= SHARED_MEMORY[c]
            rows.append(asdict(taken) | {"shared_of_chip": SHARED_MEMORY[c], "fits": fits})
    return rows


def show_check(rows: list[dict[str, Any]]) -> int:
    """The most that each kernel takes on each chip, and all that does not fit; how many those are."""
    table = Table(title="registers of a thread and shared memory of a block, at most")
    for column in ("kernel", "chip", "launches", "registers", "spilled\nbytes", "shared\nKiB", "of"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for (kernel, chip), group in itertools.groupby(
        sorted(rows, key=lambda r: (r["kernel"], r["chip"])), key=lambda r: (r["kernel"], r["chip"])
    ):
        own = list(group)
        most = {key: max(row[key] for row in own) for key in ("registers", "spills", "shared", "shared_of_chip")}
        kib = f"{most['shared'] / 1024:.0f}", f"{most['shared_of_chip'] / 1024:.0f}"
        table.add_row(
            kernel.removesuffix("_kernel"),
            f"sm_{chip}",
            str(len(own)),
            str(most["registers"]),
            str(most["spills"]),
            *kib,
        )
    Console().print(table)
    bad = [row for row in rows if not row["fits"]]
    for row in bad:
        Console().print("does not fit: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "fits"))
    return len(bad)
