"""The Triton kernels: what they take on each chip (no GPU needed), and on a GPU how fast they are beside PyTorch's.

    python benchmarks/triton_kernels.py --check
    python benchmarks/triton_kernels.py --json benchmarks/results/triton_kernels.json      (on a CUDA GPU)

``--check`` compiles all kernels ahead of time with the shipped settings, and fails where registers spill or a block
takes more shared memory than the chip has.

Times are medians of Triton's do_bench, with the tenth and ninetieth percentile. Prefill is causal attention of packed
rows, ours with the rotation and the writing of keys and values in it, PyTorch's without: FLOP/s count the products
alone. Decode is compared with what a copy of the same bytes reaches on the card.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import JsonOption, write_report
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HEADS, SIZE = 32, 128
SHAPES = {"LLaVA-1.5-7B": 640, "LLaVA-NeXT": 2944}
"""Tokens of a prompt: 576 and 2,880 of them visual, and 64 of text."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def main(
    check: Annotated[bool, typer.Option("--check", help="Compile all kernels, and run none.")] = False,
    chip: Annotated[int, typer.Option(help="Check this compute capability (times 10) only; 0: all.")] = 0,
    size: Annotated[int, typer.Option(help="Check this head size only; 0: all.")] = 0,
    dtype: Annotated[str, typer.Option(help="Check this dtype only; empty: all.")] = "",
    batches: Annotated[str, typer.Option(help="Rows of a batch, separated by commas.")] = "1,8,32",
    json_file: JsonOption = None,
) -> None:
    """Check the kernels, or time them."""
    if check:
        rows = check_all(chip, size, dtype)
        bad = show_check(rows)
        if json_file is not None:
            write_report(json_file, "triton_kernels.py", {}, rows)
        raise typer.Exit(1 if bad else 0)
    if not torch.cuda.is_available():
        raise typer.BadParameter("kernels are timed on a CUDA GPU, and there is none: --check needs none.")
    counts = [int(count) for count in batches.split(",")]
    ceilings = measured_ceilings()
    cases = list(itertools.product(SHAPES.items(), counts))
    rows = [
        row
        for (name, tokens), batch in tqdm(cases, desc="time", unit="shape")
        for row in (*prefill_rows(name, tokens, batch, ceilings), *decode_rows(name, tokens, batch, ceilings))
    ]
    show_times(rows, ceilings)
    if json_file is not None:
        write_report(json_file, "triton_kernels.py", {"heads": HEADS, "head_size": SIZE, "ceilings": ceilings}, rows)


# ---------------------------------------------------------------- without a GPU


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


# ---------------------------------------------------------------- on a GPU


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds: median, and the tenth and ninetieth percentile."""
    from triton.testing import do_bench

    low, median, high = do_bench(function, warmup=25, rep=200, quantiles=[0.1, 0.5, 0.9])
    return {"median_s": median / 1e3, "p10_s": low / 1e3, "p90_s": high / 1e3}


def measured_ceilings() -> dict[str, float]:
    """What this card reaches: FLOP/s of a large product in bfloat16, bytes/s of a large copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / timed(lambda: a @ b)["median_s"]
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return {"flops_per_s": flops, "bytes_per_s": 2 * 2**30 / timed(lambda: target.copy_(source))["median_s"]}


def prefill_rows(name: str, tokens: int, batch: int, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Causal attention of a batch of prompts."""
    from vte_compile.kernels.varlen_attention import varlen_attention

    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query, key, value = (torch.randn(batch * tokens, HEADS, SIZE, **options) for _ in range(3))
    cos, sin = (torch.randn(batch * tokens, SIZE // 2, **options) for _ in range(2))
    bounds = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * tokens
    zeros = torch.zeros(batch, device="cuda", dtype=torch.int32)
    caches = [torch.empty(batch, HEADS, tokens + 64, SIZE, **options) for _ in range(2)]
    flops = 2 * batch * HEADS * tokens**2 * SIZE  # half of both products

    def row(case: str, function: Callable[[], Any]) -> dict[str, Any]:
        times = timed(function)
        reached = flops / times["median_s"]
        shares = {"flops_per_s": reached, "of_ceiling": reached / ceilings["flops_per_s"]}
        return {"phase": "prefill", "shape": name, "batch": batch, "case": case, **times, **shares}

    yield row(
        "vte::varlen_attention",
        lambda: varlen_attention(
            query, key, value, cos, sin, bounds, zeros, zeros, *caches, tokens, SIZE**-0.5, 0, 0.0
        ),
    )
    q, k, v = (x.view(batch, tokens, HEADS, SIZE).transpose(1, 2) for x in (query, key, value))
    backends = {
        "SDPA, flash": SDPBackend.FLASH_ATTENTION,
        "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for case, backend in backends.items():
        with sdpa_kernel(backend):
            yield row(case, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    yield row("FlexAttention", flex_attention(q, k, v, tokens))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Callable[[], Any]:
    """The same through torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def decode_rows(name: str, tokens: int, batch: int, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """One token per row, behind prompts of which every other one was left by its visual tokens."""
    from vte_compile.kernels.decode_attention import decode_attention

    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(batch, HEADS, SIZE, **options)
    caches = [torch.randn(batch, HEADS, tokens + 64, SIZE, **options) for _ in range(2)]
    starts = torch.zeros(batch, device="cuda", dtype=torch.int32)
    for case, text in (("no exit", tokens), ("exits of every other row", 64)):
        lengths = [tokens if b % 2 == 0 else text for b in range(batch)]
        ends = torch.tensor(lengths, device="cuda", dtype=torch.int32)

        def step(ends: Tensor = ends) -> Tensor:
            return decode_attention(query, *caches, starts, ends, None, tokens, SIZE**-0.5, 0, 0.0)

        times = timed(step)
        reached = 2 * 2 * HEADS * SIZE * sum(lengths) / times["median_s"]
        shares = {"bytes_per_s": reached, "of_ceiling": reached / ceilings["bytes_per_s"]}
        yield {"phase": "decode", "shape": name, "batch": batch, "case": case, **times, **shares}


def show_times(rows: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
    card = f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s, {ceilings['bytes_per_s'] / 1e12:.2f} TB/s"
    table = Table(title=f"{torch.cuda.get_device_name()}: {card} measured")
    for column in ("phase", "shape", "batch", "case", "median us", "p10, p90", "reached", "of the card's"):
        table.add_column(column, justify="left" if column in ("phase", "shape", "case") else "right")
    for row in rows:
        median, low, high = (f"{1e6 * row[key]:.1f}" for key in ("median_s", "p10_s", "p90_s"))
        prefill = row["phase"] == "prefill"
        reached = f"{row['flops_per_s'] / 1e12:.0f} TFLOP/s" if prefill else f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
        share = f"{row['of_ceiling']:.2f}"
        table.add_row(
            row["phase"], row["shape"], str(row["batch"]), row["case"], median, f"{low}, {high}", reached, share
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
