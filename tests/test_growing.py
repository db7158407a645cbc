"""Cache layers with room to grow: what was shown never changes, and steps copy nothing but when the room is used up."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import (
    assert_relative,
    chunk,
    one_thread,  # noqa: F401
    optimized,
)

from vte_compile import StaticExit
from vte_compile.runtime import steps
from vte_compile.runtime.cache import CacheLayer
from vte_compile.runtime.exit_cache import ExitLayer


def column(number: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch, 3, 1, 4), float(number))


def counted(columns: int, batch: int = 2) -> torch.Tensor:
    """[B, 3, columns, 4]: each column holds its number."""
    return torch.arange(float(columns))[:, None].expand(batch, 3, columns, 4).contiguous()


def step(layer, number: float) -> None:
    """What a decode step does."""
    keys, values = layer.next_column()
    keys[:, :, -1:], values[:, :, -1:] = column(number, len(keys)), -column(number, len(keys))
    layer.append(keys, values)


def layer_of(columns: int, cls=CacheLayer):
    return cls.filled(counted(columns), -counted(columns))


@pytest.mark.parametrize("cls", [CacheLayer, ExitLayer])
def test_grows_in_place(cls):
    layer = layer_of(5, cls)
    where = []
    for number in range(5, 300):
        step(layer, number)
        where.append(layer.keys.data_ptr())
        assert layer.get_seq_length() == number + 1
    assert torch.equal(layer.keys, counted(300))
    assert torch.equal(layer.values, -counted(300))
    # 64 columns of room at first, a quarter of what is there later.
    moves = [i for i in range(1, len(where)) if where[i] != where[i - 1]]
    assert moves == [64, 128, 192, 256]
    assert layer_of(5000).next_column()[0].stride(1) == 4 * (5000 + 1250)


def test_prefill_takes_no_room():
    keys, values = counted(7), -counted(7)
    layer = CacheLayer.filled(keys, values)
    assert layer.keys is keys
    assert layer.values is values


def test_a_step_that_fails_changes_nothing():
    layer = layer_of(5)
    step(layer, 5)
    layer.next_column()[0][:, :, -1:] = 99.0  # and then an error, before append()
    assert torch.equal(layer.keys, counted(6))
    step(layer, 6)
    assert torch.equal(layer.keys, counted(7))
    assert torch.equal(layer.values, -counted(7))


@pytest.mark.parametrize("change", [lambda x: x.drop_last(2), lambda x: x.select(torch.tensor([1, 0, 0]))])
def test_what_was_shown_never_changes(change):
    layer = layer_of(5)
    for number in (5, 6, 7):
        step(layer, number)
    shown, others = layer.keys, copy.copy(layer)
    change(layer)
    for number in (77, 78, 79):
        step(layer, number)
    assert torch.equal(shown, counted(8))
    assert torch.equal(others.keys, counted(8))
    assert layer.keys[:, :, -3:, 0].unique().tolist() == [77.0, 78.0, 79.0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_grow_apart(copied):
    layer = layer_of(5)
    step(layer, 5)
    twin = copied(layer)
    for number in range(6, 90):
        step(layer, number)
        step(twin, -number)
    assert torch.equal(layer.keys, counted(90))
    assert torch.equal(twin.keys[:, :, :6], counted(6))
    assert torch.equal(twin.keys[:, :, 6:], -counted(90)[:, :, 6:])
    assert torch.equal(twin.values, -twin.keys)


def test_select_keeps_the_room():
    """Beam search selects rows at each step: that copies them, but the step behind it does not again."""
    layer = layer_of(5)
    step(layer, 5)
    layer.keys[1] += 100
    layer.select(torch.tensor([1, 1, 0]))
    where = layer.keys.data_ptr()
    step(layer, 6)
    assert layer.keys.data_ptr() == where
    assert layer.keys[:, 0, :, 0].tolist() == [[100.0 + i for i in range(6)] + [6.0]] * 2 + [[*map(float, range(7))]]


def test_selecting_before_decoding_makes_no_room():
    layer = layer_of(5)
    layer.select(torch.tensor([0, 1, 0]))
    assert layer.keys.is_contiguous()
    assert torch.equal(layer.keys, counted(5, 3))


# ---------------------------------------------------------------- caches of a model


@pytest.fixture
def filled():
    fast = optimized("llama", StaticExit(0))
    embeds, visual, real = chunk("..vvtt", "tttttt")
    return fast, fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real).past_key_values


def token(seed: int) -> torch.Tensor:
    return chunk("t", "t", seed=seed)[0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copied_caches_do_not_see_each_others_tokens(filled, copied):
    fast, cache = filled
    fast(inputs_embeds=token(1), past_key_values=cache)
    twin, untouched = copied(cache), copy.deepcopy(cache)
    for seed in (2, 3):
        fast(inputs_embeds=token(seed), past_key_values=cache)
        fast(inputs_embeds=token(seed + 10), past_key_values=twin)
    cache.crop(-2)
    after = [fast(inputs_embeds=token(9), past_key_values=c).logits for c in (cache, untouched)]
    assert_relative(after[0], after[1])
    assert twin.get_seq_length() == 9
    assert not torch.equal(twin.layers[0].keys[:, :, 7:], cache.layers[0].keys[:, :, 7:])


def test_a_step_that_raises_leaves_the_cache(filled, monkeypatch):
    """Whichever layer it was in."""
    fast, cache = filled
    fast(inputs_embeds=token(1), past_key_values=cache)
    twin = copy.deepcopy(cache)
    attend, calls = steps.append_and_attend, []

    def failing(*args):
        calls.append(attend(*args))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return calls[-1]

    monkeypatch.setattr(steps, "append_and_attend", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        fast(inputs_embeds=token(2), past_key_values=cache)
    assert cache.lengths.tolist() == twin.lengths.tolist()
    assert cache.get_seq_length() == twin.get_seq_length()
    for seed in (3, 4):
        got, want = (fast(inputs_embeds=token(seed), past_key_values=c).logits for c in (cache, twin))
        assert torch.equal(got, want)


def test_inference_mode_and_back(filled):
    fast, cache = filled
    twin = copy.deepcopy(cache)
    got = []
    for seed in range(3):
        with torch.inference_mode(seed != 1):
            got.append(fast(inputs_embeds=token(seed), past_key_values=cache).logits)
    cache.crop(-1)
    got.append(fast(inputs_embeds=token(2), past_key_values=cache).logits)
    want = [fast(inputs_embeds=token(seed), past_key_values=twin).logits for seed in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(got, [*want, want[-1]], strict=True))


def test_a_step_copies_no_keys(filled):
    """Its memory is the same, and holds all that was appended."""
    fast, cache = filled
    fast(inputs_embeds=token(0), past_key_values=cache)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    for seed in range(20):
        fast(inputs_embeds=token(seed), past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
    assert cache.lengths[1].tolist() == [2 + 21, 6 + 21]
