"""What lmms-eval finds under its entry point group ``lmms_eval.models``: the model ``vte_compile``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ModelManifest of the model; only lmms-eval calls this, so only then it has to be there."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vte_compile", chat_class_path="vte_compile.tuning.lmms_eval_model.OptimizedChatModel"
    )
