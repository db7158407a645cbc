"""Scenes of Fashion-MNIST photographs, and questions about them with their answers.

A scene is a 4x4 grid; each cell is empty or holds one tinted photograph. Everything is deterministic given a numpy
Generator. The question types differ in how much visual work they need, so that the decoder layer from which on the
image no longer matters differs from question to question.
"""

import gzip
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

GRID = 4
CELL = 24  # pixels per cell side
IMAGE_SIZE = GRID * CELL
DEFAULT_ROOT = "/usr/share/datasets/fashion-mnist"

# The six classes of ten that can be told apart at 24 pixels; the keys are Fashion-MNIST's labels.
CLASSES = {0: "tshirt", 1: "trouser", 4: "coat", 7: "sneaker", 8: "bag", 9: "boot"}
CLASS_NAMES = list(CLASSES.values())
COLORS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.15),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (0.95, 0.95, 0.1),
    "purple": (0.85, 0.2, 0.95),
    "white": (1.0, 1.0, 1.0),
}
COLOR_NAMES = list(COLORS)
TINTS = np.array(list(COLORS.values()), np.float32)
EMPTY = -1
FILL = 0.7  # share of cells that hold a photograph

# The splits: which of Fashion-MNIST's files, which half of it, and the seed of the scenes. Calibration and test share
# no photograph with training, nor with each other.
SPLITS = {
    "train": ("train", slice(None), 1),
    "calibration": ("t10k", slice(0, None, 2), 2),
    "test": ("t10k", slice(1, None, 2), 3),
}


