"""The demo's page: one HTML file without external references, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vte_compile.html_page import document, figure, inline, machine, table, tiles

_BODY = Template("""<h1>Visual tokens that leave when they are no longer needed</h1>
<p>$summary</p>
<div class="tiles">$tiles</div>

<h2>Questions about photographs</h2>
<p class="muted">One question of each type, as they come in the held-out set. The strip shows the decoder's layers; in
the colored ones the question can look at the picture, behind them its $visual visual tokens are gone.</p>
<div class="cards">$cards</div>

<h2>Against simpler ways, at equal FLOPs</h2>
<p class="muted">$questions held-out questions, with 95% intervals. The static exit is the same for all questions; it,
random dropping and FastV have at most the FLOPs of the learned exit. The oracle exit knows all answers.</p>
<div class="scroll">$comparison</div>
<div class="figures">$curves</div>

<h2>Where it exits</h2>
<div class="figures">$exits</div>

<h2>FLOPs, memory and time</h2>
<div class="scroll">$configurations</div>

<h2>By type of question</h2>
<div class="scroll">$types</div>

<h2>How this was measured</h2>
<ul>$notes</ul>
<p class="muted">$environment</p>
""")


def page(report: Mapping[str, Any], plots: Mapping[str, Path], pictures: Mapping[str, Path]) -> str:
    """The page.

    Args:
        report: What ``report.json`` holds.
        plots: The plots by name, as PNG files.
        pictures: The pictures of the examples by name, as PNG files.
    """
    cases = {case["kind"]: case for case in report["configurations"]}
    body = _BODY.substitute(
        summary=escape(_summary(report, cases["learned"])),
        tiles=_tiles(report, cases["learned"], cases["none"]),
        visual=report["model"]["visual_tokens"],
        questions=report["settings"]["questions"],
        cards="".join(_card(example, pictures[example["image"]], report) for example in report["examples"]),
        comparison=_comparison(report["comparison"]),
        curves=figure(
            plots["agreement_over_flops"],
            "Agreement: the answer is, token for token, the full model's. The oracle exit lets each question exit "
            "after the earliest layer from which on no exit changes its answer.",
        ),
        exits=figure(plots["exit_layers"], "All questions.")
        + figure(plots["exit_layers_by_type"], "The number of layers is the mean that sees the picture."),
        configurations=_configurations(report),
        types=_types(report["configurations"][0], cases["learned"]),
        notes="".join(f"<li>{note}</li>" for note in _notes(report)),
        environment=escape(f"{machine(report['environment'])} · {report['created']} · took {report['seconds']:.0f} s"),
    )
    return document("vte_compile demo", body)


def _summary(report: Mapping[str, Any], learned: Mapping[str, Any]) -> str:
    model = report["model"]
    baselines = [
        f"{each['name']} to {each['measures']['agreement']['value']:.1%}"
        for each in report["comparison"]["configurations"]
        if each["kind"] in ("static", "random", "attention")
    ]
    others = f" Within the same FLOPs: {', '.join(baselines)}." if baselines else ""
    return (
        f"A small LLaVA ({model['parameters'] / 1e6:.1f} million parameters, {model['layers']} decoder layers, "
        f"{model['visual_tokens']} visual tokens per picture) lets its visual tokens leave the decoder after a layer "
        f"that learned gates pick for each question. It then gives the full model's answer to "
        f"{learned['agreement']['value']:.1%} of {report['settings']['questions']} held-out questions, while on "
        f"average {learned['mean_cost']:.2f} of {model['layers']} layers see the picture.{others}"
    )


def _tiles(report: Mapping[str, Any], learned: Mapping[str, Any], none: Mapping[str, Any]) -> str:
    same = learned["agreement"]
    found = [
        (
            f"{same['value']:.1%}",
            f"of answers equal the full model's (95% interval {same['low']:.1%} to {same['high']:.1%})",
        ),
        (
            f"{learned['mean_cost']:.2f} of {report['model']['layers']}",
            "decoder layers see the visual tokens, on average",
        ),
        (_change(learned["prefill_flops"] / none["prefill_flops"]), "FLOPs of the decoder's prefill"),
        (
            _change(learned["prefill_s"] / none["prefill_s"]),
            "time of the decoder's prefill, against the same without exit",
        ),
        (_change(learned["kv_bytes"] / none["kv_bytes"]), "KV cache after prefill"),
    ]
    return tiles(found)


def _change(ratio: float) -> str:
    return f"{'&minus;' if ratio < 1 else '+'}{abs(1 - ratio):.0%}"


def _card(example: Mapping[str, Any], picture: Path, report: Mapping[str, Any]) -> str:
    layers, exit_layer = report["model"]["layers"], example["exit_layer"]
    seen = layers if exit_layer < 0 else exit_layer + 1
    strip = "".join(f'<i class="{"seen" if layer < seen else ""}"></i>' for layer in range(layers))
    where = "never" if exit_layer < 0 else f"after layer {exit_layer}"
    rows = [("full", example["full"]), ("with exit", example["learned"])]
    answers = "".join(
        f'<dt>{name}</dt><dd class="{"right" if text == example["answer"] else "wrong"}">{escape(text)}</dd>'
        for name, text in rows
    )
    return (
        f'<article class="card"><img src="{inline(picture)}" alt="a scene of photographs, {escape(example["image"])}">'
        f"<div><h3>{escape(example['question'])}<small>type {escape(example['type'])}</small></h3><dl>{answers}"
        f"<dt>right</dt><dd>{escape(example['answer'])}</dd><dt>exit</dt><dd>{where}</dd></dl>"
        f'<div class="strip">{strip}</div></div></article>'
    )


def _comparison(comparison: Mapping[str, Any]) -> str:
    head = ["", "agreement", "accuracy", "FLOPs of full", "agreement against the learned exit"]
    full = comparison["configurations"][0]["measures"]["total_flops"]["value"]
    rows = []
    for case in comparison["configurations"]:
        measures, matched = case["measures"], case["name"] == comparison["matched"]
        cells = [
            case["name"],
            _interval(measures["agreement"]),
            _interval(measures["accuracy"]),
            f"{measures['total_flops']['value'] / full:.1%}",
            "" if matched else _interval(case["differences"]["agreement"], "+"),
        ]
        rows.append((cells, "learned" if matched else ""))
    return table(head, rows)


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.1%} ({value['low']:{sign}.1%} to {value['high']:{sign}.1%})"


def _configurations(report: Mapping[str, Any]) -> str:
    none = next(case for case in report["configurations"] if case["kind"] == "none")
    head = [
        "",
        "accuracy",
        "agreement",
        "layers (mean)",
        "prefill MFLOPs",
        "of no exit",
        "KV KiB",
        "prefill ms",
        "tokens/s",
    ]
    rows = []
    for case in report["configurations"]:
        cells = [
            case["name"],
            f"{case['accuracy']['value']:.1%}",
            f"{case['agreement']['value']:.1%}",
            f"{case['mean_cost']:.2f}",
            f"{case['prefill_flops'] / 1e6:,.0f}",
            f"{case['prefill_flops'] / none['prefill_flops']:.0%}",
            f"{case['kv_bytes'] / 1024:,.0f}",
            f"{case['prefill_s'] * 1e3:.1f}",
            f"{case['decode_tokens_per_s']:,.0f}",
        ]
        rows.append((cells, case["kind"]))
    return table(head, rows)


def _types(full: Mapping[str, Any], learned: Mapping[str, Any]) -> str:
    head = ["type", "questions", "accuracy, full", "accuracy, learned exit", "agreement", "layers (mean)"]
    rows = []
    for name, case in sorted(learned["by_type"].items(), key=lambda item: item[1]["mean_cost"]):
        cells = [
            name,
            str(case["accuracy"]["n"]),
            f"{full['by_type'][name]['accuracy']['value']:.1%}",
            f"{case['accuracy']['value']:.1%}",
            f"{case['agreement']['value']:.1%}",
            f"{case['mean_cost']:.2f}",
        ]
        rows.append((cells, ""))
    return table(head, rows)


def _notes(report: Mapping[str, Any]) -> list[str]:
    model, layers = report["model"], report["model"]["layers"]
    how = "compiled with Inductor" if report["settings"]["compiled"] else "not compiled (<code>--no-compile</code>)"
    return [
        f"<b>Cost</b> is the number of decoder layers that see the visual tokens, 1 to {layers}: an exit after layer k "
        f"costs k + 1 (layers count from 0), a question that never exits {layers}.",
        "<b>Full model</b> is the model as transformers runs it, uncompiled; it is what agreement refers to. All other "
        f"rows with times are the model from <code>vte_compile.optimize()</code>, {how}.",
        "<b>FLOPs</b> are counted from the config for the decoder's prefill, with causal attention and the gates, and "
        "without the vision tower, which an exit does not change. <b>KV</b> is what prefill leaves in the cache.",
        "<b>Times</b> are of the decoder alone, one question at a time, all configurations in turns: the mean over "
        f"{report['settings']['timed_questions']} questions, one of each type, of each one's median of "
        f"{report['settings']['timed_runs']} runs. On {escape(model['device'])}, "
        f"threads: {report['environment']['threads']}.",
        "<b>Answers</b> are greedy; each question's exit is its own. Intervals are percentile bootstraps over the "
        "questions, of which eight share a picture, which the intervals do not know.",
        "Nothing of the plans was chosen on these questions. Calibrated on other scenes, each promises that at most 2% "
        "of the answers about such scenes differ, with confidence 95%.",
    ]
