"""The demo's page: one HTML file without external references, readable on a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_STYLE = """
:root { --ink: #1d2733; --muted: #5b6b7b; --line: #e3e8ee; --paper: #fff; --ground: #f5f7f9; --accent: #d9480f;
  --good: #2b8a3e; --bad: #c92a2a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted { color: var(--muted); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem; }
.tile, .card, figure, .scroll { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .85rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: .85rem; line-height: 1.35; margin-top: .2rem; }
.tile.main b { color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .75rem; }
@media (min-width: 50rem) { .cards { grid-template-columns: repeat(4, 1fr); } }
.card { overflow: hidden; display: flex; flex-direction: column; }
.card img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; background: #000; }
.card div { padding: .6rem .75rem .75rem; }
.card h3 { margin: 0 0 .5rem; font-size: 1rem; line-height: 1.35; }
.card small { color: var(--muted); font-weight: 400; display: block; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem; margin: 0; font-size: .875rem; }
dt { color: var(--muted); }
dd { margin: 0; }
.right::after { content: " \\2713"; color: var(--good); font-weight: 700; }
.wrong::after { content: " \\2717"; color: var(--bad); font-weight: 700; }
.strip { display: flex; gap: 3px; margin-top: .6rem; padding: 0; }
.card .strip { padding: 0; }
.strip i { flex: 1; height: .45rem; border-radius: 2px; background: var(--line); }
.strip i.seen { background: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .75rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .85rem; line-height: 1.4; padding: .5rem .25rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; font-size: .8rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr:last-child td { border-bottom: 0; }
tr.learned td { font-weight: 650; background: #fff4ec; }
ul { padding-left: 1.2rem; margin: .5rem 0; max-width: 48rem; }
li { margin: .3rem 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vte_compile demo</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<main>
<h1>Visual tokens that leave when they are no longer needed</h1>
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
</main>
</body>
</html>
""")


def page(report: Mapping[str, Any], plots: Mapping[str, Path], pictures: Mapping[str, Path]) -> str:
    """The page.

    Args:
        report: What ``report.json`` holds.
        plots: The plots by name, as PNG files.
        pictures: The pictures of the examples by name, as PNG files.
    """
    cases = {case["kind"]: case for case in report["configurations"]}
    return _PAGE.substitute(
        style=_STYLE,
        summary=escape(_summary(report, cases["learned"])),
        tiles=_tiles(report, cases["learned"], cases["none"]),
        visual=report["model"]["visual_tokens"],
        questions=report["settings"]["questions"],
        cards="".join(_card(example, pictures[example["image"]], report) for example in report["examples"]),
        comparison=_comparison(report["comparison"]),
        curves=_figure(
            plots["agreement_over_flops"],
            "Agreement: the answer is, token for token, the full model's. The oracle exit lets each question exit "
            "after the earliest layer from which on no exit changes its answer.",
        ),
        exits=_figure(plots["exit_layers"], "All questions.")
        + _figure(plots["exit_layers_by_type"], "The number of layers is the mean that sees the picture."),
        configurations=_configurations(report),
        types=_types(report["configurations"][0], cases["learned"]),
        notes="".join(f"<li>{note}</li>" for note in _notes(report)),
        environment=escape(_environment(report)),
    )


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
    tiles = [
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
    return "".join(
        f'<div class="tile{" main" if i == 0 else ""}"><b>{value}</b><span>{escape(text)}</span></div>'
        for i, (value, text) in enumerate(tiles)
    )


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
        f'<article class="card"><img src="{_inline(picture)}" alt="a scene of photographs, {escape(example["image"])}">'
        f"<div><h3>{escape(example['question'])}<small>type {escape(example['type'])}</small></h3><dl>{answers}"
        f"<dt>right</dt><dd>{escape(example['answer'])}</dd><dt>exit</dt><dd>{where}</dd></dl>"
        f'<div class="strip">{strip}</div></div></article>'
    )


def _figure(file: Path, caption: str) -> str:
    alt = escape(file.stem.replace("_", " "))
    return f'<figure><img src="{_inline(file)}" alt="{alt}"><figcaption>{escape(caption)}</figcaption></figure>'


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
    return _table(head, rows)


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
    return _table(head, rows)


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
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>' for cells, kind in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


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


def _environment(report: Mapping[str, Any]) -> str:
    environment = report["environment"]
    parts = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    parts += [str(environment["cpu"]["name"]), f"{environment['cpu']['cores']} cores"]
    parts += [gpu["name"] for gpu in environment["gpus"]]
    if environment["commit"]:
        parts.append(f"commit {environment['commit'][:12]}")
    return f"{' · '.join(parts)} · {report['created']} · took {report['seconds']:.0f} s"


def _inline(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
