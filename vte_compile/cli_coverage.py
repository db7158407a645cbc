"""What ``vte-compile export --target tensorrt --dry-run`` prints."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from vte_compile.cli import _out, _plain

if TYPE_CHECKING:
    from vte_compile.export.tensorrt_coverage import Coverage


def show(found: Coverage) -> None:
    """A table of the engines, then what the host does, then the nodes no engine takes."""
    table = Table("graph", "layers", "nodes", "in the engine", "operators", box=box.SIMPLE)
    for engine in found.engines:
        layers = f"{engine.layers[0]} to {engine.layers[-1]}" if len(engine.layers) > 1 else "".join(
            map(str, engine.layers))  # fmt: skip
        kinds = ", ".join(f"{count} {kind}" for kind, count in engine.operators.items())
        table.add_row(engine.graph, layers, str(engine.nodes), str(engine.nodes - len(engine.exceptions)), kinds)
    out = _out()
    out.print(f"{_plain(found.model)}, {found.precision}", highlight=False)
    out.print(table)
    for what, why in found.host.items():
        out.print(f"host: {_plain(what)}: {_plain(why)}", highlight=False, soft_wrap=True)
    for engine in found.engines:
        for e in engine.exceptions:
            what = f"{_plain(engine.graph)}: {_plain(e.node)} ({e.operator}): {_plain(e.reason)}"
            out.print(f"[bold red]no engine[/] of {what}", highlight=False, soft_wrap=True)
    out.print(
        f"{found.decoder_placed} of {found.decoder_nodes} decoder nodes are in engines "
        f"({found.decoder_placed / found.decoder_nodes:.0%}), by {_plain(found.source)}. Nothing was built.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for engine in found.engines:
        out.print(_plain(shlex.join(engine.trtexec)), highlight=False, soft_wrap=True)
