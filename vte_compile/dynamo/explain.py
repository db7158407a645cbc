"""explain(): which pass applies where in what torch.compile(backend="vte") sees of a model, and why others do not."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from vte_compile.dynamo.report import Graph, recording
from vte_compile.errors import InputError
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.optimized_model import OptimizedModel
from vte_compile.passes import PassResult
from vte_compile.plan import Plan
from vte_compile.runtime.decoder_runner import DecoderRunner


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    graph: str
    """Which of Dynamo's graphs, and the phase of the decoder in it."""
    name: str
    """Of the pass; "decoder" for the graph as a whole, "graph break" for what splits it."""
    layer: int | None
    outcome: str
    """applied, refused, nothing to do, or what else happened."""
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; as text it is a table."""

    findings: tuple[Finding, ...]

    @property
    def refused(self) -> tuple[Finding, ...]:
        """What could have applied and did not."""
        return tuple(finding for finding in self.findings if finding.outcome == "refused")

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("graph", "pass", "layer", "outcome", "reason"):
            table.add_column(column, justify="right" if column == "layer" else "left", overflow="fold")
        for finding in self.findings:
            layer = "" if finding.layer is None else str(finding.layer)
            table.add_row(finding.graph, finding.name, layer, finding.outcome, finding.reason)
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def explain(model: PreTrainedModel, inputs: Mapping[str, Any], plan: Plan | None = None) -> Explanation:
    """Run a prompt and one decode step through torch.compile(backend="vte"), and say what the passes did.

    Nothing but the rewritten graphs is compiled, and the model is not changed. It runs right whatever is refused.

    Args:
        model: A model as for optimize(), not optimized.
        inputs: What its forward takes, such as a processor's output.
        plan: What to do; None: only what is lossless.

    Raises:
        InputError: The model is optimized already.
        PlanError: The plan is for another model.
    """
    if isinstance(model, OptimizedModel):
        raise InputError("explain() takes the model as it was loaded, not an optimized one.")
    breaks = dict(counters["graph_break"])
    options: dict[str, Any] = {"plan": plan or Plan(), "compile": False}
    # A function of its own, so that what Dynamo keeps of it is not that of the user's compiled model.
    forward = torch.compile(lambda **arguments: model(**arguments), backend="vte", options=options)
    with recording() as graphs, torch.no_grad():
        first = forward(**inputs, use_cache=True)
        forward(**_decode_step(inputs, first), use_cache=True)
    findings = [
        Finding("", "graph break", None, "split", reason.split("\n")[0])
        for reason, count in counters["graph_break"].items()
        if count > breaks.get(reason, 0)
    ]
    for number, graph in enumerate(graphs):
        findings += _of_graph(f"{number} {graph.phase or ''}".strip(), graph)
    return Explanation(tuple(findings))


def _decode_step(inputs: Mapping[str, Any], first: Any) -> dict[str, Any]:
    step = {"input_ids": first.logits[:, -1:].argmax(-1), CACHE: cache_of(first)}
    if (mask := inputs.get("attention_mask")) is not None:
        step["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return step


def _of_graph(name: str, graph: Graph) -> Iterator[Finding]:
    runner, phase = graph.runner, graph.phase
    if runner is None or phase is None:
        outcome = "refused" if graph.refusal else "not in it"
        yield Finding(name, "decoder", None, outcome, graph.refusal)
        return
    yield Finding(name, "decoder", None, "rewritten")
    for result in runner.pass_results(phase):
        yield from _of_pass(name, result, runner)


def _of_pass(name: str, result: PassResult, runner: DecoderRunner) -> Iterator[Finding]:
    refused = {refusal.layer for refusal in result.refusals}
    plan = runner.plan
    planned: dict[str, list[int]] = {
        "insert_exits": [exit_.layer for exit_ in plan.exits],
        "skip_attention": [skip.layer for skip in plan.skips],
        "fold_adapters": sorted(
            [part.layer for part in plan.adapters] + [skip.layer for skip in plan.skips if skip.adapter is not None]
        ),
    }
    layers = [layer for layer in planned.get(result.name, []) if layer not in refused] if result.applied else []
    for layer in layers:
        report = runner.folded.reports.get(layer) if result.name == "fold_adapters" else None
        forms = f"{report.kind}, {report.one_prompt.prompt}: {report.one_prompt.reason}" if report is not None else ""
        yield Finding(name, result.name, layer, "applied", forms)
    if not layers and not result.refusals:
        yield Finding(
            name, result.name, None, f"applied, {result.applied} times" if result.applied else "nothing to do"
        )
    for refusal in result.refusals:
        yield Finding(name, result.name, refusal.layer, "refused", f"{refusal.node}: {refusal.reason}")