class Photos:
    """The photographs of one split, scaled to a cell, grouped by class."""

    def __init__(self, by_class: list[np.ndarray]) -> None:
        self.by_class = by_class

    @classmethod
    def load(cls, split: str, root: str | Path | None = None) -> "Photos":
        """Read a split from `root`, else from $FASHION_MNIST, else from where Debian's package puts it."""
        prefix, part, _ = SPLITS[split]
        folder = Path(root or os.environ.get("FASHION_MNIST") or DEFAULT_ROOT)
        labels_file = folder / f"{prefix}-labels-idx1-ubyte.gz"
        images_file = folder / f"{prefix}-images-idx3-ubyte.gz"
        if not (labels_file.exists() and images_file.exists()):
            raise FileNotFoundError(
                f"Fashion-MNIST not found in {folder}: install Debian's package dataset-fashion-mnist, "
                "or point FASHION_MNIST (or --data) at the folder with its four .gz files"
            )
        labels = np.frombuffer(gzip.decompress(labels_file.read_bytes()), np.uint8, offset=8)[part]
        images = np.frombuffer(gzip.decompress(images_file.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)[part]
        return cls([shrink(images[labels == label]) for label in CLASSES])


def shrink(images: np.ndarray) -> np.ndarray:
    """Scale 28x28 photographs to the cell's 24x24 by area averaging (each output pixel averages two by two)."""
    start = np.arange(CELL) * 28 // CELL
    rows = (images[:, start].astype(np.float32) + images[:, start + 1]) / 2
    return ((rows[:, :, start] + rows[:, :, start + 1]) / 2).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """An RGB image and what it shows: per cell the class and the color, EMPTY where there is nothing."""

    image: np.ndarray
    classes: np.ndarray
    colors: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question of one type with its answer."""

    type: str
    question: str
    answer: str


def draw_scene(photos: Photos, rng: np.random.Generator, fill: float = FILL) -> Scene:
    """Draw a scene from a few of the classes and colors only, so that things repeat and counting is not trivial."""
    cells = GRID * GRID
    classes = rng.choice(rng.permutation(len(CLASS_NAMES))[: rng.integers(3, 7)], cells)
    colors = rng.choice(rng.permutation(len(COLOR_NAMES))[: rng.integers(3, 7)], cells)
    classes[rng.random(cells) > fill] = EMPTY
    colors[classes == EMPTY] = EMPTY
    picks, brightness = rng.random(cells), rng.uniform(0.75, 1.0, cells)
    image = np.zeros((GRID, CELL, GRID, CELL, 3), np.uint8)
    for cell in np.flatnonzero(classes != EMPTY):
        choices = photos.by_class[classes[cell]]
        photo = choices[int(picks[cell] * len(choices))].astype(np.float32)
        tinted = photo[..., None] * (TINTS[colors[cell]] * brightness[cell])
        image[cell // GRID, :, cell % GRID] = np.round(tinted).astype(np.uint8)
    return Scene(image.reshape(IMAGE_SIZE, IMAGE_SIZE, 3), classes.reshape(GRID, GRID), colors.reshape(GRID, GRID))


def pick(rng: np.random.Generator, choices: np.ndarray | list) -> int:
    """One element of a non-empty sequence."""
    return choices[int(rng.integers(len(choices)))]


def name_at(scene: Scene, row: int, column: int) -> str:
    """The class name of a cell, "nothing" where it is empty."""
    return CLASS_NAMES[scene.classes[row, column]] if scene.classes[row, column] != EMPTY else "nothing"


def values_seen_once(cells: np.ndarray) -> list[int]:
    """The classes (or colors) that exactly one cell has."""
    values, counts = np.unique(cells[cells != EMPTY], return_counts=True)
    return values[counts == 1].tolist()


def ask_text(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """A sum: needs no image at all."""
    a, b = rng.integers(10, size=2)
    return f"what is {a} plus {b}?", str(a + b)


def ask_loc(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """The class of the thing in a given cell."""
    row, column = rng.integers(GRID, size=2)
    return f"what is at row {row + 1} column {column + 1}?", name_at(scene, row, column)


def ask_loc_color(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """The color of the thing in a given cell."""
    full = np.argwhere(scene.classes != EMPTY)
    if not len(full):
        return None
    row, column = pick(rng, full)
    return f"what color is at row {row + 1} column {column + 1}?", COLOR_NAMES[scene.colors[row, column]]


def ask_attr(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """The color of the only thing of a class, or the class of the only thing of a color."""
    classes, colors = values_seen_once(scene.classes), values_seen_once(scene.colors)
    if classes and (not colors or rng.random() < by_class):
        wanted = pick(rng, classes)
        return f"what color is the {CLASS_NAMES[wanted]}?", COLOR_NAMES[scene.colors[scene.classes == wanted][0]]
    if not colors:
        return None
    wanted = pick(rng, colors)
    return f"what is the {COLOR_NAMES[wanted]} item?", CLASS_NAMES[scene.classes[scene.colors == wanted][0]]


def ask_exist(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """Whether there is a thing of a class, of a color, or of both."""
    full = np.argwhere(scene.classes != EMPTY)
    if not len(full):
        return None
    form = rng.random()
    if form < 0.4 * by_class:
        wanted = rng.integers(len(CLASS_NAMES))
        return f"is there a {CLASS_NAMES[wanted]}?", "yes" if (scene.classes == wanted).any() else "no"
    if form < 0.4:
        wanted = rng.integers(len(COLOR_NAMES))
        return f"is there a {COLOR_NAMES[wanted]} item?", "yes" if (scene.colors == wanted).any() else "no"
    # Class and color come from one thing (a yes) or from two (often a no that only binding the two can tell).
    first = tuple(pick(rng, full))
    second = first if form < 0.7 else tuple(pick(rng, full))
    kind, color = scene.classes[first], scene.colors[second]
    found = ((scene.classes == kind) & (scene.colors == color)).any()
    return f"is there a {COLOR_NAMES[color]} {CLASS_NAMES[kind]}?", "yes" if found else "no"


def ask_where(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """The row of the only thing of a class, of a color, or of both."""
    form = rng.random()
    pairs = np.where(scene.classes != EMPTY, scene.classes * len(COLOR_NAMES) + scene.colors, EMPTY)
    cells = pairs if form < 0.5 else scene.classes if form < 0.5 + 0.5 * by_class else scene.colors
    unique = values_seen_once(cells)
    if not unique:
        return None
    wanted = pick(rng, unique)
    if form < 0.5:
        thing = f"{COLOR_NAMES[wanted % len(COLOR_NAMES)]} {CLASS_NAMES[wanted // len(COLOR_NAMES)]}"
    else:
        thing = CLASS_NAMES[wanted] if form < 0.5 + 0.5 * by_class else f"{COLOR_NAMES[wanted]} item"
    return f"what row is the {thing} in?", str(np.argwhere(cells == wanted)[0][0] + 1)


def ask_list(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """Color and class of everything in a row."""
    row = int(rng.integers(GRID))
    words = []
    for column in range(GRID):
        name = name_at(scene, row, column)
        words.append(name if name == "nothing" else f"{COLOR_NAMES[scene.colors[row, column]]} {name}")
    return f"list row {row + 1}.", " ".join(words)


def ask_count(scene: Scene, rng: np.random.Generator, by_class: float) -> tuple[str, str] | None:
    """How many things there are of a class or of a color."""
    of_class = rng.random() < by_class
    cells, names = (scene.classes, CLASS_NAMES) if of_class else (scene.colors, COLOR_NAMES)
    seen = cells[cells != EMPTY]
    # Mostly about something that is there, else zero would be the answer far too often.
    wanted = pick(rng, seen) if len(seen) and rng.random() < 0.8 else rng.integers(len(names))
    thing = names[wanted] if of_class else f"{names[wanted]} items"
    return f"how many {thing} are there?", str((cells == wanted).sum())


ASK: dict[str, Callable[[Scene, np.random.Generator, float], tuple[str, str] | None]] = {
    "text": ask_text,
    "loc": ask_loc,
    "loc_color": ask_loc_color,
    "attr": ask_attr,
    "exist": ask_exist,
    "where": ask_where,
    "list": ask_list,
    "count": ask_count,
}
TYPES = list(ASK)


def draw_questions(
    scene: Scene,
    number: int,
    rng: np.random.Generator,
    weights: dict[str, float] | None = None,
    by_class: float = 0.5,
) -> list[Question]:
    """Draw different questions about a scene; a type that the scene does not admit is drawn anew.

    `weights` says how often which type is asked, `by_class` how often a thing is named by its class rather than color.
    """
    share = np.array([weights[kind] for kind in TYPES] if weights else [1.0] * len(TYPES))
    questions = []
    while len(questions) < number:
        for index in rng.choice(len(TYPES), number - len(questions), p=share / share.sum()):
            asked = ASK[TYPES[index]](scene, rng, by_class)
            question = asked and Question(TYPES[index], *asked)
            if question and question not in questions:
                questions.append(question)
    return questions


def load_split(
    split: str, scenes: int, questions_per_scene: int = 8, root: str | Path | None = None
) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Yield the first scenes of a split as PIL images with their questions; the n-th scene is always the same."""
    photos, seed = Photos.load(split, root), SPLITS[split][2]
    for index in range(scenes):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(photos, rng)
        yield Image.fromarray(scene.image), draw_questions(scene, questions_per_scene, rng)
