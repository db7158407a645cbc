"""Search settings of the Triton attention kernels on a GPU, and write them into kernels/triton_settings.json.

    python benchmarks/tune_triton.py --most 12 --json benchmarks/results/triton_tuning.json      (on a CUDA GPU)

For each kernel, head size and dtype: the shipped settings and their nearest neighbours, ``--most`` at most. What spills
registers or takes more shared memory than the chip has (compiled ahead of time) is left out, and so is what does not
give the numbers of the naive reference. The fastest is kept where it is faster than the shipped one by more than
``--gain``; else that one stays. Only the settings of this GPU's chip change. Run ``kernels.py --check`` and the
tests of ``tests/kernels`` behind it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from common import JsonOption, write_report
from torch import Tensor
from tqdm import tqdm

from vte_compile.kernels.attention_support import DTYPES, HEAD_SIZES
from vte_compile.kernels.triton_settings import CHIPS, FILE, SHARED_MEMORY, Settings, Table, dtype_name, shipped, table

KERNELS = ("varlen_attention", "decode_attention")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS, HEADS, KV_HEADS, BATCH = 1024, 32, 8, 8
_STEPS = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}


def main(
    kernel: Annotated[str, typer.Option(help="This kernel only; empty: both.")] = "",
    size: Annotated[int, typer.Option(help="This head size only; 0: all.")] = 0,
    dtype: Annotated[str, typer.Option(help="This dtype only; empty: all.")] = "",
    most: Annotated[
        int, typer.Option(help="Settings that are tried for each kernel, head size and dtype.", min=1)
    ] = 12,
    gain: Annotated[float, typer.Option(help="How much faster another than the shipped one has to be.")] = 0.03,
    json_file: JsonOption = None,
) -> None:
    """Tune the kernels for the GPU that is there."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("settings are timed on a CUDA GPU, and there is none.")
    major, minor = torch.cuda.get_device_capability()
    chip = 10 * major + minor
    if chip not in CHIPS:
        raise typer.BadParameter(
            f"sm_{chip} has no settings of its own: it takes those of the nearest of {CHIPS} below."
        )
    cases = [
        (k, s, d)
        for k, s, d in itertools.product(KERNELS, HEAD_SIZES, DTYPES)
        if kernel in ("", k) and size in (0, s) and dtype in ("", dtype_name(d))
    ]
    rows, settings = [], json.loads(json.dumps(shipped()))
    for k, s, d in tqdm(cases, desc="tune", unit="case"):
        run = CASES[k](s, d)
        best, tried = search(
            candidates(k, s, d, chip, most), lambda c, k=k, s=s, d=d: _refused(k, s, d, chip, c), run, gain
        )
        settings[k][str(chip)][str(s)][dtype_name(d)] = numbers(best)
        rows += [
            {"kernel": k, "size": s, "dtype": dtype_name(d), "kept": row["settings"] == numbers(best), **row}
            for row in tried
        ]
    origins = json.loads(FILE.read_text(encoding="utf-8"))["origins"]
    origins[str(chip)] = f"measured on {torch.cuda.get_device_name()}, benchmarks/tune_triton.py --most {most}"
    FILE.write_text(written(settings, origins), encoding="utf-8")
    if json_file is not None:
        write_report(json_file, "tune_triton.py", {"chip": chip, "most": most, "gain": gain}, rows)


# ---------------------------------------------------------------- the search


def numbers(settings: Settings) -> list[int]:
    """As the file has them."""
    return [settings.block_m, settings.block_n, settings.num_warps, settings.num_stages]


def candidates(kernel: str, size: int, dtype: torch.dtype, chip: int, most: int) -> list[Settings]:
    """The shipped settings, and behind them others, those first that are the fewest steps away."""
    own = table(kernel, size, dtype, chip)
    steps = dict(_STEPS)
    if kernel == "decode_attention":
        steps["block_m"] = (own.block_m,)  # query heads of a group, padded to what a product takes
    found = [Settings(*values, own.compute) for values in itertools.product(*steps.values())]

    def distance(other: Settings) -> int:
        pairs = zip(steps.values(), numbers(own), numbers(other), strict=True)
        return sum(abs(values.index(a) - values.index(b)) for values, a, b in pairs)

    return sorted(found, key=distance)[:most]


def search(
    tried: list[Settings],
    refused: Callable[[Settings], str | None],
    measure: Callable[[Settings], tuple[float, float]],
    gain: float,
) -> tuple[Settings, list[dict[str, Any]]]:
    """The fastest of some settings, of which the first are the shipped ones, and what became of each.

    Args:
        tried: In any order behind the first.
        refused: Why settings are no candidates; None: they are.
        measure: Seconds, and the share of the allowed error that the numbers are off by (1 is too much).
        gain: How much faster than the first another has to be, of the time.
    """
    rows: list[dict[str, Any]] = []
    times: dict[Settings, float] = {}
    for settings in tried:
        row: dict[str, Any] = {"settings": numbers(settings)}
        rows.append(row)
        if reason := refused(settings):
            row["left_out"] = reason
            continue
        try:
            seconds, off = measure(settings)
        except Exception as error:  # what this GPU cannot launch
            row["left_out"] = f"{type(error).__name__}: {error}"
            continue
        row["seconds"] = seconds
        if off < 1:
            times[settings] = seconds
        else:
            row["left_out"] = f"its numbers are off by {off:.1f} times what is allowed"
    first = times.get(tried[0], float("inf"))
    best = min(times, key=lambda settings: times[settings], default=tried[0])
    return (best if times and times[best] < (1 - gain) * first else tried[0]), rows


