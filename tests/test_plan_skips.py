"""Plans with skipped attentions and adapters: construction, files, fit to a model, the EAS authors' checkpoints."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import edit, put_tensors, setter
from tiny_models import DATA, LAYERS, C, gate, random_adapter, tiny

from vte_compile import GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit
from vte_compile.adapters import PIA, PlainAdapter, Router, StaticRouter
from vte_compile.errors import PlanError, PlanMismatchError
from vte_compile.fingerprint import Fingerprint


def skip(layer: int, **options: Any) -> SkippedAttention:
    return SkippedAttention(layer, random_adapter(PIA, layer, **options))


def kept(layer: int, **options: Any) -> KeptAdapter:
    return KeptAdapter(layer, random_adapter(PlainAdapter, layer, **options))


def full_plan() -> Plan:
    """Every kind of part."""
    static = StaticRouter((0.25, 0.75))
    return Plan(
        [gate(1)],
        skips=[skip(3, width=4, dtype=torch.bfloat16), SkippedAttention(2), skip(0, router=static)],
        adapters=[kept(5, router=static), kept(1)],
        companion=torch.linspace(-1, 1, C),
    )


def assert_same_adapter(mine: PIA | PlainAdapter | None, theirs: PIA | PlainAdapter | None) -> None:
    assert type(mine) is type(theirs)
    if mine is None or theirs is None:
        return
    assert repr(mine) == repr(theirs)
    tensors = []
    for adapter in (mine, theirs):
        parts = [tensor for part in adapter.projections().values() for tensor in (part.weight, part.bias)]
        router = adapter.router
        tensors.append(parts + ([router.weight, router.bias] if isinstance(router, Router) else []))
    for left, right in zip(*tensors, strict=True):
        assert (left is None and right is None) or (left.dtype == right.dtype and torch.equal(left, right))


def assert_same(mine: Plan, theirs: Plan) -> None:
    assert mine.describe() == theirs.describe()
    for left, right in zip([*mine.skips, *mine.adapters], [*theirs.skips, *theirs.adapters], strict=True):
        assert_same_adapter(left.adapter, right.adapter)
    assert (mine.companion is None) == (theirs.companion is None)
    if mine.companion is not None and theirs.companion is not None:
        assert torch.equal(mine.companion, theirs.companion)


# Construction


def test_plan_sorts_describes_and_shows_itself() -> None:
    plan = full_plan()
    assert plan.describe() == [
        {"layer": 1, "kind": "gate", "threshold": 0.0, "width": 16},
        {"layer": 0, "kind": "skip", "threshold": None, "width": 6},
        {"layer": 2, "kind": "skip", "threshold": None, "width": None},
        {"layer": 3, "kind": "skip", "threshold": None, "width": 4},
        {"layer": 1, "kind": "adapter", "threshold": None, "width": 6},
        {"layer": 5, "kind": "adapter", "threshold": None, "width": 6},
    ]
    assert repr(Plan([StaticExit(1)], skips=[SkippedAttention(2)], adapters=[kept(0)])) == (
        "Plan(StaticExit(layer=1), SkippedAttention(layer=2, adapter=None), KeptAdapter(layer=0, adapter="
        "PlainAdapter(width=6, router=Router(temperature=2), scale=0.7, groups=2)); for any model)"
    )
    assert type(SkippedAttention(np.int64(3)).layer) is int


SMALL = {"hidden_size": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skips": 3}, "skips: expected a sequence, got int"),
        ({"skips": [3]}, r"skips\[0\]: expected a SkippedAttention, got int"),
        ({"adapters": [SkippedAttention(1)]}, r"adapters\[0\]: expected a KeptAdapter, got SkippedAttention"),
        ({"skips": [skip(2), SkippedAttention(2)]}, r"skips\[1\]\.layer: layer 2 already has skips\[0\]"),
        ({"adapters": [kept(2), kept(1), kept(2)]}, r"adapters\[2\]\.layer: layer 2 already has adapters\[1\]"),
        (
            {"skips": [SkippedAttention(1), skip(2)], "adapters": [kept(2)]},
            r"adapters\[0\]\.layer: the attention of layer 2 is skipped, by skips\[1\]; remove one of the two",
        ),
        ({"skips": [skip(0), skip(1, **SMALL)]}, r"skips\[1\]\.adapter: is for hidden size 8, but skips\[0\]\.adapter"),
        (
            {"exits": [gate(0)], "adapters": [kept(1, **SMALL)]},
            r"adapters\[0\]\.adapter: is for hidden size 8, but exits\[0\]\.w1 for 32",
        ),
        (
            {"skips": [skip(4)], "fingerprint": Fingerprint("llama", 4, C, 50)},
            r"skips\[0\]\.layer: 4 is out of range: the decoder has 4 layers \(0\.\.3\)",
        ),
        (
            {"adapters": [kept(4)], "fingerprint": Fingerprint("llama", 4, C, 50)},
            r"adapters\[0\]\.layer: 4 is out of range",
        ),
    ],
)
def test_bad_plan_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SkippedAttention, (-1,), "layer: must be 0 or more, got -1"),
        (SkippedAttention, (0, kept(0).adapter), "adapter: expected a PIA or None, got PlainAdapter"),
        (KeptAdapter, (True, kept(0).adapter), "layer: expected an integer, got bool"),
        (KeptAdapter, (0, None), "adapter: expected a PlainAdapter, got NoneType"),
    ],
)
def test_bad_part_is_refused(kind: type, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        kind(*arguments)


def test_widths_and_layers_are_checked_against_the_model() -> None:
    model = tiny()
    Plan(skips=[skip(0)], adapters=[kept(3)]).check(model)
    with pytest.raises(PlanMismatchError, match=r"^skips\[0\]\.layer: 4 is out of range"):
        Plan(skips=[SkippedAttention(LAYERS)]).check(model)
    with pytest.raises(PlanMismatchError, match=r"^adapters\[0\]\.layer: 4 is out of range"):
        Plan(adapters=[kept(LAYERS)]).check(model)
    with pytest.raises(PlanMismatchError, match=r"^skips\[0\]\.adapter: is for hidden size 8, but the decoder's is 32"):
        Plan(skips=[skip(0, **SMALL)]).check(model)
    with pytest.raises(PlanMismatchError, match=r"^adapters\[0\]\.adapter: is for hidden size 8"):
        Plan(adapters=[kept(0, **SMALL)]).check(model)


# Files


def test_round_trip(tmp_path: Path) -> None:
    full_plan().save_pretrained(tmp_path)
    assert_same(Plan.from_pretrained(tmp_path), full_plan())


def test_files_of_version_3_are_read(tmp_path: Path) -> None:
    plan = replace(full_plan(), companion=None)
    plan.save_pretrained(tmp_path)

    def older(root: Any) -> None:
        root["schema_version"] = 3
        assert root.pop("companion") is None

    edit(tmp_path, older)
    assert_same(Plan.from_pretrained(tmp_path), plan)


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    Plan([gate(1), StaticExit(2)]).save_pretrained(tmp_path)

    def older(root: Any) -> None:
        root["schema_version"] = 1
        del root["skips"], root["adapters"], root["co_attention"], root["companion"]

    edit(tmp_path, older)
    plan = Plan.from_pretrained(tmp_path)
    assert isinstance(plan.exits[0], GateExit)
    assert plan.describe() == Plan([gate(1), StaticExit(2)]).describe()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    full_plan().save_pretrained(tmp_path)
    return tmp_path


PIA_3, PLAIN_1 = "skips/2/adapter", "adapters/0/adapter"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("skips", None, "skips: expected a list, got null"),
        ("companion", [], "companion: expected an object or null, got a list"),
        ("companion/extra", 1, "companion.'extra': unknown field"),
        ("companion/tensors/embedding", "x", "companion.tensors.embedding: vte_plan.safetensors has no tensor 'x'"),
        ("schema_version", 3, "'companion': unknown field; schema version 3 does not have it here"),
        ("skips/0", 1, r"skips\[0\]: expected an object, got an integer"),
        ("skips/0/extra", 1, r"skips\[0\].'extra': unknown field"),
        ("skips/0/layer", "0", r"skips\[0\].layer: expected an integer, got a string"),
        ("skips/1/layer", 0, r"skips\[1\].layer: 0 is not above 0, the layer of skips\[0\]"),
        ("skips/1/adapter", [], r"skips\[1\].adapter: expected an object or null, got a list"),
        ("adapters/0/adapter", None, r"adapters\[0\].adapter: expected an object, got null"),
        ("adapters/0/layer", 0, r"adapters\[0\].layer: the attention of layer 0 is skipped, by skips\[0\]"),
        (f"{PIA_3}/extra", 1, r"skips\[2\].adapter.'extra': unknown field"),
        (f"{PIA_3}/width", 5, r"skips\[2\].adapter.width: 5, but down has 4 rows"),
        (f"{PIA_3}/groups", 4, r"skips\[2\].adapter.up0.weight: expected shape \[32, 1\] to go with down and 4 groups"),
        (f"{PIA_3}/groups", 0, r"skips\[2\].adapter.groups: must be 1 or more, got 0"),
        (f"{PIA_3}/groups", 2.0, r"skips\[2\].adapter.groups: expected an integer, got a number"),
        (f"{PIA_3}/scale", float("inf"), r"skips\[2\].adapter.scale: must be a finite number"),
        (f"{PIA_3}/router", "prompt", r"skips\[2\].adapter.router: expected an object, got a string"),
        (f"{PIA_3}/router/kind", "both", r"skips\[2\].adapter.router.kind: unknown kind 'both'; expected 'prompt' or"),
        (f"{PIA_3}/router/kind", "static", r"skips\[2\].adapter.router.weights: is missing"),
        (f"{PIA_3}/router/extra", 1, r"skips\[2\].adapter.router.'extra': unknown field"),
        (f"{PIA_3}/router/temperature", 0, r"skips\[2\].adapter.router.temperature: must be positive, got 0"),
        ("skips/0/adapter/router/weights", [1], r"skips\[0\].adapter.router.weights: expected two numbers"),
        ("skips/0/adapter/router/weights", [1, 1], r"skips\[0\].adapter.router.weights: must sum to 1"),
        ("skips/0/adapter/router/weights/0", None, r"skips\[0\].adapter.router.weights\[0\]: expected a number"),
        (f"{PIA_3}/tensors/pool.bias", "x", r"skips\[2\].adapter.tensors.pool.bias: .* has no tensor 'x'"),
        (f"{PLAIN_1}/tensors/pool.bias", "x", r"adapters\[0\].adapter.tensors.'pool.bias': unknown field"),
        ("skips/0/adapter/tensors/router.bias", "x", r"skips\[0\].adapter.tensors.'router.bias': unknown field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_field_is_named(saved: Path, path: str, value: object, message: str) -> None:
    edit(saved, setter(path, value))
    with pytest.raises(PlanError, match=f"^vte_plan.json: {message}"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    "path",
    [
        "skips",
        "adapters",
        "skips/1/layer",
        "skips/1/adapter",
        "adapters/0/layer",
        *(f"{PIA_3}/{name}" for name in ("width", "groups", "scale", "router", "tensors", "router/temperature")),
        *(f"{PIA_3}/tensors/{name}" for name in ("pool.weight", "down.bias", "up0.weight", "router.weight")),
    ],
)
def test_missing_field_is_named(saved: Path, path: str) -> None:
    def delete(root: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
        for parent in parents:
            root = root[parent]
        del root[last]

    edit(saved, delete)
    with pytest.raises(PlanError, match=rf"^vte_plan\.json: .*{path.split('/')[-1]}: is missing"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("skips.3.pool.bias", torch.ones(4), r"vte_plan.json: skips\[2\].adapter.pool.bias: torch.float32 on cpu does"),
        ("skips.3.up1.weight", torch.ones(3, 3).bfloat16(), r"vte_plan.json: skips\[2\].adapter.up1.bias: expected"),
        ("skips.3.router.bias", torch.ones(3).bfloat16(), r"vte_plan.json: skips\[2\].adapter.router.bias: expected"),
        (
            "adapters.1.down.weight",
            torch.ones(6, C) / 0,
            r"vte_plan.json: adapters\[0\].adapter.down.weight: holds NaN",
        ),
        ("adapters.9.down.weight", torch.ones(1), "vte_plan.safetensors: vte_plan.json names no tensor 'adapters.9"),
    ],
)
def test_bad_tensors_are_named(saved: Path, name: str, value: torch.Tensor, message: str) -> None:
    put_tensors(saved, {**safetensors.torch.load_file(saved / "vte_plan.safetensors"), name: value})
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan.from_pretrained(saved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_altered_files_never_raise_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full_plan().save_pretrained(folder)
        file = folder / "vte_plan.json"
        whole = bytearray(file.read_bytes())
        position = data.draw(st.integers(whole.index(b'"skips"'), len(whole) - 1))
        whole[position] = data.draw(st.sampled_from(list(b'019-.e[]{}",:nx ')))
        file.write_bytes(whole)
        with suppress(PlanError):  # a digit changed into another is no damage that a reader could see
            Plan.from_pretrained(folder)


def test_file_says_what_it_holds(saved: Path) -> None:
    root = json.loads((saved / "vte_plan.json").read_text())
    assert root["schema_version"] == 4
    assert [entry["layer"] for entry in root["skips"]] == [0, 2, 3]
    assert root["skips"][1]["adapter"] is None
    assert root["skips"][0]["adapter"]["router"] == {"kind": "static", "weights": [0.25, 0.75]}
    assert sorted(root["adapters"][0]["adapter"]["tensors"]) == sorted(
        [f"{name}.{kind}" for name in ("down", "up0", "up1", "router") for kind in ("weight", "bias")]
    )


# The EAS authors' checkpoints


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    """The weights of golden eas_{name}.npz under the authors' names."""
    data = np.load(DATA / f"eas_{name}.npz")
    return {key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("w.")}


