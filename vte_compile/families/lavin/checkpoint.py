"""Read the files that LaVIN's code writes (luogen1996/LaVIN, LaVIN-EAS of DoubtedSteam/EAS), and what is made of them.

Such a file holds what was trained: the adapters of CLIP and LLaMA, the projector, and the embeddings of the "modality"
token. CLIP and LLaMA themselves come from elsewhere.

The modality token stands in front of each prompt, one embedding for prompts with an image and one for those without. It
attends to itself, and no other token attends to it. LaVIN's routers read nothing but it, so what they say in each layer
depends on which of the two it is, and is computed here once. LaVIN-EAS's read the prompt, and it is in the means that
stand in for skipped attentions: there it is the plan's companion token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from vte_compile.adapters import StaticRouter
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.lavin.configuration import LavinConfig
from vte_compile.families.lavin.modeling import LavinForConditionalGeneration, LavinProjector, LavinVisionModel
from vte_compile.families.torch_file import Inert, read_torch_file
from vte_compile.oracle.blocks import planned_blocks
from vte_compile.plan import KeptAdapter, Plan

_MODALITIES = "adapter_modality_embedding.weight"
_VISION = re.compile(r"backbone\.visual\.transformer\.resblocks\.(\d+)\.adapter_attn\.(.+)")
_PROJECTOR = "adapter_proj."
_LLAMA = re.compile(r"layers\.\d+\.(adapter_attn|replaced_adapter)\..+")
_EVERY = 4
"""The class token behind each fourth layer of CLIP becomes a visual token."""


@dataclass(frozen=True)
class LavinCheckpoint:
    """What a file of LaVIN's holds."""

    path: Path
    state_dict: dict[str, Tensor]
    """By the authors' names, without the ``module.`` of several processes."""
    settings: dict[str, Any]
    """The authors' settings of the training run, such as ``adapter_scale``; empty if the file has none."""

    @property
    def is_eas(self) -> bool:
        """Whether it is LaVIN-EAS's: with adapters in place of attentions."""
        return any(".replaced_adapter." in key for key in self.state_dict)

    @property
    def scale(self) -> float:
        """Of all adapters; 1 unless the settings say else."""
        return float(self.settings.get("adapter_scale", 1.0))

    @property
    def temperature(self) -> float:
        """Of all routers; 10 unless the settings say else."""
        return float(self.settings.get("temperature", 10.0))


def read_lavin_checkpoint(path: str | Path) -> LavinCheckpoint:
    """Read a .pth file; tensors are mapped from it, not copied, and no code of it runs.

    Raises:
        InputError: There is no such file, or it is no checkpoint of a LaVIN.
        UnsupportedModelError: It has adapters of a form that is not supported.
    """
    path = Path(path)
    content = read_torch_file(path, "a checkpoint of LaVIN's adapters, such as checkpoint-19.pth")
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"{path}: holds no 'model' of tensors: expected a checkpoint that LaVIN's train.py wrote")
    state_dict = {key.replace("module.", ""): tensor for key, tensor in weights.items()}
    for key in state_dict:
        if ".adapter_mlp." in key:
            raise UnsupportedModelError(f"{path}: {key}: adapters in front of MLPs are not supported")
        known = _VISION.fullmatch(key) or _LLAMA.fullmatch(key)
        if not known and not key.startswith(_PROJECTOR) and key != _MODALITIES:
            raise InputError(f"{path}: {key}: nothing that LaVIN's adapters have")
    for name in (_MODALITIES, f"{_PROJECTOR}conv_A.weight", f"{_PROJECTOR}conv_B.weight"):
        if name not in state_dict:
            raise InputError(f"{path}: no checkpoint of a LaVIN, lacks {name}")
    arguments = content.get("args")
    settings = arguments.state if isinstance(arguments, Inert) else arguments
    return LavinCheckpoint(path, state_dict, settings if isinstance(settings, dict) else {})


def load_lavin(
    llama: LlamaForCausalLM | str | Path,
    clip: CLIPVisionModel | str | Path,
    checkpoint: LavinCheckpoint | str | Path,
    **options: Any,
) -> LavinForConditionalGeneration:
    """A LaVIN in eval mode, in LLaMA's dtype, without the adapters of LLaMA: those are a plan's.

    Args:
        llama: LLaMA or Vicuna in transformers' layout, loaded, or its folder or hub id. The model becomes a part of
            what is returned.
        clip: CLIP ViT-L/14 likewise, such as openai/clip-vit-large-patch14.
        checkpoint: A file of LaVIN's adapters, or what was read from it.
        options: Of transformers' ``from_pretrained``, for both (``dtype``, ``local_files_only`` ...).

    Raises:
        InputError: Parts do not go together; the message says which.
        UnsupportedModelError: The file has adapters of a form that is not supported.
    """
    if not isinstance(checkpoint, LavinCheckpoint):
        checkpoint = read_lavin_checkpoint(checkpoint)
    if isinstance(llama, str | Path):
        llama = LlamaForCausalLM.from_pretrained(llama, **options)
    if isinstance(clip, str | Path):
        clip = CLIPVisionModel.from_pretrained(clip, **options)
    config = _config(checkpoint, llama, clip)
    with torch.device("meta"):
        model = LavinForConditionalGeneration(config)
    inner: Any = model.model
    inner.language_model, model.lm_head = llama.model, llama.lm_head
    tower = {**dict(_clip_weights(clip, max(config.feature_layers))), **dict(_vision_adapters(checkpoint))}
    inner.vision_tower = _filled(LavinVisionModel(config), tower, checkpoint).to(llama.device, llama.dtype)
    projector = {
        key.removeprefix(_PROJECTOR): tensor
        for key, tensor in checkpoint.state_dict.items()
        if key.startswith(_PROJECTOR)
    }
    inner.multi_modal_projector = _filled(LavinProjector(config), projector, checkpoint).to(llama.device, llama.dtype)
    model.generation_config = llama.generation_config
    return model.eval()


