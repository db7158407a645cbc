"""Redundancy scores: the authors' updates and ramp, the law of the draws, and a state that carries everything."""

import itertools
import json
import math

import numpy as np
import pytest
from tiny_models import DATA

from vte_compile.errors import InputError
from vte_compile.tuning.redundancy import Redundancy, SearchSettings


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "eas_search.npz") as data:
        return {key.removeprefix("llava."): data[key] for key in data.files}


def settings(**changes) -> SearchSettings:
    base = dict(skips=2, warmup=0, period=3, sets=4, lr=1.0, probability="sigmoid", ramp=False)
    return SearchSettings(**(base | changes))


def reference(scores, sets, losses, lr, probability):
    """The formula, attention by attention, as vte_compile/tuning/redundancy.py states it."""
    p = [1 / (1 + math.exp(-r)) for r in scores]
    if probability == "softmax":
        p = [math.exp(10 * r) / sum(math.exp(10 * q) for q in scores) for r in scores]
    rewards = [math.exp(-loss) for loss in losses]
    result = list(scores)
    for drawn, reward in zip(sets, rewards, strict=True):
        for i in drawn:
            result[i] += lr * (reward - sum(rewards) / len(rewards)) * p[i] * (1 - p[i])
    return result


def test_golden_updates(golden):
    """Each update from the scores before it. Theirs are kept in float32: they agree to its rounding, not closer."""
    for before, after, sets, losses in zip(
        *(golden[key] for key in ("scores_before", "scores_after", "selects", "losses")), strict=True
    ):
        search = Redundancy(32, SearchSettings.llava(6, 20))
        search.scores = before.astype(float)
        search.update(sets.tolist(), losses.tolist())
        np.testing.assert_allclose(search.scores, after, rtol=0, atol=2e-8)
        expected = reference(before.astype(float), sets.tolist(), losses.tolist(), 1.0, "sigmoid")
        np.testing.assert_allclose(search.scores, expected, rtol=0, atol=1e-14)
        assert np.abs(after - before).max() > 1e-3


def test_golden_run(golden):
    """The ramp, when updates come, and where their scores, summed up in float32, end."""
    search = Redundancy(32, SearchSettings.llava(6, int(golden["warmup_steps"])))
    sizes, updates = [], []
    for step in range(60):
        sizes.append(len(search.next_set()))
        if search.is_due:
            index = len(updates)
            np.testing.assert_allclose(search.scores, golden["scores_before"][index], rtol=0, atol=2e-7)
            search.update(golden["selects"][index].tolist(), golden["losses"][index].tolist())
            updates.append(step + 1)
    assert sizes == golden["train_skip_count_per_call"].tolist()
    assert updates == golden["update_call_index"].tolist()
    np.testing.assert_allclose(search.scores, golden["scores_after"][-1], rtol=0, atol=2e-7)


def test_softmax_update():
    search = Redundancy(4, settings(probability="softmax", lr=2.0))
    search.scores = np.array([0.1, -0.2, 0.05, 0.0])
    expected = reference(search.scores, [(0, 1), (0, 2)], [0.5, 1.5], 2.0, "softmax")
    search.update([(0, 1), (0, 2)], [0.5, 1.5])
    np.testing.assert_allclose(search.scores, expected, rtol=1e-13)


@pytest.mark.parametrize("probability", ["sigmoid", "softmax"])
def test_draws_are_without_replacement_with_probability_p(probability):
    search = Redundancy(4, settings(probability=probability), seed=3)
    search.scores = np.array([0.0, 0.1, -0.1, 0.05])
    p = search.probabilities / search.probabilities.sum()
    expected = dict.fromkeys(itertools.combinations(range(4), 2), 0.0)
    for first, second in itertools.permutations(range(4), 2):  # the first, then the second of those that are left
        expected[tuple(sorted((first, second)))] += p[first] * p[second] / (1 - p[first])
    count = 20_000
    drawn = [search.next_set() for _ in range(count)]
    for pair, probable in expected.items():
        assert drawn.count(pair) / count == pytest.approx(probable, abs=4 * math.sqrt(probable / count))


def test_sets_to_evaluate_are_distinct_even_where_one_is_nearly_certain():
    search = Redundancy(5, settings(probability="softmax"))
    search.scores = np.array([900.0, 900.0, 0.0, 0.0, 0.0])
    sets = search.sets_to_evaluate()
    assert len(set(sets)) == len(sets) == 4
    assert sets[0] == (0, 1)
    few = Redundancy(3, settings(sets=9))
    assert sorted(few.sets_to_evaluate()) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("preset", [SearchSettings.llava, SearchSettings.lavin, SearchSettings.meter])
def test_the_search_finds_what_is_redundant(preset):
    """Each attention costs its own loss; the cheapest are found."""
    cost = np.random.default_rng(0).permutation(np.linspace(0, 1, 8))
    search = Redundancy(8, preset(3, 10))
    for _ in range(4000):
        search.next_set()
        if search.is_due:
            sets = search.sets_to_evaluate()
            search.update(sets, [cost[list(drawn)].sum() for drawn in sets])
    assert search.chosen == tuple(sorted(np.argsort(cost)[:3]))


def test_ties_go_to_the_higher_layer():
    assert Redundancy(6, settings()).chosen == (4, 5)


def run(search: Redundancy, steps: int) -> list[tuple[int, ...]]:
    drawn = []
    for _ in range(steps):
        drawn.append(search.next_set())
        if search.is_due:
            sets = search.sets_to_evaluate()
            search.update(sets, [0.1 * sum(each) for each in sets])
            drawn += sets
    return drawn


def test_a_state_goes_on_where_it_was():
    uninterrupted = Redundancy(7, settings(warmup=5, ramp=True), seed=1)
    interrupted = Redundancy(7, settings(warmup=5, ramp=True), seed=1)
    assert run(uninterrupted, 10) == run(interrupted, 10)
    restored = Redundancy.from_state(json.loads(json.dumps(interrupted.state())))
    assert run(restored, 10) == run(uninterrupted, 10)
    assert restored.state() == uninterrupted.state()
    assert run(Redundancy(7, settings(), seed=2), 10) != run(Redundancy(7, settings(), seed=3), 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skips": 0}, "skips: expected 1 or more"),
        ({"sets": 1}, "sets: expected 2 or more"),
        ({"period": 0}, "period"),
        ({"warmup": -1}, "warmup"),
        ({"lr": math.nan}, "lr"),
        ({"skips": 5}, "5 attentions cannot go, there are 4"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        Redundancy(4, settings(**changes))


def test_bad_losses_and_states():
    search = Redundancy(4, settings())
    with pytest.raises(InputError, match="one per set"):
        search.update([(0, 1)], [1.0, 2.0])
    with pytest.raises(InputError, match=r"\[1, 2\] skipped is NaN"):
        search.update([(0, 1), (1, 2)], [1.0, math.nan])
    search.update([(0, 1), (1, 2)], [1.0, math.inf])
    assert search.scores[0] > 0 > search.scores[2]
    with pytest.raises(InputError, match="state"):
        Redundancy.from_state({"scores": [0.0]})
