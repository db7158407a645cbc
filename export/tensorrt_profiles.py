"""Optimization profiles: which sizes an engine takes, and for which it is fast; and the trtexec line that says so."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isqrt

from vte_compile.errors import InputError
from vte_compile.export.manifest import VisionCall

Sizes = tuple[int, int, int]
"""The smallest, the one to be fast for, the largest."""
Shapes = Mapping[str, Sequence[int | str]]
"""For each input of a graph its dims: numbers, or names of those of any size."""

PREFILL, DECODE = 0, 1
"""Numbers of an engine's profiles: prompts, one row each; and decode steps, of all rows."""


@dataclass(frozen=True)
class Profiles:
    """Sizes, each (smallest, the one to be fast for, largest). An engine refuses others.

    Prompts run row by row, since rows leave behind different layers; ``batch`` is that of decode steps.
    """

    batch: Sizes = (1, 1, 8)
    prompt: Sizes = (1, 768, 4096)
    """Tokens of a prompt, or of a later chunk, visual ones included."""
    visual: Sizes = (1, 576, 2880)
    """Visual tokens among them; none is always allowed."""
    columns: Sizes = (1, 1024, 8192)
    """Of the cache: tokens of a row so far. Who runs the engine may hold more columns than are filled."""
    frame: Sizes = (1, 256, 4096)
    """Visual tokens of one frame of an image or video of any size, of models that take those."""

    def __post_init__(self) -> None:
        for field in fields(self):
            sizes = getattr(self, field.name)
            known = isinstance(sizes, tuple | list) and len(sizes) == 3 and all(type(size) is int for size in sizes)
            if not known or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise InputError(
                    f"profiles.{field.name}: expected (smallest, the one to be fast for, largest), each at least 1 and "
                    f"none above the next, got {sizes!r}."
                )
            object.__setattr__(self, field.name, tuple(sizes))
        if self.visual[2] >= self.prompt[2] or self.visual[1] >= self.prompt[1]:
            raise InputError(
                f"profiles.visual: {self.visual} leaves no room for text in profiles.prompt {self.prompt}: choose "
                "larger prompts."
            )
        if self.columns[2] < self.prompt[2]:
            raise InputError(
                f"profiles.columns: at most {self.columns[2]}, but a prompt of profiles.prompt fills {self.prompt[2]}."
            )

    def of(
        self, shapes: Shapes, vision: VisionCall | None = None
    ) -> list[dict[str, tuple[list[int], list[int], list[int]]]]:
        """The profiles of a graph.

        Args:
            shapes: Of its inputs.
            vision: The image encoder.

        Returns:
            For each profile, in order, the smallest, usual and largest shape of each input that has dims of any size;
            [] if none has, and no second one for a graph that decode steps do not run.

        Raises:
            InputError: A dim has a name that is none of an engine's.
        """
        names = {dim for shape in shapes.values() for dim in shape if isinstance(dim, str)}
        if not names:
            return []
        if vision is not None and "pixel_values" in shapes:
            return [_shapes(shapes, self._frame(vision))]
        profiles = [self._prefill(behind_exit="keep" in shapes)]
        if "visual_mask" not in shapes:  # gates decide about prompts only
            profiles.append(self._decode())
        return [_shapes(shapes, sizes) for sizes in profiles]

    def _frame(self, vision: VisionCall) -> dict[str, Sizes]:
        smallest, usual, largest = self.frame
        if vision.unit is not None:  # a token is a square of so many pixels
            side = (vision.unit, vision.unit * isqrt(usual), vision.unit * isqrt(largest))
            return {"height": side, "width": side}
        facts = vision.patches
        if facts is None:
            return {}
        unit, window = facts.merge_size**2, (facts.window or 1) ** 2
        return {
            "patches": (smallest * unit, usual * unit, largest * unit),
            "frame_tokens": self.frame,
            "windows": (1, -(-usual // window), largest),  # at an edge, they may be as small as one token
            "longest_window": (unit, unit * window, unit * window),
        }

    def _prefill(self, behind_exit: bool) -> dict[str, Sizes]:
        prompt, text = self.prompt, self.prompt[1] - self.visual[1]
        tokens = (1, *prompt[1:]) if behind_exit else prompt  # an exit below may have left one token
        # Of a first chunk, the cache is one column that is not filled.
        columns = (1, 1, self.columns[2])
        return {"batch": (1, 1, 1), "tokens": tokens, "kept_tokens": (1, text, prompt[2]),
                "features": (0, *self.visual[1:]), "columns": columns}  # fmt: skip

    def _decode(self) -> dict[str, Sizes]:
        one = (1, 1, 1)
        return {"batch": self.batch, "tokens": one, "kept_tokens": one, "features": (0, 1, 1),
                "columns": self.columns}  # fmt: skip


def _shapes(shapes: Shapes, sizes: Mapping[str, Sizes]) -> dict[str, tuple[list[int], list[int], list[int]]]:
    result = {}
    for name, shape in shapes.items():
        if not any(isinstance(dim, str) for dim in shape):
            continue
        triples = [(dim,) * 3 if isinstance(dim, int) else _named(name, dim, sizes) for dim in shape]
        result[name] = tuple([triple[i] for triple in triples] for i in range(3))
    return result  # type: ignore[return-value]


def _named(name: str, dim: str, sizes: Mapping[str, Sizes]) -> Sizes:
    known = "columns" if dim.startswith("past_columns") else dim
    if known not in sizes:
        raise InputError(f"{name}: its dim {dim!r} is in no profile ({', '.join(sizes)}).")
    return sizes[known]


def trtexec(onnx: str, engine: str, profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]], cache: str) -> list[str]:
    """The command line that builds an engine, with the files it names beside it.

    Args:
        onnx: File of the graph.
        engine: File to write.
        profiles: From :meth:`Profiles.of`.
        cache: File of the timing cache, which all engines share.
    """
    # Strong typing: the types are those of the graph. TensorRT 11 knows nothing else, and takes the flag still.
    line = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", f"--timingCacheFile={cache}"]
    line.append("--skipInference")
    for i, profile in enumerate(profiles):
        if len(profiles) > 1:
            line.append(f"--profile={i}")
        for k, which in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, sizes[k]))}" for name, sizes in profile.items())
            line.append(f"--{which}Shapes={shapes}")
    return line


