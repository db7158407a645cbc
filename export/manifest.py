"""manifest.json: what an engine is made of, as plain data; here, of engines that are pieces (AOTInductor).

``encode`` and ``decode`` are the file's frame, which all targets share; ONNX engines: onnx_manifest.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vte_compile.errors import EngineError
from vte_compile.runtime.prompt_value import PromptValue

MANIFEST = "manifest.json"
FORMAT = "vte_compile engine"
SCHEMA_VERSION = 4
"""2: the attentions of decode steps are steps of their own. 3: positions may be multimodal. 4: an ONNX engine may
need an ONNX Runtime of some age; decoders may take more of each token (DeepStack, blocks); images may be tiles;
prompts of AOTInductor's engines run packed; attentions of their decode steps may have windows and caps; a token may go
along with prompts."""
_REMEDY = "export the model again, or copy the whole folder again"
T = TypeVar("T")
IMAGES, PROMPTS = "images", "prompts"
BLOCK_RULES = (IMAGES, PROMPTS)
"""Which tokens of a chunk attend to each other in both directions: those of each image, side by side; or all, in the
first chunk of a row and in each of its chunks that has an image."""


@dataclass(frozen=True)
class PieceCall:
    """Run a piece: ``outputs`` = piece(``inputs``, ``weights``). Values have names within a phase."""

    piece: str
    """Path of its file in the folder."""
    inputs: list[str]
    weights: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class GateWeights:
    """Names of the gate's weights, and its threshold (kernels/exit_gate.py)."""

    w1: str
    w2: str
    threshold: float


@dataclass(frozen=True)
class ExitCall:
    """Decide whether the visual tokens leave: ``outputs`` = ``inputs``, without them if they do."""

    layer: int
    stream: str
    """The value the gate reads."""
    gate: GateWeights | None
    """None: they leave always."""
    inputs: list[str]
    dims: list[list[int]]
    """Which dims of each input are as long as the sequence."""
    outputs: list[str]


@dataclass(frozen=True)
class AttendCall:
    """The attention of one layer in a decode step, which appends to the cache (kernels/append_attention.py)."""

    attend: list[str]
    """Its inputs: query, key and value of the new token, keys and values, and where the rows start."""
    outputs: list[str]
    """The attention's output, keys and values."""
    scale: float | None
    """Of the scores; None for 1 / sqrt(head size)."""
    window: int = 0
    """How many columns the token sees, the last ones; 0: all."""
    softcap: float = 0.0
    """Scores s become ``softcap * tanh(s / softcap)``; 0: as they are."""


@dataclass(frozen=True)
class PhaseSteps:
    """One phase: prefill, packed (prompts at once), extend (a row's chunk that continues its cache) or decode (one
    token of each row)."""

    inputs: list[str]
    steps: list[PieceCall | ExitCall | AttendCall]
    outputs: list[str]
    """Logits of the last token, then key and value of each layer that has them, then what adapters know."""
    kv: list[int | None]
    """For each layer, where its key and value are among the pairs of ``outputs``; None: attention is skipped."""
    prompt_state: list[PromptValue]


@dataclass(frozen=True)
class PatchFacts:
    """How images of any size go into an encoder (export/patches.py)."""

    numbers: int
    """Of a patch."""
    merge_size: int
    """So many patches, in height and in width, are one token."""
    window: int | None
    """So many tokens, in height and in width, attend to each other in some layers; None: all do."""
    learned: int | None = None
    """So many learned positions, in height and in width, are spread over an image; None: there are none."""


@dataclass(frozen=True)
class TileFacts:
    """How images of any size become tiles of one, and the tiles' tokens a sequence (export/tiles.py)."""

    size: int
    """Height and width of a tile, in pixels."""
    side: int
    """Of a tile, in tokens. The encoder gives these, and behind them the embedding that ends a row."""
    resolutions: list[list[int]]
    """[height, width], in pixels, of what images are fitted into."""
    most: int | None
    """More tokens than so many tiles have are shrunk to about as many; None: never."""
    alone: bool
    """Whether images of a prompt with several stay whole (batch_num_images)."""
    videos: bool
    """Whether frames of videos are tiles, too, of which 2 x 2 tokens become one."""


