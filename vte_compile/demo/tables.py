"""The demo's tables in the terminal, in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vte_compile.tuning.bootstrap import Interval
from vte_compile.tuning.evaluation import Evaluation


def comparison_table(comparison: Evaluation) -> Table:
    """The plans against baselines that have the FLOPs of the first one."""
    title = f"{comparison.samples} held-out questions, {comparison.settings['confidence']:.0%} intervals"
    table = Table(title=title, title_justify="left")
    for heading in ("", "right", "as the full model", "layers", "FLOPs"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    full = comparison.configurations[0].measures["total_flops"].value
    for case in comparison.configurations:
        found = case.measures
        table.add_row(
            case.name,
            f"{found['accuracy'].value:.1%}",
            _interval(found["agreement"]),
            f"{found['cost'].value:.2f}",
            f"{found['total_flops'].value / full:.1%}",
            style="bold" if case.name == comparison.matched else None,
        )
    table.caption = "Baselines have at most the FLOPs of the learned exit; the oracle knows the answers."
    table.caption_justify = "left"
    return table


def cost_table(results: dict[str, Any]) -> Table:
    """FLOPs, memory and times of what was run, from the report."""
    table = Table(title=f"{results['model']['layers']} decoder layers", title_justify="left")
    for heading in ("", "layers", "FLOPs", "KV KiB", "prefill", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    none = next(c for c in results["configurations"] if c["kind"] == "none")
    for case in results["configurations"]:
        table.add_row(
            case["name"],
            f"{case['mean_cost']:.2f}",
            f"{case['prefill_flops'] / none['prefill_flops']:.0%}",
            f"{case['kv_bytes'] / 1024:.0f}",
            f"{case['prefill_s'] * 1e3:.1f} ms",
            f"{case['decode_tokens_per_s']:.0f}",
            style="bold" if case["kind"] == "learned" else None,
        )
    table.caption = "layers: that see the visual tokens, on average. FLOPs: of prefill."
    table.caption_justify = "left"
    return table


def _interval(interval: Interval) -> str:
    return f"{interval.value:.1%} ({100 * interval.low:.1f} .. {100 * interval.high:.1f})"
