"""How fast the attention kernels are beside PyTorch's, and how far from what the GPU reaches (see kernels.py).

Numbers come first: each way's output is compared with a reference in float64, ours with all memory it allocates and
all columns of the cache that nothing wrote set to NaN. What is wrong by more than rounding is not timed. What refuses
a shape, or is not there in this PyTorch, is named with its reason.

Times are medians of Triton's do_bench (the GPU's cache is emptied before each call), with the tenth and ninetieth
percentile, of a CUDA graph of one call: without the host's part, which a decode step replays away and a prefill hides.
``called`` is the median of calls from Python. Prefill is compared with the FLOP/s of a large product, decode with the
bytes/s of a large copy, both measured here. PyTorch's ways neither rotate nor write into the cache: ours do.

"exits": every other row was left by its visual tokens. Prefill then packs rows; PyTorch's pad them, except varlen.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from common import JsonOption, chosen, measured_ceilings, the_device, timed, write_report
from kernel_cases import CASES, OURS, PHASES, SHAPES, Shape, Work
from kernel_check import check_all, show_check
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vte_compile.runtime.decode_graphs import cuda_graph

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""The largest difference to float64, relative to the largest number."""
_UNITS = {"prefill": ("flops_per_s", "TFLOP/s"), "decode": ("bytes_per_s", "TB/s")}


def main(
    check: Annotated[bool, typer.Option("--check", help="Compile all kernels, and run none.")] = False,
    chip: Annotated[int, typer.Option(help="Check this compute capability (times 10) only; 0: all.")] = 0,
    size: Annotated[int, typer.Option(help="Check this head size only; 0: all.")] = 0,
    dtype: Annotated[str, typer.Option(help="Check this dtype only; empty: all.")] = "",
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "LLaVA-1.5-7B,LLaVA-NeXT",
    batches: Annotated[str, typer.Option(help="Rows of a batch, separated by commas.")] = "1,8,32",
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(CASES)}.")] = ",".join(CASES),
    json_file: JsonOption = None,
) -> None:
    """Check the kernels, or time them."""
    if check:
        rows = check_all(chip, size, dtype)
        bad = show_check(rows)
        if json_file is not None:
            write_report(json_file, "kernels.py", {}, rows)
        raise typer.Exit(1 if bad else 0)
    names, wanted = chosen(shapes, SHAPES, "shapes"), chosen(cases, CASES, "cases")
    device, begun = the_device(), time.perf_counter()
    if device.type != "cuda" and names != ["tiny"]:
        raise typer.BadParameter(
            "kernels are timed on a CUDA GPU, and there is none: --check needs none, --shapes tiny tries the script."
        )
    dtypes = {SHAPES[name].dtype for name in names}
    ceilings = {str(d).removeprefix("torch."): measured_ceilings(device, d) for d in dtypes}
    settings = {"shapes": names, "batches": batches, "cases": wanted, "ceilings": ceilings}
    turns = [
        (name, batch, phase, exits)
        for name, batch, phase in itertools.product(names, map(int, batches.split(",")), PHASES)
        for exits in ((False, True) if batch > 1 else (False,))
    ]
    rows = []
    for name, batch, phase, exits in tqdm(turns, desc="time", unit="shape"):
        shape = SHAPES[name]
        ceiling = ceilings[str(shape.dtype).removeprefix("torch.")][_UNITS[phase][0]]
        for row in time_shape(shape, batch, phase, exits, wanted, ceiling, device):
            rows.append({"phase": phase, "shape": name, "batch": batch, "exits": exits} | row)
        if json_file is not None:  # after each, so that a run that is cut off leaves what it has
            write_report(json_file, "kernels.py", settings | {"seconds": time.perf_counter() - begun}, rows)
    show_times(rows, settings, device)
    if any(row["case"] == OURS and row.get("reason") for row in rows):
        raise typer.Exit(1)


def time_shape(
    shape: Shape, batch: int, phase: str, exits: bool, cases: list[str], ceiling: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row for each way: its error and times, or the reason why it has none."""
    torch.manual_seed(0)
    work = PHASES[phase](shape, shape.lengths(batch, exits), device)
    for case in cases:
        if case in work.ways:
            yield {"case": case} | time_case(case, work, TOLERANCE[shape.dtype], _UNITS[phase][0], ceiling, device)


def time_case(
    case: str, work: Work, tolerance: float, unit: str, ceiling: float, device: torch.device
) -> dict[str, Any]:
    """Error and times of one way; what has a ``reason`` is refused, failed or wrong."""
    run = work.ways[case]
    try:
        with warnings.catch_warnings(record=True) as caught, poisoned(case == OURS):
            warnings.simplefilter("always")
            output = work.packed[case](run())
    except Exception as error:  # of a backend: it takes no such shape, or is not there
        # PyTorch says in warnings why a backend refuses.
        said = [str(w.message).split("(Triggered")[0].strip() for w in caught if "ttention" in str(w.message)]
        return {"reason": " ".join([f"{type(error).__name__}: {str(error).splitlines()[0]}", *said])}
    error = relative_error(output, work.expected)
    row: dict[str, Any] = {"relative_error": error if error == error else None}
    if not error <= tolerance:
        return row | {"reason": f"wrong by {error:.1e}, relative to the largest number; not timed"}
    del output
    called = timed(run, device)
    row |= {"called_s": called["median_s"], **called}
    if device.type == "cuda":
        try:
            row |= timed(cuda_graph(run, device), device)
            row["by_graph"] = True
        except Exception as problem:
            row |= {"by_graph": False, "no_graph": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
    reached = work.amount / row["median_s"]
    return row | {unit: reached, "of_ceiling": reached / ceiling}


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN where there is one."""
    return float((output.double() - expected).abs().max() / expected.abs().max())


@contextmanager
def poisoned(wanted: bool) -> Iterator[None]:
    """Memory that is allocated is NaN until it is written."""
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def show_times(rows: list[dict[str, Any]], settings: dict[str, Any], device: torch.device) -> None:
    console = Console()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, by the naive references"
    for dtype, reached in settings["ceilings"].items():
        card = f"{reached['flops_per_s'] / 1e12:.3g} TFLOP/s, {reached['bytes_per_s'] / 1e12:.3g} TB/s"
        console.print(f"{where}, {dtype}: {card} measured")
    for phase, (unit, shown) in _UNITS.items():
        table = Table(title=phase, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        for column in ("shape", "rows", "exits", "case", "median\nus", "called\nus", shown, "of\nit", "error"):
            table.add_column(column, justify="left" if column in ("shape", "case") else "right", no_wrap=True)
        for row in (row for row in rows if row["phase"] == phase):
            place = row["shape"], str(row["batch"]), "yes" if row["exits"] else "", row["case"]
            error = f"{row['relative_error']:.0e}" if row.get("relative_error") is not None else ""
            if "median_s" not in row:
                table.add_row(*place, *[""] * 4, f"wrong: {error or 'NaN'}" if "relative_error" in row else "refused")
                continue
            times = (f"{1e6 * row[key]:.1f}" for key in ("median_s", "called_s"))
            table.add_row(*place, *times, f"{row[unit] / 1e12:.3g}", f"{row['of_ceiling']:.2f}", error)
        console.print(table)
    # Often the same in all shapes.
    for phase, case, reason in {(row["phase"], row["case"], row["reason"]): None for row in rows if "reason" in row}:
        console.print(f"{phase}, {case}: {reason[:300]}", markup=False)
