"""What all optimized models have in common: they are for inference."""

from __future__ import annotations

from typing import Any

from vte_compile.errors import InputError


class InferenceOnly:
    """A mixin for classes that derive from a model's own class, too."""

    def train(self, mode: bool = True) -> Any:
        """Only ``train(False)``.

        Raises:
            InputError: An optimized model is for inference.
        """
        if mode:
            raise InputError("An optimized model is for inference: train the model it was made from.")
        return super().train(mode)  # type: ignore[misc]
