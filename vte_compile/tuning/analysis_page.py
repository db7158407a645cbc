"""An analysis' files: numbers as JSON, plots, and one HTML page that needs no other file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.html_page import document, figure, machine, table, tiles
from vte_compile.plotting import require_matplotlib
from vte_compile.tuning.analysis import Analysis
from vte_compile.tuning.analysis_plots import ATTENTION_TITLES, draw_analysis
from vte_compile.tuning.bootstrap import Interval

# What the tiles count as no change.
_ALMOST = 0.99
_BODY = Template("""<h1>What the answers need of the images</h1>
<p>$summary</p>
<div class="tiles">$tiles</div>

<h2>Attention between modalities</h2>
<p class="muted">Where the attention of a token goes, by layer: softmax weights, mean over heads and tokens. The bands
hold 80% of the samples. The dotted line is what the visual tokens would get if each token attended equally to all it
may see; the first token often gets much whatever it says.</p>
<p class="muted">DyVTE (arXiv 2411.19628) reads three stages from such curves: early fusion of text and image, then
attention within each modality, then multimodal reasoning. It gives no rule for where one ends, so none is drawn.</p>
<div class="figures">$attention</div>

<h2>If all visual tokens leave after a layer</h2>
<div class="figures">$exits</div>

<h2>The earliest exit of each sample</h2>
<div class="figures">$oracle</div>

<h2>Attentions that can be spared</h2>
$deletions

<h2>All layers</h2>
<div class="scroll">$layers</div>

<h2>How this was measured</h2>
<ul>$notes</ul>
<p class="muted">$environment</p>
""")


def prepare_folder(folder: Path) -> None:
    """Find out before the work is done that an analysis can be drawn, and written into `folder`.

    Raises:
        InputError: matplotlib is missing, or the folder cannot be written.
    """
    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error


def write_analysis(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Write ``analysis.json``, ``analysis.html`` and the plots into a folder: what -> file.

    Raises:
        InputError: matplotlib is missing, or the folder cannot be written.
    """
    prepare_folder(folder)
    files = {"numbers": folder / "analysis.json", "page": folder / "analysis.html"}
    try:
        write_atomically(files["numbers"], analysis.to_json().encode())
        plots = draw_analysis(analysis, folder)
        write_atomically(files["page"], page(analysis, plots).encode())
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error
    return files | plots


def page(analysis: Analysis, plots: Mapping[str, Path]) -> str:
    """The page, as HTML; `plots`: PNG files by name, as `draw_analysis` gives them."""
    return document(
        "What the answers need of the images",
        _BODY.substitute(
            summary=escape(_summary(analysis)),
            tiles=tiles(_tiles(analysis)),
            attention="".join(
                figure(plots[f"attention_of_{queries}"], _CAPTIONS[queries]) for queries in ATTENTION_TITLES
            ),
            exits=figure(plots["exit_answers"], _exit_caption(analysis))
            + figure(plots["exit_loss"], "Mean cross entropy of the answer's tokens, over that without exit."),
            oracle=figure(
                plots["oracle_exits"],
                "The earliest layer from which on no exit changes the full model's answer. What a gate that knew each "
                "answer could save without changing any.",
            ),
            deletions=_deletions(analysis, plots),
            layers=_layer_table(analysis),
            notes="".join(f"<li>{note}</li>" for note in _notes(analysis)),
            environment=escape(machine(analysis.environment)),
        ),
    )


_CAPTIONS = {
    "question": "The text behind the last image, but for its last token.",
    "answer": "The prompt's last token, and the answer's but for its last.",
    "visual": "The visual tokens themselves. They cannot see the text behind them.",
}


def _summary(analysis: Analysis) -> str:
    model = analysis.model
    visual, tokens = (
        sum(getattr(s, name) for s in analysis.samples) / len(analysis.samples) for name in ("visual", "tokens")
    )
    return (
        f"{model['class']} ({model['parameters'] / 1e6:,.1f} million parameters, {model['layers']} decoder layers) "
        f"answered {len(analysis.samples)} prompts of {tokens:,.0f} tokens in the mean, {visual:,.0f} of them visual. "
        "This page shows where it attends to them, and how much of that its own answers need."
    )


