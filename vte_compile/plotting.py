"""What all plots share: their look, and drawing into a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vte_compile.errors import InputError

INK, MUTED, GRID = "#1d2733", "#5b6b7b", "#e3e8ee"
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
}


def require_matplotlib() -> None:
    """Find out before the work is done.

    Raises:
        InputError: matplotlib is missing; the message says what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("Plots are drawn with matplotlib: pip install 'vte-compile[demo]'.") from error


@contextmanager
def drawn(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on, of a PNG file that is written behind; its folder is created where missing.

    Args:
        file: The PNG file.
        size: In inches.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no backend, no global state

    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure = Figure(figsize=size)
        yield figure.add_subplot()
        figure.savefig(file)