@dataclass(frozen=True)
class VisionCall:
    """The image encoder with its projector: one image, tile, or frame of patches, -> [visual tokens, C]."""

    piece: str
    weights: list[str]
    image: list[int]
    """Channels, height and width; channels alone of images of any size; [] of one that takes patches."""
    patches: PatchFacts | None = None
    """Of images that are cut into patches."""
    tiles: TileFacts | None = None
    """Of images that are cut into tiles."""
    mask_patch: int | None = None
    """Of images that come by prompts, [prompts, images, ...], with masks of their pixels: the encoder takes a mask of
    squares, so many pixels high and wide."""
    unit: int | None = None
    """Of images of any size that stay whole: they are so many pixels high and wide, or multiples of it. If nothing is
    said of images, they are of one size."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> VisionCall:
        """From what the file has."""
        kinds = {"patches": PatchFacts, "tiles": TileFacts}
        facts = {name: None if fields[name] is None else kind(**fields[name]) for name, kind in kinds.items()}
        return cls(**(fields | facts))


@dataclass(frozen=True)
class Built:
    """What the pieces were compiled with, and what they need to run."""

    vte_compile: str
    torch: str
    device: str
    """Its type, such as "cpu"."""
    system: str
    machine: str
    processor: str
    """Of a CPU, the instructions that torch uses, such as AVX512; of a GPU, its compute capability."""


@dataclass(frozen=True)
class GridFacts:
    """How multimodal positions follow from the grids of images and videos (export/grid_positions.py)."""

    image_token_id: int
    video_token_id: int | None
    merge_size: int
    """So many patches, in height and in width, are one token."""
    tokens_per_second: float | None
    """By how much the time of a video counts on in a second; None: by one for each step, however long."""
    whole_seconds: bool
    """Whether the length of a step is cut to whole seconds."""
    frames_apart: bool = False
    """Whether each step of a video is numbered as an image is: text stands between them."""


@dataclass(frozen=True)
class ModelFacts:
    """The model the engine was made from."""

    name: str
    dtype: str
    """Such as "float32"."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    visual_token_ids: list[int]
    eos_token_ids: list[int]
    pad_token_id: int
    position_rows: int
    """How many numbers make a token's position: 1, or 3 for multimodal rotary ones."""
    grids: GridFacts | None
    """None: positions are those of text alone."""
    deepstack: int = 0
    """Behind how many of the first layers features are added to visual tokens."""
    blocks: str | None = None
    """One of BLOCK_RULES; None: all tokens are causal."""
    companion: bool = False
    """Whether a token goes along with each prompt (vte_compile/runtime/companion.py). In ONNX graphs it takes the place
    behind the row's last token, which is there in a row's first chunk."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> ModelFacts:
        """From what the file has."""
        grids = fields["grids"]
        return cls(**(fields | {"grids": None if grids is None else GridFacts(**grids)}))

    @property
    def feature_size(self) -> int:
        """Numbers of a visual token: its embedding, and what is added to it behind layers."""
        return self.hidden_size * (1 + self.deepstack)


@dataclass(frozen=True)
class FileFacts:
    """What a file has to be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All about an engine but the numbers."""

    target: str
    built: Built
    model: ModelFacts
    plan: list[dict[str, Any]]
    """``Plan.describe()``; the plan itself, with its fingerprint, is in the folder ``plan``."""
    routed: bool
    """Whether what adapters do depends on the prompt."""
    embedding: str
    """Name of the weight [vocabulary, C] that embeds tokens."""
    vision: VisionCall | None
    vision_missing: str | None
    """Why there is no image encoder."""
    phases: dict[str, PhaseSteps]
    weights: list[str]
    """The safetensors files."""
    files: dict[str, FileFacts]
    """By path, with slashes: all files of the folder but this one."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Manifest:
        """What :func:`decode` gave.

        Raises:
            EngineError: Not a manifest of this target.
        """
        return from_fields(_manifest, body)


def encode(manifest: Any) -> bytes:
    """The file's content, of any target's manifest (a dataclass)."""
    body = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(manifest)}
    return (json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n").encode()


def decode(content: bytes) -> dict[str, Any]:
    """The fields of a manifest; "target" says of which kind.

    Raises:
        EngineError: Damaged, not a manifest, or of another schema.
    """
    try:
        body = json.loads(content)
    except ValueError as error:
        raise EngineError(f"{MANIFEST}: damaged ({error}): {_REMEDY}.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise EngineError(f"{MANIFEST}: not of an engine: pass a folder that vte_compile.export() wrote.")
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{MANIFEST}: schema_version {version!r}, but this vte-compile reads {SCHEMA_VERSION}: export the "
            "model again with this vte-compile, or load the engine with the one that wrote it."
        )
    if body.pop("sha256", None) != _digest(body):
        raise EngineError(f"{MANIFEST}: altered since it was written: {_REMEDY}.")
    return {k: v for k, v in body.items() if k not in ("format", "schema_version")}


def from_fields(build: Callable[[dict[str, Any]], T], body: dict[str, Any]) -> T:
    """A manifest from its fields.

    Raises:
        EngineError: They are not what ``build`` takes.
    """
    try:
        return build(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{MANIFEST}: not of schema {SCHEMA_VERSION} ({error!r}): {_REMEDY}.") from error


def is_manifest(file: Path) -> bool:
    """Whether a file is the manifest of an engine, of whatever version."""
    try:
        body = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and body.get("format") == FORMAT


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest(fields: dict[str, Any]) -> Manifest:
    vision = fields["vision"]
    nested = {
        "built": Built(**fields["built"]),
        "model": ModelFacts.of(fields["model"]),
        "vision": None if vision is None else VisionCall.of(vision),
        "phases": {name: _phase(phase) for name, phase in fields["phases"].items()},
        "files": {path: FileFacts(**facts) for path, facts in fields["files"].items()},
    }
    return Manifest(**(fields | nested))


def _phase(fields: dict[str, Any]) -> PhaseSteps:
    state = [PromptValue(**value) for value in fields["prompt_state"]]
    return PhaseSteps(**(fields | {"steps": [_step(s) for s in fields["steps"]], "prompt_state": state}))


def _step(fields: dict[str, Any]) -> PieceCall | ExitCall | AttendCall:
    if "piece" in fields:
        return PieceCall(**fields)
    if "attend" in fields:
        return AttendCall(**fields)
    gate = fields["gate"]
    return ExitCall(**(fields | {"gate": None if gate is None else GateWeights(**gate)}))