def _tiles(analysis: Analysis) -> list[tuple[str, str]]:
    layers, cost = analysis.layers, analysis.oracle_cost
    found = [
        (
            f"{cost.value:.2f} of {len(layers)}",
            f"layers need the visual tokens, with the best exit for each sample ({_range(cost, '.2f')})",
        )
    ]
    short = [row.layer for row in layers if row.exit_agreement.value < _ALMOST]
    almost = max(short, default=-1) + 1
    if almost < len(layers) - 1:
        found.append(
            (f"layer {almost}", f"is the first from which on every exit leaves {_ALMOST:.0%} of answers as they are")
        )
    spared = [row for row in layers if row.deletion_agreement is not None and row.deletion_agreement.value >= _ALMOST]
    if analysis.deletions_refused is None:
        found.append(
            (f"{len(spared)} of {len(layers)}", f"attentions can each go alone, and {_ALMOST:.0%} of answers stay")
        )
    if layers[-1].exit_accuracy is not None:
        found.append(
            (f"{layers[-1].exit_accuracy.value:.1%}", f"of {analysis.answered} answers of the full model are right")
        )
    return found


def _exit_caption(analysis: Analysis) -> str:
    confidence = f"Bands: {analysis.settings['confidence']:.0%} bootstrap intervals. "
    right = f"Right: the sample's own answer, token for token ({analysis.answered} samples have one)."
    return confidence + (right if analysis.answered else "No sample has an answer of its own.")


def _deletions(analysis: Analysis, plots: Mapping[str, Path]) -> str:
    if analysis.deletions_refused is not None:
        return f"<p>Not measured: {escape(analysis.deletions_refused)}</p>"
    drawn = figure(
        plots["deletion_answers"], "Each attention deleted alone, all else as it is; the FFN stays."
    ) + figure(
        plots["deletion_loss"],
        "Effects of several do not add up: vte-compile search looks for a set of them. Below zero the loss falls.",
    )
    return f'<div class="figures">{drawn}</div>'


def _layer_table(analysis: Analysis) -> str:
    head = ["layer", "question to visual", "answer to visual", "exit: same answer", "exit: right", "exit: loss"]
    head += ["oracle exits", "here or before", "deleted: same answer", "deleted: loss"]
    rows = []
    for row in analysis.layers:
        cells = [str(row.layer)]
        cells += [f"{row.attention[queries]['visual'].mean.value:.1%}" for queries in ("question", "answer")]
        cells += [_share(row.exit_agreement), _share(row.exit_accuracy), f"{row.exit_loss_increase.value:+.4f}"]
        cells += [str(row.oracle_exits), f"{row.may_exit.value:.1%}", _share(row.deletion_agreement)]
        loss = row.deletion_loss_increase
        finite = "" if row.deletion_agreement is None else "not finite"
        cells.append(finite if loss is None else f"{loss.value:+.4f}")
        rows.append((cells, ""))
    return table(head, rows)


def _notes(analysis: Analysis) -> list[str]:
    settings = analysis.settings
    return [
        "<b>Answers</b> are the full model's own greedy ones, up to "
        f"{settings['max_new_tokens']} tokens; losses are of these. <b>Same answer</b>: with it as input, an exit or a "
        "deletion leaves the winning token of each position as it is, so that greedy decoding gives it again.",
        "<b>Attention</b> is computed in float32 or wider, from what the layers themselves attend with.",
        "Layers count from 0. An exit after layer k costs k + 1 layers of visual tokens; after the last layer it is "
        "the full model.",
        "<b>Much attention is no proof of need</b>, and little none of the contrary: what answers need is what exits "
        "show.",
        f"Intervals: percentile bootstrap over the samples, {settings['resamples']:,} resamples, "
        f"{settings['confidence']:.0%}, each by itself. They say nothing about other data.",
    ]


def _share(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.1%} ({_range(interval, '.1%')})"


def _range(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"