def test_llava_eas_checkpoint() -> None:
    weights = checkpoint("llava_model")
    plan = Plan.from_eas_checkpoint(weights, skip=[5, np.int64(2), 4])
    assert [part.layer for part in plan.skips] == [2, 4, 5]
    assert [part.layer for part in plan.adapters] == [0, 1, 3]
    pia, plain = plan.skips[0].adapter, plan.adapters[1].adapter
    assert isinstance(pia, PIA)
    assert (pia.width, pia.groups, pia.scale, plain.width) == (32, 2, 1.0, 16)
    assert isinstance(plain.router, Router)
    assert plain.router.bias is None
    assert plain.router.temperature == 10.0
    path = "model.layers.2.replaced_adapter"
    for name, letter in (("pool", "A"), ("down", "C"), ("up0", "B"), ("up1", "D")):
        assert torch.equal(getattr(pia, name).weight, weights[f"{path}.conv_{letter}.weight"][..., 0])
        assert torch.equal(getattr(pia, name).bias, weights[f"{path}.conv_{letter}.bias"])
    assert torch.equal(plain.down.weight, weights["model.layers.1.adapter_attn.conv_A.weight"][..., 0])
    prefixed = {f"base_model.{key}": value.squeeze(-1) for key, value in weights.items()}
    assert_same(Plan.from_eas_checkpoint(prefixed, [2, 4, 5]), plan)


