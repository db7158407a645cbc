"""An ONNX engine of each multimodal family gives the numbers and tokens of the oracle: the staged form, all pieces.

LLaVA-1.5's in both forms, and all else, is in test_ort_engine.py, Qwen2.5-VL's in test_multimodal_engines.py, and
those whose decoders are more than causal are in test_ort_decoders.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import thorough
from test_families import EXITS, handed_over, optimized, oracle_of
from tiny_families import family_inputs, tiny_family
from tiny_models import one_thread, plan  # noqa: F401

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.export.ort_engine import OnnxEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("llava_next", "idefics3")
FURTHER = ("llava_onevision", "internvl", "qwen2_vl", "vipllava", "mistral3", "smolvlm", "llava_mixtral")
TOKENS = 16


def exportable(name: str) -> Any:
    """Engines have no grouped products for experts."""
    if name != "llava_mixtral":
        return optimized(name, "natural")
    model = tiny_family(name)
    model.set_experts_implementation("batched_mm")
    return optimize(model, plan(*EXITS["natural"]), compile=False)


@pytest.mark.shows("ONNX Runtime")
@pytest.mark.parametrize("name", [*NAMES, *map(thorough, FURTHER)])
def test_engine_is_the_oracle(name: str, tmp_path: Path, record_property: Any) -> None:
    """Two images, none and one in a batch that leaves behind different layers."""
    folder = vte_compile.export(exportable(name), tmp_path / "e", target="onnxruntime", forms=("staged",))
    engine = load_engine(folder, threads=1)
    assert isinstance(engine, OnnxEngine)
    inputs = family_inputs(name, images=[2, 0, 1], seed=1)
    prompt = handed_over(name, inputs)
    given = inputs
    if (why := engine.manifest.vision_missing) is not None:
        record_property("note", f"visual tokens given as `image_features`: {why}")
        features = prompt["inputs_embeds"][prompt["visual_mask"]]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"image_features": features}
    oracle = oracle_of(name, "natural")
    want, got = oracle.forward(**prompt), engine.prefill(**given)
    np.testing.assert_allclose(got.logits, want.logits[:, -1], rtol=1e-4, atol=1e-4)
    answer = engine.generate(**given, max_new_tokens=TOKENS, eos_token_ids=[])
    known = oracle.generate(**prompt, max_new_tokens=TOKENS)
    assert answer.tokens.tolist() == known.tokens
    assert answer.exit_layer.tolist() == known.exit_layer.tolist() == want.exit_layer.tolist()