@torch.no_grad()
def lavin_plan(
    model: LavinForConditionalGeneration,
    checkpoint: LavinCheckpoint | str | Path,
    *,
    image: bool = True,
    skip: Iterable[int] = (),
) -> Plan:
    """LaVIN's or LaVIN-EAS's adapters of LLaMA, for prompts with an image, or for those without.

    LaVIN's routers are static in the plan, so optimize() folds the adapters into LLaMA's weights. LaVIN-EAS's plans
    have the modality token as companion token, which is all that differs between prompts with an image and without.

    Args:
        model: From :func:`load_lavin`: the modality token goes through its layers.
        checkpoint: A file of LaVIN's adapters, or what was read from it.
        image: Whether prompts have an image.
        skip: The layers whose attentions LaVIN-EAS was trained to skip.

    Raises:
        InputError: LaVIN-EAS without `skip`, or LaVIN with it; a modality token of another hidden size.
        PlanError: Half an adapter, or one of another form.
    """
    if not isinstance(checkpoint, LavinCheckpoint):
        checkpoint = read_lavin_checkpoint(checkpoint)
    skip = sorted(skip)
    if checkpoint.is_eas and not skip:
        raise InputError(f"{checkpoint.path}: of LaVIN-EAS: pass skip, the layers that it was trained to skip")
    if skip and not checkpoint.is_eas:
        raise InputError(f"{checkpoint.path}: of LaVIN, which skips no attention: leave skip out")
    decoder: Any = model.model.language_model
    token = checkpoint.state_dict[_MODALITIES]
    size = decoder.config.hidden_size
    if list(token.shape) != [2, size]:
        raise InputError(f"{checkpoint.path}: {_MODALITIES}: expected shape {[2, size]}, got {list(token.shape)}")
    read = Plan.from_eas_checkpoint(checkpoint.state_dict, skip, checkpoint.temperature, checkpoint.scale)
    read.check(model)
    if checkpoint.is_eas:
        return replace(read, companion=token[int(image)].clone())
    hidden = token[int(image)].to(decoder.device, decoder.dtype)[None, None]
    at_zero = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    rotation = decoder.rotary_emb(hidden, at_zero)
    static: dict[int, StaticRouter] = {}
    # A prompt of this token alone: it attends to itself, and its mean is what it is.
    for index, block in enumerate(planned_blocks(decoder.layers, read)):
        hidden, known = block(hidden, None, position_embeddings=rotation, attention_mask=None)
        if known is not None:
            first, second = known.weights[0].tolist()
            static[index] = StaticRouter((first, second))
    return Plan(
        adapters=[KeptAdapter(kept.layer, replace(kept.adapter, router=static[kept.layer])) for kept in read.adapters]
    )


def _config(checkpoint: LavinCheckpoint, llama: LlamaForCausalLM, clip: CLIPVisionModel) -> LavinConfig:
    weights, layers = checkpoint.state_dict, int(clip.config.num_hidden_layers)
    if layers < _EVERY:
        raise InputError(f"clip: expected at least {_EVERY} layers, got {layers}")
    found = {int(match[1]) for key in weights if (match := _VISION.fullmatch(key))}
    width, groups = 0, 2
    if found:
        prefix = f"backbone.visual.transformer.resblocks.{min(found)}.adapter_attn.conv_"
        if f"{prefix}D.weight" not in weights:
            raise UnsupportedModelError(
                f"{checkpoint.path}: CLIP's adapters have no experts (visual_adapter_type 'normal'): only those of "
                "'router' are supported"
            )
        width = len(weights[f"{prefix}A.weight"])
        groups = max(1, width // weights[f"{prefix}B.weight"].shape[1])
    return LavinConfig(
        text_config=llama.config,
        vision_config=clip.config,
        feature_layers=list(range(_EVERY, layers + 1, _EVERY)),
        projector_width=len(weights[f"{_PROJECTOR}conv_A.weight"]),
        adapter_width=width,
        adapter_groups=groups,
        adapter_scale=checkpoint.scale,
        adapter_temperature=checkpoint.temperature,
        adapter_routing="patches" if checkpoint.is_eas else "token",
    )


def _clip_weights(clip: CLIPVisionModel, layers: int) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in clip.state_dict().items():
        name = key.removeprefix("vision_model.").replace("encoder.layers.", "layers.")
        layer = re.match(r"layers\.(\d+)\.", name)
        if not name.startswith("post_layernorm.") and (layer is None or int(layer[1]) < layers):
            yield name, tensor


def _vision_adapters(checkpoint: LavinCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in checkpoint.state_dict.items():
        if match := _VISION.fullmatch(key):
            yield f"layers.{match[1]}.adapter_attn.{match[2]}", tensor


def _filled(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: LavinCheckpoint) -> nn.Module:
    there = module.state_dict()
    for what, keys in (("lacks", there.keys() - weights.keys()), ("has also", weights.keys() - there.keys())):
        if keys:
            raise InputError(f"{checkpoint.path}: with this CLIP it {what} {', '.join(sorted(keys)[:3])}")
    for key, tensor in there.items():
        if tensor.shape != weights[key].shape:
            raise InputError(
                f"{checkpoint.path}: {key}: expected shape {list(tensor.shape)} to go with CLIP and LLaMA, got "
                f"{list(weights[key].shape)}"
            )
    module.load_state_dict(weights)
    return module
