"""VILA: transformers' vision tower and decoder with VILA's projector between them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaModel

from vte_compile.errors import InputError
from vte_compile.families.placeholder_model import PlaceholderModel
from vte_compile.families.vila.config import IMAGE_TOKEN, VIDEO_TOKEN, VilaConfig
from vte_compile.families.vila.folder import LLM, MM_PROJECTOR, VISION_TOWER, load_tokenizer, stop_token_ids
from vte_compile.families.vila.projector import VilaProjector

_HUB = frozenset("revision token cache_dir local_files_only force_download".split())


class VilaModel(PlaceholderModel):
    """VILA without the language-modelling head."""

    config: VilaConfig

    def __init__(self, config: VilaConfig) -> None:
        super(LlavaModel, self).__init__(config)  # its projector is another one
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector: Any = VilaProjector(config.projector_config())
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, tokens, C]: the layer that the config selects, projected."""
        tower = self.vision_tower
        states = tower(pixel_values.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
        features = states[self.config.vision_feature_layer]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        projected: Tensor = self.multi_modal_projector(features)
        return projected


class VilaForConditionalGeneration(LlavaForConditionalGeneration):
    """VILA 1.5 and NVILA (NVlabs/VILA): SigLIP or CLIP, a projector of VILA's, a causal language model.

    Loads and saves the published layout: config.json, and the folders llm, vision_tower and mm_projector. What goes in
    and out is as in transformers' LlavaForConditionalGeneration; VilaProcessor makes ``input_ids`` [B, T], with one
    placeholder per visual token, and ``pixel_values`` [images of all rows, 3, height, width].

    The vocabulary stays as it is in the checkpoint (the authors' loader resizes it to the tokenizer's). Padding tokens
    may be on either side.
    """

    config_class = VilaConfig
    config: VilaConfig

    def __init__(self, config: VilaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = VilaModel(config)
        text: Any = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the layout has its own options
        cls, pretrained_model_name_or_path: Any, *, dtype: Any = "auto", **options: Any
    ) -> VilaForConditionalGeneration:
        """Load a checkpoint in its published layout, in eval mode.

        Weights are read from safetensors, or from pytorch_model*.bin without running pickled code.

        Args:
            pretrained_model_name_or_path: Folder, or hub id.
            dtype: Of all weights; "auto": the type that those of the decoder have.
            options: Of ``huggingface_hub.snapshot_download`` (``revision``, ``token`` ...), and of transformers'
                from_pretrained for each of the three parts (``attn_implementation``, ``device_map`` ...).

        Raises:
            InputError: It is no such checkpoint, or weights are missing in it; the message says what is missing.
            UnsupportedModelError: It has parts that are not supported.
        """
        hub = {name: options.pop(name) for name in _HUB & options.keys()}
        config: Any = VilaConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        folder = Path(config.name_or_path)
        llm = _load(AutoModelForCausalLM, folder / LLM, dtype=dtype, config=config.text_config, **options)
        options["dtype"] = llm.dtype
        tower = _load(AutoModel, folder / VISION_TOWER, config=config.vision_config, **options)
        projector = _load(VilaProjector, folder / MM_PROJECTOR, config=config.projector_config(), **options)
        with torch.device("meta"):
            model = cls(config)
        model.model.language_model, model.lm_head = llm.model, llm.lm_head
        model.model.vision_tower, model.model.multi_modal_projector = tower, projector
        model.generation_config = llm.generation_config
        _stop_behind_answers(model.generation_config, folder)
        return model.eval()

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """Write the published layout (VilaProcessor.save_pretrained writes tokenizer and image processor into it).

        Args:
            save_directory: Folder.
            options: Of transformers' save_pretrained, for each of the three parts (``max_shard_size`` ...).

        Raises:
            InputError: Options that do not fit parts (``state_dict``, ``push_to_hub``).
        """
        if refused := options.keys() & {"state_dict", "push_to_hub"}:
            raise InputError(
                f"save_pretrained: {', '.join(sorted(refused))}: not possible for a model of three folders."
            )
        folder = Path(save_directory)
        with torch.device("meta"):
            llm: Any = AutoModelForCausalLM.from_config(self.config.text_config)
        llm.model, llm.lm_head = self.model.language_model, self.lm_head
        llm.generation_config = self.generation_config
        llm.save_pretrained(folder / LLM, **options)
        self.model.vision_tower.save_pretrained(folder / VISION_TOWER, **options)
        self.model.multi_modal_projector.save_pretrained(folder / MM_PROJECTOR, **options)
        self.config.save_pretrained(folder)


def _load(auto: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """One part. transformers only warns of missing weights, which it fills at random."""
    try:
        model, loaded = auto.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        raise InputError(f"{folder}: its weights cannot be read: {error}") from error
    problems = {kind: sorted(map(str, loaded[f"{kind}_keys"])) for kind in ("missing", "mismatched")}
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names)
        raise InputError(f"{folder}: its weights do not fit its config.json: {found}")
    return model


def _stop_behind_answers(generation: Any, folder: Path) -> None:
    """Let generation stop where the checkpoint's chat template ends an answer, besides where its config says."""
    given = generation.eos_token_id
    ids = [] if given is None else given if isinstance(given, list) else [given]
    tokenizer = load_tokenizer(folder, (IMAGE_TOKEN, VIDEO_TOKEN))
    generation.eos_token_id = list(dict.fromkeys([*ids, *stop_token_ids(tokenizer)]))
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
