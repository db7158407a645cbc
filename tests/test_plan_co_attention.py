"""Plans for co-attention layers: construction, files, fit to a model."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import edit, setter
from test_plan_skips import assert_same_adapter
from tiny_bridgetower import LEVELS, STATIC, C, random_part, shared
from tiny_models import gate, random_adapter, tiny

from vte_compile import CoAttention, KeptAdapter, Plan, SkippedAttention, StaticExit
from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import PlanError, PlanMismatchError
from vte_compile.fingerprint import Fingerprint


def full_plan() -> Plan:
    """Every kind of field, in no order."""
    return Plan(
        co_attention=[
            random_part("image", 0, skip_cross=True),
            random_part("text", 1, skip_self=True),
            CoAttention("text", 0, skip_self=True, skip_cross=True),
        ]
    )


def assert_same(mine: Plan, theirs: Plan) -> None:
    assert mine.describe() == theirs.describe()
    for left, right in zip(mine.co_attention, theirs.co_attention, strict=True):
        assert (left.place, left.skip_self, left.skip_cross) == (right.place, right.skip_self, right.skip_cross)
        for name in ("self_adapter", "cross_adapter", "ffn_adapter"):
            assert_same_adapter(getattr(left, name), getattr(right, name))


# Construction


def test_plan_sorts_and_describes_itself() -> None:
    plan = full_plan()
    assert [(part.side, part.level) for part in plan.co_attention] == [("text", 0), ("text", 1), ("image", 0)]
    assert [(row["layer"], row["kind"], row["width"]) for row in plan.describe()] == [
        (0, "text self skip", None),
        (0, "text cross skip", None),
        (1, "text self skip", 6),
        (1, "text cross adapter", 6),
        (1, "text ffn adapter", 6),
        (0, "image self adapter", 6),
        (0, "image cross skip", 6),
        (0, "image ffn adapter", 6),
    ]
    assert repr(Plan(co_attention=[CoAttention("image", 1, skip_cross=True)])) == (
        "Plan(CoAttention(side='image', level=1, skip_self=False, skip_cross=True, self_adapter=None, "
        "cross_adapter=None, ffn_adapter=None); for any model)"
    )
    assert type(CoAttention("text", np.int64(3)).level) is int


PLAIN, ROUTED = random_adapter(PlainAdapter, router=STATIC), random_adapter(PlainAdapter)
PROPAGATING = random_adapter(PIA, router=STATIC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "video"}, "side: expected 'text' or 'image', got 'video'"),
        ({"side": None}, "side: expected 'text' or 'image', got None"),
        ({"level": -1}, "level: must be 0 or more, got -1"),
        ({"level": True}, "level: expected an integer, got bool"),
        ({"skip_self": 1}, "skip_self: expected a boolean, got int"),
        ({"skip_cross": None}, "skip_cross: expected a boolean, got NoneType"),
        ({"self_adapter": PROPAGATING}, "self_adapter: what is kept takes a PlainAdapter or None, got PIA"),
        ({"cross_adapter": 3}, "cross_adapter: what is kept takes a PlainAdapter or None, got int"),
        (
            {"skip_cross": True, "cross_adapter": PLAIN},
            "cross_adapter: a skipped attention takes a PIA or None, got PlainAdapter",
        ),
        ({"ffn_adapter": PROPAGATING}, "ffn_adapter: what is kept takes a PlainAdapter or None, got PIA"),
        ({"ffn_adapter": ROUTED}, r"ffn_adapter.router: expected a StaticRouter .* got a Router"),
    ],
)
def test_bad_part_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        CoAttention(**{"side": "text", "level": 0, **arguments})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (3, "co_attention: expected a sequence, got int"),
        ([StaticExit(1)], r"co_attention\[0\]: expected a CoAttention, got StaticExit"),
        (
            [CoAttention("image", 1), CoAttention("text", 1), CoAttention("image", 1)],
            r"co_attention\[2\]\.level: image level 1 already has co_attention\[1\]",
        ),
        (
            [
                CoAttention("text", 0, ffn_adapter=PLAIN),
                CoAttention("text", 1, ffn_adapter=random_adapter(PlainAdapter, hidden_size=8, router=STATIC)),
            ],
            r"co_attention\[1\]\.ffn_adapter: is for hidden size 8, but co_attention\[0\]\.ffn_adapter for 32",
        ),
    ],
)
def test_bad_plan_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan(co_attention=parts)


# Fit to a model


def test_plan_is_checked_against_the_model() -> None:
    model = shared()
    Plan().check(model)
    Plan(co_attention=full_plan().co_attention, fingerprint=Fingerprint.of(model)).check(model)
    small = CoAttention("image", 0, ffn_adapter=random_adapter(PlainAdapter, hidden_size=8, router=STATIC))
    for plan, message in (
        (
            Plan(co_attention=[CoAttention("text", LEVELS)]),
            r"co_attention\[0\]\.level: 2 is out of range: .* \(0\.\.1\)",
        ),
        (Plan(co_attention=[small]), r"co_attention\[0\]\.ffn_adapter: is for hidden size 8, but that of .* is 32"),
        (Plan([StaticExit(0)]), r"exits\[0\]: is for the layers of a decoder, but BridgeTowerModel has co-attention"),
        (Plan(skips=[SkippedAttention(0)]), r"skips\[0\]: is for the layers of a decoder"),
        (Plan(adapters=[KeptAdapter(0, ROUTED)]), r"adapters\[0\]: is for the layers of a decoder"),
    ):
        with pytest.raises(PlanMismatchError, match=f"^{message}"):
            plan.check(model)


def test_decoders_have_no_co_attention() -> None:
    with pytest.raises(PlanMismatchError, match=r"^co_attention\[0\]: LlamaForCausalLM has no co-attention layers"):
        Plan(co_attention=[CoAttention("text", 0)]).check(tiny())


def test_fingerprint_of_another_size_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^co_attention\[0\]\.ffn_adapter: is for hidden size 32, but the decoder's"):
        Plan(co_attention=[CoAttention("text", 0, ffn_adapter=PLAIN)], fingerprint=Fingerprint("x", 3, C + 1, 50))


# Files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    full_plan().save_pretrained(tmp_path)
    return tmp_path


def test_round_trip(saved: Path) -> None:
    assert_same(Plan.from_pretrained(saved), full_plan())
    root = json.loads((saved / "vte_plan.json").read_text())
    assert root["co_attention"][0] == {
        "side": "text",
        "level": 0,
        "skip_self": True,
        "skip_cross": True,
        "self_adapter": None,
        "cross_adapter": None,
        "ffn_adapter": None,
    }


def test_files_of_version_2_are_read(tmp_path: Path) -> None:
    plan = Plan([gate(1)], skips=[SkippedAttention(2)])
    plan.save_pretrained(tmp_path)

    def older(root: Any) -> None:
        root["schema_version"] = 2
        del root["co_attention"], root["companion"]

    edit(tmp_path, older)
    assert Plan.from_pretrained(tmp_path).describe() == plan.describe()


TEXT, IMAGE = "co_attention/1", "co_attention/2"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "'co_attention': unknown field; schema version 2 does not have it here"),
        ("co_attention", None, "co_attention: expected a list, got null"),
        (TEXT, 1, r"co_attention\[1\]: expected an object, got an integer"),
        (f"{TEXT}/extra", 1, r"co_attention\[1\].'extra': unknown field"),
        (f"{TEXT}/side", 1, r"co_attention\[1\].side: expected a string, got an integer"),
        (f"{TEXT}/side", "left", r"co_attention\[1\].side: expected 'text' or 'image', got 'left'"),
        (f"{TEXT}/level", "1", r"co_attention\[1\].level: expected an integer, got a string"),
        (f"{TEXT}/level", -1, r"co_attention\[1\].level: must be 0 or more, got -1"),
        (f"{TEXT}/level", 0, r"co_attention\[1\].level: text 0 is not above text 0, the level of co_attention\[0\]"),
        (f"{IMAGE}/side", "text", r"co_attention\[2\].level: text 0 is not above text 1, the level of co_attention\[1"),
        (f"{TEXT}/skip_self", 1, r"co_attention\[1\].skip_self: expected a boolean, got an integer"),
        (f"{TEXT}/skip_self", False, r"co_attention\[1\].self_adapter.tensors.'pool.bias': unknown field"),
        (f"{TEXT}/skip_cross", True, r"co_attention\[1\].cross_adapter.tensors.pool.weight: is missing"),
        (f"{TEXT}/self_adapter", [], r"co_attention\[1\].self_adapter: expected an object or null, got a list"),
        (f"{TEXT}/ffn_adapter/width", 5, r"co_attention\[1\].ffn_adapter.width: 5, but down has 6 rows"),
        (
            f"{TEXT}/ffn_adapter/router",
            {"kind": "prompt", "temperature": 1.0},
            r"co_attention\[1\].ffn_adapter.tensors.router.weight: is missing",
        ),
        (
            f"{TEXT}/self_adapter/tensors/pool.bias",
            "x",
            r"co_attention\[1\].self_adapter.tensors.pool.bias: .* no tensor",
        ),
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
        "co_attention",
        *(f"{TEXT}/{name}" for name in ("side", "level", "skip_self", "skip_cross")),
        *(f"{TEXT}/{name}" for name in ("self_adapter", "cross_adapter", "ffn_adapter", "ffn_adapter/tensors")),
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


def test_left_over_tensor_is_named(saved: Path) -> None:
    edit(saved, setter(f"{IMAGE}/ffn_adapter", None))
    with pytest.raises(PlanError, match=r"^vte_plan.safetensors: .* names no tensor 'co_attention"):
        Plan.from_pretrained(saved)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_altered_files_never_raise_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full_plan().save_pretrained(folder)
        file = folder / "vte_plan.json"
        whole = bytearray(file.read_bytes())
        position = data.draw(st.integers(whole.index(b'"co_attention"'), len(whole) - 1))
        whole[position] = data.draw(st.sampled_from(list(b'019-.e[]{}",:nx ')))
        file.write_bytes(whole)
        with suppress(PlanError):  # a digit changed into another is no damage that a reader could see
            Plan.from_pretrained(folder)


def test_adapters_of_other_dtypes_are_kept(tmp_path: Path) -> None:
    plan = Plan(co_attention=[random_part("text", 0, skip_self=True, dtype=torch.bfloat16)])
    plan.save_pretrained(tmp_path)
    assert_same(Plan.from_pretrained(tmp_path), plan)