def shell_script(lines: Mapping[str, Sequence[str]]) -> str:
    """build.sh: all engines, one after another, in the folder it lies in; ``lines``: for each engine's file its own."""
    head = ["#!/bin/sh", "# Builds the engines of this folder. Needs trtexec, of TensorRT 10.0 or later, and the GPU"]
    head += ["# that will run them: an engine is for one version of TensorRT and one kind of GPU.", "set -e"]
    head += ['cd "$(dirname "$0")"', 'PATH="$PATH:/usr/src/tensorrt/bin"', "mkdir -p engines"]
    for engine, line in lines.items():
        name = shlex.quote(engine.rpartition("/")[2])
        head += [shlex.join(line), f"(cd engines && sha256sum {name} > {name}.sha256)"]
    return "\n".join(head) + "\n"


def fitting(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]], shapes: Mapping[str, Sequence[int]]) -> int:
    """Which profile takes inputs of these shapes; that of decode steps, where both do.

    Args:
        profiles: Of an engine; [] if its inputs have one shape only.
        shapes: Of its inputs.

    Raises:
        InputError: None; the message says which input is too large or too small for which.
    """
    reasons = []
    for i in reversed(range(len(profiles))):
        for name, (smallest, _, largest) in profiles[i].items():
            shape = list(shapes[name])
            if not all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)):
                reasons.append(f"profile {i} takes {name} from {smallest} to {largest}, got {shape}")
                break
        else:
            return i
    if profiles:
        raise InputError(f"{'; '.join(reasons)}: export the model with other profiles= for such inputs.")
    return 0
