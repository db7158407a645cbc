"""The config of a published VILA checkpoint: its own config.json, and those of its folders llm, vision_tower and
mm_projector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaConfig

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.vila.folder import LLM, MM_PROJECTOR, VISION_TOWER, checkpoint_folder, load_tokenizer
from vte_compile.families.vila.projector import VilaProjectorConfig, downsampling

MODEL_TYPES = ("llava_llama", "vila")
"""What published checkpoints call themselves: those of the repository, and those with the code beside the weights."""
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<vila/video>"
_TOWERS = ("siglip_vision_model", "clip_vision_model")
_ASPECT_RATIOS = (None, "resize", "pad", "dynamic")
_SELECT = {"patch": "default", "cls_patch": "full"}
"""VILA's names of what is taken of a vision tower's output, and transformers'."""
_ENCODERS = {"image": "BasicImageEncoder", "video": "BasicVideoEncoder"}


class VilaConfig(LlavaConfig):
    """What is in the config files of a VILA checkpoint, in the terms of transformers' LLaVA.

    ``from_pretrained`` and ``save_pretrained`` read and write the published layout. The fields are those of LlavaConfig
    and these:

    Attributes:
        mm_projector_type: ``linear``, ``mlp2x_gelu`` (any depth), ``mlp_downsample``, ``mlp_downsample_2x2_fix`` or
            ``mlp_downsample_3x3_fix``.
        image_aspect_ratio: How images become squares: ``resize``, ``pad``, ``dynamic`` (tiles, of prompts with one
            image), or None (what the image processor does).
        min_tiles, max_tiles: Of ``dynamic``.
        published: The checkpoint's config.json as it was; what it says beyond these fields is kept when saving.
    """

    model_type = "llava_llama"

    mm_projector_type: str = "mlp_downsample"
    image_aspect_ratio: str | None = "resize"
    min_tiles: int = 1
    max_tiles: int = 12
    published: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the layout has its own options
        cls, pretrained_model_name_or_path: Any, **hub: Any
    ) -> VilaConfig:
        """Read the configs of a checkpoint.

        Args:
            pretrained_model_name_or_path: Folder, or hub id.
            hub: Options of ``huggingface_hub.snapshot_download`` (``revision``, ``token`` ...).

        Raises:
            InputError: It is no VILA checkpoint; the message says what is missing.
            UnsupportedModelError: One with parts that are not supported; the message names them.
        """
        folder = checkpoint_folder(pretrained_model_name_or_path, **hub)
        published = _read_json(folder / "config.json")
        _refuse_unknown(folder, published)
        text = AutoConfig.from_pretrained(folder / LLM)
        vision = _vision_config(folder)
        projector = _read_json(folder / MM_PROJECTOR / "config.json")
        layer, feature = published.get("mm_vision_select_layer"), published.get("mm_vision_select_feature") or "patch"
        if feature not in _SELECT:
            raise UnsupportedModelError(
                f"{folder}: mm_vision_select_feature is {feature!r}, expected patch, cls_patch."
            )
        _refuse_unknown_grid(folder, published, vision, projector["mm_projector_type"], feature)
        token = published.get("image_token_id")
        if token is None:
            token = load_tokenizer(folder, (IMAGE_TOKEN, VIDEO_TOKEN)).convert_tokens_to_ids(IMAGE_TOKEN)
        fields: dict[str, Any] = dict(
            vision_config=vision,
            text_config=text,
            image_token_index=token,
            vision_feature_layer=-2 if layer is None else layer,
            vision_feature_select_strategy=_SELECT[feature],
            mm_projector_type=projector["mm_projector_type"],
            image_aspect_ratio=published.get("image_aspect_ratio"),
            min_tiles=published.get("min_tiles") or 1,
            max_tiles=published.get("max_tiles") or 12,
            published=published,
            tie_word_embeddings=text.tie_word_embeddings,
            name_or_path=str(folder),
        )
        config = cls(**fields)
        config.image_seq_length = config.tokens_per_image
        return config

    def save_pretrained(self, save_directory: Any) -> None:  # type: ignore[override]
        """Write config.json, and those of the folders that have none yet: weights are saved with theirs."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = {ours: theirs for theirs, ours in _SELECT.items()}
        written = {
            **(self.published or {"architectures": ["LlavaLlamaModel"], "model_type": self.model_type}),
            "llm_cfg": self.text.to_dict(),
            "vision_tower_cfg": self.vision.to_dict(),
            "mm_projector_cfg": self.projector_config().to_dict(),
            "hidden_size": self.text.hidden_size,
            "mm_hidden_size": self.vision.hidden_size,
            "mm_vision_select_layer": self.vision_feature_layer,
            "mm_vision_select_feature": names[self.vision_feature_select_strategy],
            "image_aspect_ratio": self.image_aspect_ratio,
            "min_tiles": self.min_tiles,
            "max_tiles": self.max_tiles,
            "image_token_id": self.image_token_index,
        }
        (folder / "config.json").write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")
        parts = {LLM: self.text, VISION_TOWER: self.vision, MM_PROJECTOR: self.projector_config()}
        for name, config in parts.items():
            if not (folder / name / "config.json").is_file():
                config.save_pretrained(folder / name)

    def projector_config(self) -> VilaProjectorConfig:
        """The config of the folder mm_projector, with the sizes that it leaves out."""
        return VilaProjectorConfig(
            mm_projector_type=self.mm_projector_type,
            input_size=self.vision.hidden_size,
            output_size=self.text.hidden_size,
        )

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one image, tile or frame."""
        side = self.vision.image_size // self.vision.patch_size
        factor = downsampling(self.mm_projector_type)
        if factor > 1:
            return (-(-side // factor)) ** 2
        has_cls = self.vision.model_type == "clip_vision_model"
        return side * side + has_cls - (self.vision_feature_select_strategy == "default")

    def wrapping(self, medium: str) -> tuple[str | None, str | None]:
        """The texts before and behind the features of each image or frame; None for nothing.

        Args:
            medium: "image" or "video".

        Raises:
            UnsupportedModelError: The checkpoint asks for another encoder than VILA's basic one.
        """
        encoder = (self.published or {}).get(f"{medium}_encoder") or {}
        settings = json.loads(encoder) if isinstance(encoder, str) else encoder
        kind = str(settings.get("_target_", _ENCODERS[medium])).rpartition(".")[2]
        if kind != _ENCODERS[medium] or settings.keys() - {"_target_", "start_tokens", "end_tokens"}:
            raise UnsupportedModelError(f"{medium}_encoder {settings}: only {_ENCODERS[medium]} is supported so far.")
        return settings.get("start_tokens"), settings.get("end_tokens", "\n")

    @property
    def text(self) -> Any:
        """The decoder's config."""
        return self.text_config

    @property
    def vision(self) -> Any:
        """The vision tower's config."""
        return self.vision_config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such file. A VILA checkpoint has config.json and the folders {LLM}, {VISION_TOWER} "
            f"and {MM_PROJECTOR}, each with its own config.json and weights."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(read).__name__}.")
    return read


def _vision_config(folder: Path) -> Any:
    kind = _read_json(folder / VISION_TOWER / "config.json").get("model_type")
    if kind not in _TOWERS:
        raise UnsupportedModelError(
            f"{folder / VISION_TOWER}: model_type is {kind!r}: only {' and '.join(_TOWERS)} are supported so far."
        )
    return AutoConfig.from_pretrained(folder / VISION_TOWER)


def _refuse_unknown_grid(folder: Path, published: dict[str, Any], vision: Any, projector: str, feature: str) -> None:
    """What would fail, or be wrong, at the first image."""
    has_class = vision.model_type == "clip_vision_model"
    if downsampling(projector) > 1 and has_class != (feature == "patch"):
        raise UnsupportedModelError(
            f"{folder}: {projector} wants a square of patches, which a {vision.model_type} with "
            f"mm_vision_select_feature {feature!r} does not give."
        )
    if (resolution := published.get("vision_resolution")) not in (None, -1, vision.image_size):
        raise UnsupportedModelError(
            f"{folder}: vision_resolution is {resolution}, the vision tower's image_size {vision.image_size}: position "
            "embeddings are not interpolated so far."
        )


def _refuse_unknown(folder: Path, published: dict[str, Any]) -> None:
    where = folder / "config.json"
    if (kind := published.get("model_type")) not in MODEL_TYPES:
        raise InputError(f"{where}: model_type is {kind!r}, which is not VILA's ({', '.join(MODEL_TYPES)}).")
    if asked := [name for name in ("s2", "dynamic_s2", "ps3") if published.get(name)]:
        raise UnsupportedModelError(f"{where}: {', '.join(asked)}: images at several scales are not supported so far.")
    if (ratio := published.get("image_aspect_ratio")) not in _ASPECT_RATIOS:
        known = ", ".join(map(str, _ASPECT_RATIOS))
        raise UnsupportedModelError(f"{where}: image_aspect_ratio is {ratio!r}: only {known} are supported so far.")