def test_lavin_eas_checkpoint() -> None:
    plan = Plan.from_eas_checkpoint(checkpoint("lavin"), skip=[1, 3], temperature=5, scale=0.5)
    assert [(row["layer"], row["kind"], row["width"]) for row in plan.describe()] == [
        (1, "skip", 32),
        (3, "skip", 32),
        (0, "adapter", 8),
        (2, "adapter", 8),
    ]
    adapter = plan.adapters[0].adapter
    assert isinstance(adapter.router, Router)
    assert adapter.router.bias is not None
    assert (adapter.router.temperature, adapter.scale) == (5.0, 0.5)


def test_layers_without_an_adapter_stay_as_they_are() -> None:
    weights = {key: value for key, value in checkpoint("llava_model").items() if ".3.adapter_attn." not in key}
    plan = Plan.from_eas_checkpoint(weights, skip=[3])
    assert [part.layer for part in plan.adapters] == [0, 1, 2, 4, 5]
    assert Plan.from_eas_checkpoint({k: v for k, v in weights.items() if ".3." not in k}, skip=[]).skips == ()


PATH = "model.layers.2.replaced_adapter"


@pytest.mark.parametrize(
    ("changes", "skips", "message"),
    [
        ({}, [6], r"skip: no replaced_adapter for \[6\]; the checkpoint has them for \[0, 1, 2, 3, 4, 5\]"),
        ({}, [True], "skip: expected an integer, got bool"),
        ({f"{PATH}.conv_E.weight": torch.ones(1)}, [], f"{PATH}.conv_E.weight: not a parameter of conv_A to conv_D"),
        ({f"x.{PATH}.conv_A.bias": torch.ones(32)}, [], f"x.{PATH}.conv_A.bias: the checkpoint has this weight twice"),
        ({f"{PATH}.conv_C.bias": None}, [2], r"layers.2.replaced_adapter: conv_C.bias: the checkpoint lacks it"),
        ({f"{PATH}.expert_weights.weight": None}, [2], "layers.2.replaced_adapter: expert_weights.weight: the check"),
        ({f"{PATH}.conv_B.weight": torch.ones(64, 5)}, [2], "layers.2.replaced_adapter: conv_B.bias: torch.float16"),
        ({f"{PATH}.conv_B.weight": torch.ones(64, 5).half()}, [2], "layers.2.replaced_adapter: up0.weight: expected"),
        ({f"{PATH}.conv_B.weight": np.ones(2)}, [2], "layers.2.replaced_adapter: conv_B.weight: expected a torch.Tens"),
        ({f"{PATH}.conv_A.bias": torch.ones(32).half() / 0}, [2], "layers.2.replaced_adapter: conv_A.bias: holds NaN"),
        (
            {"model.layers.1.adapter_attn.conv_C.bias": torch.ones(16)},
            [],
            "layers.1.adapter_attn: conv_C.bias: this adapter has only conv_A, conv_B, conv_D and expert_weights",
        ),
    ],
)
def test_bad_eas_checkpoint(changes: dict[str, Any], skips: list[int], message: str) -> None:
    weights = {key: value for key, value in {**checkpoint("llava_model"), **changes}.items() if value is not None}
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan.from_eas_checkpoint(weights, skips)


def test_checkpoint_whose_pia_would_be_unused() -> None:
    weights = {key: value for key, value in checkpoint("llava_model").items() if ".3.adapter_attn." not in key}
    with pytest.raises(PlanError, match=r"^skip: lacks \[3\], for which the checkpoint has no adapter_attn"):
        Plan.from_eas_checkpoint(weights, skip=[1])


def test_checkpoint_without_adapters() -> None:
    with pytest.raises(PlanError, match=r"^state_dict: no EAS adapters \(keys like"):
        Plan.from_eas_checkpoint({"model.embed_tokens.weight": torch.ones(2, 2)}, skip=[1])
