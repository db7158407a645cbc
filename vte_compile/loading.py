"""Models, processors and prompts from a checkpoint, for the command line and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vte_compile.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(name: str | Path, device: str | None = None) -> PreTrainedModel:
    """Load a causal language model or MLLM in eval mode, from a folder or the hub.

    Args:
        name: Folder or hub id.
        device: Such as "cuda"; None: a GPU if there is one.

    Raises:
        InputError: There is no such checkpoint, it is no such model, or the device is not there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from vte_compile.families.own import own_family

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise InputError(f"device {device!r}: {_first_line(error)}") from error
    if family := own_family(name):
        own: PreTrainedModel = family.load_model(name)
        return own.eval().to(device)
    try:
        config = AutoConfig.from_pretrained(name)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = auto.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "" if Path(name).is_dir() else "no such folder, and no such model on the hub: "
        raise InputError(f"{name}: {where}{_first_line(error)}") from error
    return model.eval().to(device)


def as_dtype(model: PreTrainedModel, dtype: str | None) -> PreTrainedModel:
    """The model with weights of a type; None: as it is.

    Raises:
        InputError: There is no such type.
    """
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in kinds:
        raise InputError(f"dtype: expected one of {', '.join(kinds)}, got {dtype!r}.")
    moved: Any = model
    return model if dtype is None else moved.to(kinds[dtype])


def load_processor(name: str | Path) -> Any:
    """Load a model's processor, or the tokenizer of a language model alone.

    Raises:
        InputError: There is none, or a package it needs is missing.
    """
    from transformers import AutoProcessor

    from vte_compile.families.own import own_processor

    if load := own_processor(name):
        return load(name)
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: no processor or tokenizer: {_first_line(error)}") from error


def prompt(processor: Any, text: str, images: int = 0) -> str:
    """A question as the model expects it: through the chat template if there is one, else behind image placeholders.

    Raises:
        InputError: Images for a model that takes none.
    """
    from transformers import PreTrainedTokenizerBase

    if images and not hasattr(processor, "image_processor"):
        raise InputError("the model takes no images: its checkpoint has a tokenizer and no image processor.")
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        content = text if isinstance(processor, PreTrainedTokenizerBase) else parts
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    token = getattr(processor, "image_token", None) or "<image>"
    return text if not images or token in text else f"{token}\n" * images + text


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
