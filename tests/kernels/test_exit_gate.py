"""The exit gate's ops against the paper's formula written out, and where they must keep the tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vte_compile.kernels.exit_gate import exit_gate, exit_logits, question_start, static_exit

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def mask(cells: str) -> torch.Tensor:
    return torch.tensor([[cell == "v" for cell in cells]])


def sample(cells: str = "tvvttt", hidden: int = 7, width: int = 5, dtype=torch.float32, weights=None, seed: int = 0):
    """hidden_states [1, S, C], visual_mask [1, S], w1 [M, 2C], w2 [2, M]."""
    generator = torch.Generator().manual_seed(seed)
    states, w1, w2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, len(cells), hidden), (width, 2 * hidden), (2, width))
    )
    weights = weights or dtype
    return states.to(dtype), mask(cells), w1.to(weights), w2.to(weights)


def naive(states, visual, w1, w2):
    """z = W2 . GELU(W1 . f) of DyVTE, number by number, in float64."""
    row = visual[0].tolist()
    last = max(i for i, is_visual in enumerate(row) if is_visual)
    question = [states[0, i].double().tolist() for i in range(last + 1, len(row))]
    mean = [sum(column) / (len(question) - 1) for column in zip(*question[:-1], strict=True)]
    features = mean + question[-1]
    hidden = [sum(w * f for w, f in zip(line, features, strict=True)) for line in w1.double().tolist()]
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    return [sum(w * h for w, h in zip(line, hidden, strict=True)) for line in w2.double().tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("cells", "hidden", "width"),
    [("vtt", 1, 1), ("tvvttt", 7, 5), ("vtvttvtttttt", 13, 3), ("ttt" + "v" * 31 + "t" * 17, 33, 65)],
)
def test_logits_are_those_of_the_paper(cells, hidden, width, dtype):
    args = sample(cells, hidden, width, dtype)
    want = torch.tensor(naive(*args), dtype=torch.float64)
    states, visual, w1, w2 = args
    got = exit_logits(states[0, question_start(visual[0]) :], w1, w2)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half precision rounds the inputs alone, which the reference takes as they are: the arithmetic is float32.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * max(1.0, float(want.abs().max())))
    difference = want[1] - want[0]
    for threshold in (difference - 1e-2, difference + 1e-2):
        assert bool(exit_gate(*args, float(threshold))) == bool(difference > threshold)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float64)],
)
def test_the_hidden_states_decide_the_dtype(dtype, weights):
    args = sample(dtype=dtype, weights=weights)
    got = exit_logits(args[0][0, 3:], *args[2:])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(naive(*args), dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_only_the_question_is_read():
    """System prompt, visual tokens and text between images are not in the features; each question token is."""
    args = sample("ttvtvttt")
    want = exit_logits(args[0][0, 5:], *args[2:])
    threshold = float(want[1] - want[0]) - 1e-3
    assert exit_gate(*args, threshold)
    poisoned = args[0].clone()
    poisoned[:, :5] = torch.nan
    assert exit_gate(poisoned, *args[1:], threshold)
    for i in range(5, 8):
        poisoned = args[0].clone()
        poisoned[:, i] = torch.nan
        assert not exit_gate(poisoned, *args[1:], -1e9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_keeps(dtype):
    states, visual, w1, w2 = sample(dtype=dtype)
    assert exit_gate(states, visual, w1, w2, -1e9)
    for poisoned in (0, 2, 3):
        args = [states.clone(), visual, w1.clone(), w2.clone()]
        args[poisoned][..., -1] = torch.nan
        assert not exit_gate(*args, -1e9)
    infinite = states.clone()
    infinite[0, -1] = torch.inf
    logits = exit_logits(infinite[0, 3:], w1, w2)
    assert bool(exit_gate(infinite, visual, w1, w2, -1e9)) == bool(logits[1] - logits[0] > -1e9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tie_keeps(dtype):
    states, visual, w1, w2 = sample(dtype=dtype)
    assert not exit_gate(states, visual, w1, torch.ones_like(w2), 0.0)
    assert not exit_gate(states, visual, torch.zeros_like(w1), w2, 0.0)
    assert exit_gate(states, visual, w1, torch.ones_like(w2), -1e-6)
    # The tie is at the threshold, wherever that is: z[1] - z[0] = 2.
    ones = torch.ones(1, 3, 1, dtype=dtype)
    w1 = torch.tensor([[1e2, 0.0]], dtype=dtype)  # GELU is the identity there
    w2 = torch.tensor([[0.0], [0.02]], dtype=torch.float64).to(dtype)
    difference = float(exit_logits(ones[0, 1:], w1, w2)[1])
    assert difference == pytest.approx(2.0, rel=1e-2)
    assert not exit_gate(ones, mask("vtt"), w1, w2, difference)
    assert exit_gate(ones, mask("vtt"), w1, w2, difference - 1e-3)


@pytest.mark.parametrize("cells", ["ttttt", "t", "v", "vv", "ttv", "vttv"])
def test_no_visual_token_or_no_question_keeps(cells):
    states, visual, w1, w2 = sample(cells)
    assert not static_exit(visual)
    assert not exit_gate(states, visual, w1, w2, -1e9)


def test_a_question_of_one_token_has_no_mean():
    """Its mean is over nothing: NaN, which keeps. A static exit does not ask."""
    states, visual, w1, w2 = sample("tvvt")
    assert exit_logits(states[0, 3:], w1, w2).isnan().all()
    assert not exit_gate(states, visual, w1, w2, -1e9)
    assert static_exit(visual)


@settings(max_examples=60, deadline=None)
@given(st.text("tv", min_size=1, max_size=12))
def test_static_exit_fires_iff_text_follows_the_last_visual_token(cells):
    fired = static_exit(mask(cells))
    assert (fired.shape, fired.dtype) == ((), torch.bool)
    assert bool(fired) == ("v" in cells and cells.endswith("t"))
    if "v" in cells:
        assert question_start(mask(cells)[0]) == cells.rindex("v") + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_exit_gate(dtype):
    torch.library.opcheck(exit_gate, (*sample("vtvttt", 5, 3, dtype), 0.25))


@pytest.mark.parametrize("cells", ["v", "ttt", "tvtvttt"])
def test_opcheck_of_layouts(cells):
    torch.library.opcheck(exit_gate, (*sample(cells), 0.0))
    torch.library.opcheck(static_exit, (mask(cells),))


def test_fakes_know_shape_dtype_and_device():
    with torch.device("meta"):
        states, visual = torch.empty(1, 9, 6, dtype=torch.bfloat16), torch.empty(1, 9, dtype=torch.bool)
        fired = [exit_gate(states, visual, torch.empty(4, 12), torch.empty(2, 4), 0.0), static_exit(visual)]
    for f in fired:
        assert (f.shape, f.dtype, f.device.type) == ((), torch.bool, "meta")


def test_names_in_graphs():
    """Rewritten and exported graphs hold the ops by these names."""
    assert str(torch.ops.vte.exit_gate.default) == "vte.exit_gate.default"
    schema = str(torch.ops.vte.exit_gate.default._schema)
    assert schema.replace("SymFloat", "float") == (
        "vte::exit_gate(Tensor hidden_states, Tensor visual_mask, Tensor w1, Tensor w2, float threshold) -> Tensor"
    )
    assert str(torch.ops.vte.static_exit.default._schema) == "vte::static_exit(Tensor visual_mask) -> Tensor"
