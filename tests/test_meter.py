"""METER: its checkpoints in the authors' layout, its encoders, and optimize() of its co-attention layers.

data/meter.npz holds what the authors' METERTransformerSS (zdou0830/METER, run aside with transformers 4.46.3 in
float32, its Lightning base class and metrics replaced by plain modules) gives for the weights and three inputs of
tests/tiny_meter.py: logits for each head, and, for VQAv2, features of both sides and what is pooled of them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bridgetower import random_part
from tiny_meter import GRID, PATCH, C, inputs, save, weights
from tiny_models import DATA, assert_relative
from torch.nn import functional as F

import vte_compile
from vte_compile import Plan
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.meter import load_meter, read_meter_checkpoint
from vte_compile.families.meter.checkpoint import HEADS
from vte_compile.oracle.co_attention import co_attention_oracle


def run(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


LABELS = {"vqa_classifier": 7, "nlvr2_classifier": 2, "snli_classifier": 3, "rank_output": 1}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.shows("images", "meter")
def test_logits_are_the_authors(head: str, tmp_path: Path) -> None:
    model = load_meter(save(tmp_path / "meter.ckpt", weights(head, LABELS[head])))
    given = inputs(batch=3, images=2 if head == "nlvr2_classifier" else 1)
    with np.load(DATA / "meter.npz") as data:
        golden = {key: torch.from_numpy(data[key]) for key in data.files}
    assert_relative(run(model, **given), golden[f"{head}.logits"])
    if head == "vqa_classifier":
        fast = vte_compile.optimize(model, Plan(), compile=False)
        assert_relative(run(fast, **given), golden[f"{head}.logits"])
        with torch.no_grad():
            output = fast.meter(**given)
        real = given["attention_mask"].bool()
        assert_relative(output.text_features[real], golden["text_features"][real])
        assert_relative(output.image_features, golden["image_features"])
        assert_relative(output.pooler_output, golden["pooled"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.shows("skips", "meter")
def test_optimized_model_gives_the_oracles_numbers(head: str, tmp_path: Path) -> None:
    model = load_meter(save(tmp_path / "meter.ckpt", weights(head)))
    assert type(model) is HEADS[head]
    given = inputs(images=2 if head == "nlvr2_classifier" else 1)
    parts = [
        random_part("text", 0, skip_self=True, hidden_size=C),
        random_part("image", 0, skip_self=True, skip_cross=True, hidden_size=C),
        random_part("image", 1, skip_cross=True, adapters=False),
    ]
    plan = Plan(co_attention=parts)
    fast = vte_compile.optimize(model, plan, compile=False)
    expected = run(co_attention_oracle(model, plan), **given)
    torch.testing.assert_close(run(fast, **given), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - run(model, **given)).abs().max()) > 1e-3
    lossless = run(vte_compile.optimize(model, Plan(), compile=False), **given)
    torch.testing.assert_close(lossless, run(model, **given), rtol=1e-4, atol=1e-5)
    kept = [name for name in dict(fast.named_parameters()) if "cross_modal_image_layers.1.crossattention" in name]
    assert {name.split("crossattention.")[1] for name in kept} == {"output.LayerNorm.weight", "output.LayerNorm.bias"}


def test_image_encoder_is_clips(tmp_path: Path) -> None:
    """Against the formulas, on the authors' weights: pre-norm blocks, quick GELU, all tokens normed."""
    w = weights("")
    model = load_meter(save(tmp_path / "meter.ckpt", w))
    pixels, v = inputs()["pixel_values"], "vit_model.visual."

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(pixels, w[f"{v}conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{v}class_embedding"].expand(len(x), 1, C), x], 1) + w[f"{v}positional_embedding"]
    x = norm(x, f"{v}ln_pre")
    for i in range(2):
        b = f"{v}transformer.resblocks.{i}."
        qkv = F.linear(norm(x, f"{b}ln_1"), w[f"{b}attn.in_proj_weight"], w[f"{b}attn.in_proj_bias"])
        q, k, value = (part.unflatten(-1, (C // 64, 64)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = ((q @ k.transpose(2, 3) / 8).softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, w[f"{b}attn.out_proj.weight"], w[f"{b}attn.out_proj.bias"])
        h = F.linear(norm(x, f"{b}ln_2"), w[f"{b}mlp.c_fc.weight"], w[f"{b}mlp.c_fc.bias"])
        x = x + F.linear(h * torch.sigmoid(1.702 * h), w[f"{b}mlp.c_proj.weight"], w[f"{b}mlp.c_proj.bias"])
    with torch.no_grad():
        got = model.vit_model(pixels)
    torch.testing.assert_close(got, norm(x, f"{v}ln_post"), rtol=1e-4, atol=1e-4)


def test_padding_does_not_matter(tmp_path: Path) -> None:
    model, given = load_meter(save(tmp_path / "meter.ckpt", weights())), inputs(padded=2)
    alone = {name: tensor[-1:, :5] if tensor.ndim == 2 else tensor[-1:] for name, tensor in given.items()}
    torch.testing.assert_close(run(model, **given)[-1:], run(model, **alone), rtol=1e-4, atol=1e-5)


def test_another_image_size(tmp_path: Path) -> None:
    path = save(tmp_path / "meter.ckpt", weights(""))
    model = load_meter(path, image_size=5 * PATCH)
    assert model.vit_model.embeddings.position_embedding.weight.shape == (26, C)
    old = weights("")["vit_model.visual.positional_embedding"]
    assert torch.equal(model.vit_model.embeddings.position_embedding.weight[0], old[0])
    with pytest.raises(InputError, match="image_size: expected a multiple of the patch size 4, got 13"):
        load_meter(path, image_size=GRID * PATCH + 1)


def test_save_and_load(tmp_path: Path) -> None:
    model, given = load_meter(save(tmp_path / "meter.ckpt", weights())), inputs()
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(run(again, **given), run(model, **given))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["VTE_TEST_EVIL"],)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTE_TEST_EVIL", str(tmp_path / "evil"))
    path = save(tmp_path / "meter.ckpt", weights(), evil=Evil())
    with suppress(InputError):  # whether the file is refused, or read without what the code would have made
        read_meter_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_what_is_no_checkpoint_of_meter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meter.ckpt"
    with pytest.raises(InputError, match="no such file"):
        load_meter(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot read it"):
        load_meter(path)
    w = weights()
    for change, error, message in (
        ({"extra.weight": torch.zeros(1)}, InputError, "has also meter.extra.weight"),
        ({"snli_classifier.3.weight": torch.zeros(3, 2)}, InputError, "has several heads"),
        ({"cross_modal_text_pooler.dense.bias": torch.zeros(3)}, InputError, "expected shape"),
        ({"vit_model.visual.conv1.weight": None}, UnsupportedModelError, "not CLIP's"),
        ({"token_type_embeddings.weight": None}, InputError, "lacks token_type_embeddings.weight"),
        ({"cross_modal_text_pooler.dense.bias": None}, InputError, "lacks meter.cross_modal_text_pooler.dense.bias"),
    ):
        changed = {name: tensor for name, tensor in {**w, **change}.items() if tensor is not None}
        with pytest.raises(error, match=message):
            load_meter(save(path, changed))
