"""An analysis' plots, over the decoder's layers: attention between modalities, exits, deleted attentions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vte_compile.plotting import GRID, INK, MUTED, drawn
from vte_compile.tuning.analysis import Analysis
from vte_compile.tuning.bootstrap import Interval

_ACCENT, _SECOND = "#d9480f", "#1971c2"
_LINES = {  # by group of keys
    "visual": (_ACCENT, "visual tokens"),
    "question": (_SECOND, "text behind the image"),
    "answer": ("#2b8a3e", "answer so far"),
    "before": ("#9c36b5", "text in front of the image"),
    "first": (MUTED, "first token"),
}
ATTENTION_TITLES = {
    "question": "Attention of the question",
    "answer": "Attention of the positions that predict the answer",
    "visual": "Attention of the visual tokens",
}
"""By group of queries, as plots and page show them in turn."""


def draw_analysis(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Draw all plots into PNG files in `folder`: name -> file. Of deleted attentions only if there are numbers.

    Raises:
        InputError: matplotlib is missing.
    """
    plots: dict[str, Callable[[Any, Analysis], None]] = {
        f"attention_of_{queries}": _attention_plot(queries) for queries in ATTENTION_TITLES
    }
    plots |= {"exit_answers": _exit_answers, "exit_loss": _exit_loss, "oracle_exits": _oracle_exits}
    if analysis.deletions_refused is None:
        plots |= {"deletion_answers": _deletion_answers, "deletion_loss": _deletion_loss}
    files = {}
    for name, plot in plots.items():
        files[name] = folder / f"{name}.png"
        with drawn(files[name], (6.6, 4.6 if name.startswith("attention") else 3.8)) as axes:
            plot(axes, analysis)
    return files


def _attention_plot(queries: str) -> Callable[[Any, Analysis], None]:
    def plot(axes: Any, analysis: Analysis) -> None:
        x = _layers(axes, analysis, "decoder layer")
        for keys, (color, label) in _LINES.items():
            shares = [row.attention[queries][keys] for row in analysis.layers]
            if not any(share.mean.value for share in shares):
                continue  # what these tokens never see, such as the answer
            axes.plot(x, [share.mean.value for share in shares], "-o", color=color, lw=1.8, ms=4, label=label)
            axes.fill_between(x, [s.low for s in shares], [s.high for s in shares], color=color, alpha=0.15, lw=0)
        uniform = analysis.uniform[queries]["visual"]
        axes.axhline(uniform, color=_ACCENT, lw=1.2, ls=(0, (2, 2)), label="visual tokens, if uniform", zorder=1)
        axes.set(ylabel="share of attention", ylim=(0, 1.02))
        _percent(axes)
        # Below the curves, which may be anywhere.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=2, fontsize=9.5)
        axes.set_title(ATTENTION_TITLES[queries])

    return plot


def _exit_answers(axes: Any, analysis: Analysis) -> None:
    x = _layers(axes, analysis, "all visual tokens leave after layer")
    _curve(axes, x, [row.exit_agreement for row in analysis.layers], _ACCENT, "same answer as the full model")
    right = [row.exit_accuracy for row in analysis.layers if row.exit_accuracy is not None]
    if right:
        _curve(axes, x, right, _SECOND, "right answer")
    axes.set(ylabel="share of samples", ylim=(0, 1.03))
    _percent(axes)
    axes.legend(loc="lower right" if analysis.layers[-1].exit_agreement.value > 0.4 else "best")
    axes.set_title("Answers behind an exit")


def _exit_loss(axes: Any, analysis: Analysis) -> None:
    x = _layers(axes, analysis, "all visual tokens leave after layer")
    _curve(axes, x, [row.exit_loss_increase for row in analysis.layers], _ACCENT, "")
    axes.set(ylabel="increase of the loss, nats per token")
    axes.set_title("Loss of the full model's answer behind an exit")


def _oracle_exits(axes: Any, analysis: Analysis) -> None:
    layers, samples = analysis.layers, len(analysis.samples)
    never = sum(sample.oracle_exit < 0 for sample in analysis.samples)
    x = _layers(axes, analysis, "oracle exit after layer", last="never")
    # Behind the last layer nothing is saved: there is "never".
    counts = [row.oracle_exits / samples for row in layers[:-1]] + [never / samples]
    axes.bar(x, counts, color=[_ACCENT] * (len(x) - 1) + ["#7a8da3"], width=0.78, label="exits here")
    axes.plot(
        x[:-1], [row.may_exit.value for row in layers[:-1]], "-o", color=INK, lw=1.6, ms=4, label="here or before"
    )
    axes.set(ylabel="share of samples", ylim=(0, 1.03))
    _percent(axes)
    axes.legend(loc="upper left")
    axes.set_title(f"Oracle exits: {analysis.oracle_cost.value:.2f} of {len(layers)} layers see the visual tokens")


def _deletion_answers(axes: Any, analysis: Analysis) -> None:
    changed = [row.deletion_agreement for row in analysis.layers if row.deletion_agreement is not None]
    intervals = [Interval(1 - each.value, 1 - each.high, 1 - each.low) for each in changed]
    _bars(axes, _layers(axes, analysis, "deleted attention"), intervals)
    axes.set(ylabel="share of samples")
    axes.set_ylim(bottom=0)
    _percent(axes)
    axes.set_title("Answers that change without an attention")


def _deletion_loss(axes: Any, analysis: Analysis) -> None:
    x = _layers(axes, analysis, "deleted attention")
    finite = [(at, row.deletion_loss_increase) for at, row in zip(x, analysis.layers, strict=True)]
    known = [(at, each) for at, each in finite if each is not None]
    _bars(axes, [at for at, _ in known], [each for _, each in known])
    for at in sorted(set(x) - {at for at, _ in known}):
        axes.annotate("not finite", (at, 0), rotation=90, ha="center", va="bottom", color=MUTED, fontsize=9)
    axes.set(ylabel="increase of the loss, nats per token")
    axes.set_title("Loss of the full model's answer without an attention")


def _curve(axes: Any, x: Sequence[int], intervals: Sequence[Interval], color: str, label: str) -> None:
    axes.plot(x, [each.value for each in intervals], "-o", color=color, lw=1.8, ms=4, label=label)
    axes.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], color=color, alpha=0.18, lw=0)


def _bars(axes: Any, x: Sequence[int], intervals: Sequence[Interval]) -> None:
    axes.bar(x, [each.value for each in intervals], color="#f0a070", width=0.78)
    spread = [[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]]
    axes.errorbar(x, [i.value for i in intervals], yerr=spread, fmt="none", ecolor=INK, capsize=2.5, elinewidth=1)


def _layers(axes: Any, analysis: Analysis, label: str, last: str | None = None) -> list[int]:
    """The x axis, with as many names as there is room for."""
    layers = [row.layer for row in analysis.layers]
    step = -(-len(layers) // 16)
    names = [str(layer) if layer % step == 0 else "" for layer in layers]
    if last is not None:
        names[-1] = last
        names[-2] = names[-2] if step == 1 else ""
    axes.set_xticks(layers, names)
    axes.set_xlabel(label)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    return layers


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