def written(settings: Table, origins: Mapping[str, str]) -> str:
    """``triton_settings.json``: all settings, and for each chip where its own come from."""
    kernels = []
    for kernel, chips in settings.items():
        of_chips = []
        for chip, sizes in chips.items():
            lines = ",\n".join(f'        "{size}": {json.dumps(own)}' for size, own in sizes.items())
            of_chips.append(f'      "{chip}": {{\n{lines}\n      }}')
        kernels.append(f'    "{kernel}": {{\n' + ",\n".join(of_chips) + "\n    }")
    parts = [
        '"columns": ["block_m", "block_n", "num_warps", "num_stages"]',
        f'"origins": {json.dumps(dict(origins), indent=4)}'.replace("\n}", "\n  }"),
        '"settings": {\n' + ",\n".join(kernels) + "\n  }",
    ]
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def _refused(kernel: str, size: int, dtype: torch.dtype, chip: int, settings: Settings) -> str | None:
    from vte_compile.kernels.triton_resources import resources

    for taken in resources(chip, size, dtype, settings={kernel: settings}):
        if taken.spills:
            return f"{taken.kernel} spills {taken.spills} bytes ({taken.variant or 'plain'})"
        if taken.shared > SHARED_MEMORY[chip]:
            return f"{taken.kernel} takes {taken.shared} bytes of shared memory, of {SHARED_MEMORY[chip]}"
    return None


# ---------------------------------------------------------------- what is timed


def _seconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(function, warmup=25, rep=100, quantiles=[0.5])
    return median / 1e3


def _off(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    error = float((got.float() - expected).abs().max() / expected.abs().max())
    return error / TOLERANCE[dtype] if error == error else float("inf")


def _prefill(size: int, dtype: torch.dtype) -> Callable[[Settings], tuple[float, float]]:
    """Packed rows, two of them short."""
    from vte_compile.kernels import triton_varlen_attention
    from vte_compile.kernels.varlen_attention import reference

    lengths = [TOKENS, TOKENS // 8, TOKENS, 77]
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    query, key, value = (torch.randn(sum(lengths), n, size, **options) for n in (HEADS, KV_HEADS, KV_HEADS))
    angles = torch.rand(sum(lengths), size // 2, device="cuda") * 6
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    starts = max(lengths) - bounds.diff()
    caches = [torch.zeros(len(lengths), KV_HEADS, max(lengths) + 64, size, **options) for _ in "kv"]
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    tensors = [query, key, value, *tables, bounds, None, starts, *caches]
    wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]
    expected = reference(*wide, size**-0.5, 0, 0.0)

    def run(settings: Settings) -> tuple[float, float]:
        def once() -> Tensor:
            return triton_varlen_attention.launch(*tensors, TOKENS, size**-0.5, 0, 0.0, settings=settings)

        off = _off(once(), expected, dtype)
        return _seconds(once), off

    return run


def _decode(size: int, dtype: torch.dtype) -> Callable[[Settings], tuple[float, float]]:
    """A token of each row, every other of which was left by its visual tokens."""
    from vte_compile.kernels import triton_decode_attention
    from vte_compile.kernels.decode_attention import reference

    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    query, key, value = (torch.randn(BATCH, n, size, **options) for n in (HEADS, KV_HEADS, KV_HEADS))
    caches = [torch.randn(BATCH, KV_HEADS, TOKENS, size, **options) for _ in "kv"]
    starts = torch.tensor([0, TOKENS - 64] * (BATCH // 2), device="cuda")
    angles = torch.rand(BATCH, size // 2, device="cuda") * 6
    new = [key, value, angles.cos().to(dtype), angles.sin().to(dtype)]
    rest = (starts, None, None, TOKENS, size**-0.5, 0, 0.0)
    wide = [x.float() for x in (query, *caches)]
    expected = reference(*wide, *rest, *(x.float() for x in new))

    def run(settings: Settings) -> tuple[float, float]:
        def once() -> Tensor:
            return triton_decode_attention.launch(query, *caches, *rest, *new, settings=settings)

        off = _off(once(), expected, dtype)
        return _seconds(once), off

    return run


CASES: dict[str, Callable[[int, torch.dtype], Callable[[Settings], tuple[float, float]]]] = {
    "varlen_attention": _prefill,
    "decode_attention": _decode,
}


if __name__ == "__main__":
    typer.run(main)
