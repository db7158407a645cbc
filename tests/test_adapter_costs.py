"""The cost model of adapters: what it chooses, that each form is worth it somewhere, and that costs only grow."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vte_compile import adapter_costs
from vte_compile.adapter_costs import AdapterSizes, Forms, choose_forms

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FFN, QKV = (11008, 11008), (4096, 4096, 4096)
"""Behind a PIA, and behind a plain adapter, in a decoder of seven billion weights."""
NAME = {"blended": "blended", "blended low_rank": r"blended\+low_rank", "low_rank": "low_rank", "unfolded": "unfolded"}


def sizes(hidden=4096, width=256, outputs=FFN, static=False, foldable=True) -> AdapterSizes:
    return AdapterSizes(hidden, width, outputs, static, foldable)


def chosen(forms: Forms) -> tuple[str, str]:
    return forms.prompt, forms.step


def times(forms: Forms) -> dict[str, float]:
    """What the reason says, in ms; the layers' own time as "layers"."""
    found = {key: re.search(rf"[ ]{name} ([0-9.e+-]+)(?:[,;]|$)", forms.reason) for key, name in NAME.items()}
    own = re.search(r"the layers alone ([0-9.e+-]+)$", forms.reason)
    return {key: float(match[1]) for key, match in {**found, "layers": own}.items() if match}


@pytest.mark.parametrize("one_prompt", [True, False])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_needs_no_model(device, one_prompt):
    """A static router is a constant, and weights that are not plain stay as they are, whatever the router."""
    forms = choose_forms(sizes(static=True), device, torch.bfloat16, one_prompt)
    assert forms == Forms("constant", "constant", "the router is static")
    for static in (False, True):
        forms = choose_forms(sizes(foldable=False, static=static), device, torch.bfloat16, one_prompt)
        assert chosen(forms) == ("unfolded", "unfolded")
        assert forms.reason == "the layers behind it have no plain weights to fold into"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("width", "outputs"), [(256, FFN), (128, FFN), (128, QKV)])
def test_one_prompt_is_blended(width, outputs, device, dtype):
    """The published widths of LLaVA-EAS."""
    forms = choose_forms(sizes(width=width, outputs=outputs), device, dtype, one_prompt=True)
    assert chosen(forms) == ("blended", "blended")


@pytest.mark.parametrize("one_prompt", [True, False])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_steps_of_many_prompts_have_no_weights_of_their_own(device, one_prompt):
    """W' is one prompt's alone."""
    for width in (8, 64, 512, 4096):
        for outputs in (FFN, QKV, (4096,), (64,)):
            forms = choose_forms(sizes(width=width, outputs=outputs), device, torch.float32, one_prompt)
            assert one_prompt or forms.step != "blended"
            assert (forms.prompt == "unfolded") == (forms.step == "unfolded")
            # Prefill gives out only what the steps take.
            assert forms.step != "blended" or forms.prompt == "blended"


@pytest.mark.parametrize(
    ("own", "device", "dtype", "one_prompt", "want"),
    [
        # Blending moves three copies of W; a narrow adapter does less than that.
        (dict(width=32), CPU, torch.float32, True, ("low_rank", "low_rank")),
        (dict(width=8), GPU, torch.float32, True, ("blended", "blended")),
        # Eight rows blend eight times, which pays for a wide adapter only.
        (dict(width=256), CPU, torch.float32, False, ("low_rank", "low_rank")),
        (dict(width=4096, outputs=QKV), CPU, torch.float32, False, ("blended", "low_rank")),
        # Unfolded, two kernels instead of three or four: worth another copy of W where launches count.
        (dict(width=128, outputs=QKV), GPU, torch.bfloat16, False, ("unfolded", "unfolded")),
        (dict(width=32), GPU, torch.bfloat16, False, ("low_rank", "low_rank")),
    ],
)
def test_each_form_is_worth_it_somewhere(own, device, dtype, one_prompt, want):
    assert chosen(choose_forms(sizes(**own), device, dtype, one_prompt)) == want


def test_another_copy_of_weights_has_to_pay(monkeypatch):
    """The fastest by a little is not taken if it keeps the layers' own weights beside the folded ones."""
    own = (sizes(width=32), GPU, torch.bfloat16, False)
    forms = choose_forms(*own)
    known = times(forms)
    assert known["unfolded"] < known["low_rank"] < known["unfolded"] + 0.05 * known["layers"]
    assert chosen(forms) == ("low_rank", "low_rank")
    monkeypatch.setattr(adapter_costs, "_WORTH_A_COPY", 0.0)
    assert chosen(choose_forms(*own)) == ("unfolded", "unfolded")


@pytest.mark.parametrize("one_prompt", [True, False])
def test_reason_names_the_times(one_prompt):
    forms = choose_forms(sizes(), CPU, torch.float32, one_prompt)
    known = times(forms)
    assert set(known) == {"blended" if one_prompt else "blended low_rank", "low_rank", "unfolded", "layers"}
    assert all(time > 0 for time in known.values())
    assert forms.reason.startswith("modelled ms per request: ")


def test_other_devices_count_as_a_cpu():
    own = (sizes(), torch.bfloat16, True)
    results = [choose_forms(own[0], torch.device(kind), *own[1:]) for kind in ("cpu", "xpu", "cuda")]
    assert results[0] == results[1] != results[2]


def modelled(device, dtype, one_prompt, **own) -> dict[tuple, float]:
    """Seconds by pair of forms, unrounded, and of the layers alone."""
    machine = adapter_costs._MACHINES[device]
    costs = adapter_costs._Costs(sizes(**own), machine, dtype.itemsize)
    pairs = {pair: costs.request(pair, one_prompt) for pair in adapter_costs._pairs(one_prompt)}
    return pairs | {("layers",): costs.layers(one_prompt)}


larger = st.fixed_dictionaries({"hidden": st.integers(1, 4), "width": st.integers(1, 4), "outputs": st.integers(1, 4)})


@given(
    hidden=st.sampled_from([32, 256, 4096]),
    width=st.sampled_from([4, 64, 1024]),
    outputs=st.lists(st.sampled_from([32, 1024, 11008]), min_size=1, max_size=4),
    factor=larger,
    device=st.sampled_from(["cpu", "cuda"]),
    one_prompt=st.booleans(),
)
def test_costs_only_grow(hidden, width, outputs, factor, device, one_prompt):
    """With every size, with the bytes of a number, with one more layer behind the adapter, and with the rows."""

    def cost(dtype=torch.bfloat16, one=one_prompt, more=(), scale=None) -> dict:
        scale = scale or dict.fromkeys(factor, 1)
        own = dict(hidden=hidden * scale["hidden"], width=width * scale["width"])
        behind = tuple(n * scale["outputs"] for n in outputs)
        return modelled(device, dtype, one, **own, outputs=(*behind, *more))

    base = cost()
    assert all(time > 0 for time in base.values())
    for other in (cost(scale=factor), cost(dtype=torch.float32), cost(more=(32,))):
        assert all(other[pair] >= time for pair, time in base.items())
    one, many = cost(one=True), cost(one=False)
    assert all(many[pair] >= time for pair, time in one.items() if pair in many)
    # Once blended, steps cost nothing: of one prompt, the adapter's width does not matter.
    if one_prompt:
        wide = cost(scale={"hidden": 1, "outputs": 1, "width": 4})
        assert wide["blended", "blended"] == base["blended", "blended"]
        assert wide["low_rank", "low_rank"] >= base["low_rank", "low_rank"]
