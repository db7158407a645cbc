"""The guarantee: binomial tests by hand and by summation, policies against a loop, and simulations of the promise."""

import math
from itertools import pairwise

import pytest
import torch

from vte_compile.errors import CalibrationError, InputError, VTEError
from vte_compile.tuning.binomial import samples_needed, tail, upper_bound
from vte_compile.tuning.exits import ExitOutcomes, as_stored, measure
from vte_compile.tuning.guarantee import bound, certify
from vte_compile.tuning.policies import offset_policies, thresholds_for_speedup, thresholds_within

ALPHA, DELTA = 0.05, 0.1
LAYERS = 6
FULL = LAYERS + 1.0  # layers that see the image without an exit; leaving after layer k costs k + 1
INF, NAN = math.inf, math.nan


def outcomes(margins, differs, gate_cost=0.0, costs=None):
    margins = torch.as_tensor(margins)
    layers = margins.shape[1]
    costs = torch.arange(1.0, layers + 2) if costs is None else torch.as_tensor(costs)
    return ExitOutcomes(margins, torch.as_tensor(differs), costs, torch.full((layers,), gate_cost))


def draw(samples, seed, gate_cost=0.0, noise=1.0):
    """Prompts that need the image up to some depth, and gates that see that depth through noise."""
    generator = torch.Generator().manual_seed(seed)
    behind = torch.arange(LAYERS) - (LAYERS + 2) * torch.rand(samples, 1, generator=generator)
    differs = behind + 0.7 * torch.randn(samples, LAYERS, generator=generator) < 0
    return outcomes(2 * behind + noise * torch.randn(samples, LAYERS, generator=generator), differs, gate_cost)


def rows(data, index):
    return ExitOutcomes(data.margins[index], data.differs[index], data.costs[index], data.gate_costs)


@pytest.fixture(scope="module")
def train():
    return draw(3000, seed=1)


@pytest.fixture(scope="module")
def policies(train):
    return offset_policies(train, thresholds_within(train, ALPHA), count=80)


# ---------------------------------------------------------------- binomial


@pytest.mark.parametrize("samples", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.3, 0.5, 0.97])
def test_tail_is_the_sum_of_its_terms(samples, rate):
    terms = [math.comb(samples, k) * rate**k * (1 - rate) ** (samples - k) for k in range(samples + 1)]
    for count in {0, samples // 100, samples // 3, samples // 2, samples - 1, samples}:
        assert tail(count, samples, rate) == pytest.approx(math.fsum(terms[: count + 1]), rel=1e-9, abs=1e-300)


def test_tail_of_many_samples_is_normal():
    samples, rate = 10**6, 0.05
    z = (49_500 + 0.5 - samples * rate) / math.sqrt(samples * rate * (1 - rate))
    assert tail(49_500, samples, rate) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), rel=0.01)


def test_upper_bound_by_hand():
    assert upper_bound(0, 100, DELTA) == pytest.approx(1 - DELTA ** (1 / 100), rel=1e-12)
    assert upper_bound(0, 1, DELTA) == pytest.approx(1 - DELTA, rel=1e-12)
    assert upper_bound(1, 1, DELTA) == 1.0
    assert upper_bound(99, 100, DELTA) == pytest.approx((1 - DELTA) ** (1 / 100), rel=1e-12)


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_upper_bound_and_p_value_agree(count):
    limit = upper_bound(count, 200, DELTA)
    assert tail(count, 200, limit) <= DELTA < tail(count, 200, math.nextafter(limit, 0) - 1e-12)
    assert upper_bound(count, 200, DELTA) < upper_bound(count + 1, 200, DELTA)
    assert upper_bound(count, 201, DELTA) < upper_bound(count, 200, DELTA) < upper_bound(count, 200, DELTA / 2)


@pytest.mark.parametrize("truth", [ALPHA, 0.07, 0.3])
def test_p_value_is_valid(truth):
    """Where the rate is the limit or more, the chance of a p-value of u or less is at most u."""
    p_values = [tail(count, 60, ALPHA) for count in range(61)]
    for u in p_values:
        largest = max(count for count, p_value in enumerate(p_values) if p_value <= u)
        assert tail(largest, 60, truth) <= u


def test_p_value_is_below_hoeffding_bentkus():
    """Theirs (arXiv 2110.01052) is the lesser of exp(-n KL(observed, limit)) and e times the binomial tail."""
    for samples, count in ((60, 1), (500, 10), (500, 20), (5000, 200)):
        seen = count / samples
        divergence = seen * math.log(seen / ALPHA) + (1 - seen) * math.log((1 - seen) / (1 - ALPHA))
        p_value = tail(count, samples, ALPHA)
        assert p_value < 0.9 * min(math.exp(-samples * divergence), math.e * p_value)


@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.1), (0.01, 0.05), (0.3, 0.5), (0.9, 0.2)])
def test_samples_needed_without_disagreement(alpha, delta):
    needed = samples_needed(alpha, delta)
    assert (1 - alpha) ** needed <= delta < (1 - alpha) ** (needed - 1)


def test_samples_needed_by_hand():
    assert samples_needed(0.05, 0.1) == 45
    assert samples_needed(0.01, 0.1) == 230
    assert samples_needed(0.01, 0.05) == 299


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.03, 0.045, 0.0499])
def test_samples_needed_at_a_rate(rate):
    """With as many disagreements as then expected the test passes, and with fewer samples at that rate it does not."""
    needed = samples_needed(ALPHA, DELTA, rate)
    assert tail(math.floor(rate * needed), needed, ALPHA) <= DELTA
    assert tail(math.ceil(rate * (needed - 1)), needed - 1, ALPHA) > DELTA
    assert needed >= samples_needed(ALPHA, DELTA)


def test_no_number_of_samples_shows_what_is_not_so():
    assert samples_needed(ALPHA, DELTA, ALPHA) is None
    assert samples_needed(ALPHA, DELTA, 1.0) is None


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, NAN])
def test_shares_out_of_range(train, policies, share):
    for call in (
        lambda: tail(1, 2, share),
        lambda: upper_bound(1, 2, share),
        lambda: samples_needed(share, DELTA),
        lambda: samples_needed(ALPHA, share),
        lambda: thresholds_within(train, share),
        lambda: certify(train, policies, share, DELTA),
        lambda: certify(train, policies, ALPHA, share),
        lambda: bound(train, policies[0], share),
    ):
        with pytest.raises(InputError, match="between 0 and 1"):
            call()


@pytest.mark.parametrize(("count", "samples"), [(-1, 5), (6, 5), (0, 0)])
def test_counts_out_of_range(count, samples):
    with pytest.raises(InputError, match="count="):
        tail(count, samples, ALPHA)
    with pytest.raises(InputError, match="count="):
        upper_bound(count, samples, DELTA)


# ---------------------------------------------------------------- policies


def by_hand(data, thresholds):
    """Answers that differ, and the mean cost: prompt by prompt, gate by gate."""
    changed, cost = 0, 0.0
    for row in range(data.samples):
        left = False
        for layer, threshold in enumerate(thresholds.tolist()):
            if threshold == INF:
                continue
            cost += data.gate_costs[layer].item()
            if data.margins[row, layer].item() > threshold:
                changed, cost, left = (
                    changed + int(data.differs[row, layer]),
                    cost + data.costs[row, layer].item(),
                    True,
                )
                break
        if not left:
            cost += data.costs[row, -1].item()
    return changed, cost / data.samples


@pytest.mark.parametrize("seed", range(4))
def test_measure_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randint(-2, 3, (40, 5), generator=generator).float()  # many ties
    margins[torch.rand(40, 5, generator=generator) < 0.2] = NAN
    costs = torch.rand(40, 6, generator=generator)
    data = ExitOutcomes(
        margins, torch.rand(40, 5, generator=generator) < 0.5, costs, torch.rand(5, generator=generator)
    )
    for thresholds in ([0.0] * 5, [INF] * 5, [1, INF, 0, INF, -1], [-9.0] * 5, [INF, INF, INF, INF, 2]):
        outcome = measure(data, torch.tensor(thresholds, dtype=torch.float64))
        changed, cost = by_hand(data, torch.tensor(thresholds))
        assert outcome.changed == changed
        assert outcome.cost == pytest.approx(cost)


def test_ties_and_nan_keep():
    data = outcomes([[1.0, 2.0], [NAN, 1.5], [1.5, NAN], [NAN, NAN]], torch.ones(4, 2, dtype=torch.bool))
    assert data.exits(torch.tensor([1.0, 1.5])).tolist() == [1, 2, 0, 2]


def test_thresholds_decide_alike_in_float32():
    """A threshold between two float32 numbers would pass a margin here that a float32 gate keeps."""
    margin = torch.tensor([[0.3]])
    between = torch.tensor([math.nextafter(margin.item(), 0)], dtype=torch.float64)
    data = outcomes(margin, [[False]])
    assert data.exits(between).item() == 0
    assert not bool(margin > between.item())
    assert data.exits(as_stored(between)).item() == 1


def test_greedy_keeps_the_limit_and_saves(train):
    outcome = measure(train, thresholds_within(train, ALPHA))
    assert outcome.changed <= ALPHA * train.samples
    assert outcome.cost < 0.9 * FULL
    costs = [measure(train, thresholds_within(train, alpha)).cost for alpha in (0.01, 0.05, 0.2, 0.5)]
    assert all(later < earlier for earlier, later in pairwise(costs))


def test_greedy_finds_the_perfect_gate():
    """Layer 1 is right for all; layer 0 is wrong for those its gate is surest of."""
    margins = torch.arange(20.0)[:, None].repeat(1, 3)
    differs = torch.zeros(20, 3, dtype=torch.bool)
    differs[:, 0] = True
    chosen = thresholds_within(outcomes(margins, differs), 0.04)
    assert chosen.isfinite().tolist() == [False, True, False]
    assert measure(outcomes(margins, differs), chosen).cost == 2.0


def test_greedy_counts_what_gates_cost(train):
    used = [
        int(thresholds_within(draw(3000, seed=1, gate_cost=cost), ALPHA).isfinite().sum()) for cost in (0.0, 0.1, 0.3)
    ]
    assert used[0] > used[1] > used[2] > 0
    with pytest.raises(CalibrationError, match="cost more than they save"):
        thresholds_within(draw(3000, seed=1, gate_cost=5.0), ALPHA)


def greedy_by_hand(data, may_change):
    """The search as documented, with each step measured as a whole; for margins of few distinct values."""
    thresholds = torch.full((data.layers,), INF, dtype=torch.float64)

    def measured(layer, level):
        return measure(data, thresholds.clone().index_fill_(0, torch.tensor(layer), level))

    while True:
        now, best, step = measure(data, thresholds), 0.0, None
        for layer in range(data.layers):
            values = data.margins[:, layer].unique().tolist()
            for level in [*reversed([v for v in values if v == v]), min(values) - 1]:
                then = measured(layer, level)
                saved, changed = data.samples * (now.cost - then.cost), max(then.changed - now.changed, 0.5)
                if level < thresholds[layer] and then.changed <= may_change and saved > 1e-9 and saved / changed > best:
                    best, step = saved / changed, (layer, level)
        if step is None:
            break
        thresholds[step[0]] = step[1]
    for layer in reversed(range(data.layers)):
        now, then = measure(data, thresholds), measured(layer, INF)
        if then.cost < now.cost and then.changed <= now.changed:
            thresholds[layer] = INF
    return thresholds


def test_greedy_against_a_slow_search():
    """With costs of each prompt's own, and gates that cost much or little; some layers are dropped at the end."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        margins = torch.randint(-3, 4, (40, 5), generator=generator).float()
        margins[torch.rand(40, 5, generator=generator) < 0.1] = NAN
        differs = torch.rand(40, 5, generator=generator) < torch.linspace(0.5, 0.1, 5)
        costs = torch.arange(1.0, 7.0) + torch.rand(40, 6, generator=generator)
        data = ExitOutcomes(margins, differs, costs, torch.rand(5, generator=generator))
        assert torch.equal(thresholds_within(data, 0.3), greedy_by_hand(data, 12))


def test_greedy_drops_a_layer_that_others_made_useless():
    """Nine of ten leave after layer 1 and no answer changes, so it comes first; then all nine leave after layer 0."""
    margins = torch.tensor([[5.0, 5.0]] * 9 + [[-5.0, -5.0]])
    differs = torch.tensor([[True, False]] + [[False, False]] * 8 + [[True, True]])
    data = outcomes(margins, differs, gate_cost=0.3, costs=[1.0, 2.0, 9.0])
    assert thresholds_within(data, 0.01).isfinite().tolist() == [False, True]
    assert thresholds_within(data, 0.1).isfinite().tolist() == [True, False]


def test_thresholds_are_float32_numbers(train, policies):
    for thresholds in (thresholds_within(train, ALPHA), thresholds_for_speedup(train, 3.0), policies):
        assert torch.equal(thresholds, as_stored(thresholds))


def test_greedy_is_deterministic(train):
    assert torch.equal(thresholds_within(train, ALPHA), thresholds_within(train, ALPHA))
    assert torch.equal(thresholds_for_speedup(train, 1.2), thresholds_for_speedup(train, 1.2))


@pytest.mark.parametrize("target", [1.01, 1.2, 1.5, 3.0])
def test_target_speedup(train, target):
    outcome = measure(train, thresholds_for_speedup(train, target))
    assert outcome.cost <= FULL / target


def test_faster_changes_more_answers(train):
    changed = [measure(train, thresholds_for_speedup(train, target)).changed for target in (1.05, 1.2, 1.5, 3.0)]
    assert all(earlier < later for earlier, later in pairwise(changed))
    assert changed[1] < 0.1 * train.samples


def test_target_out_of_reach(train):
    with pytest.raises(CalibrationError, match="out of reach"):
        thresholds_for_speedup(train, 100)
    for target in (1.0, 0.5, INF, NAN):
        with pytest.raises(InputError, match="above 1"):
            thresholds_for_speedup(train, target)


def test_offsets_run_from_no_exit_to_all(train):
    base = thresholds_within(train, ALPHA)
    family = offset_policies(train, base)
    assert (family.diff(dim=0)[:, base.isfinite()] <= 0).all()
    assert family[:, ~base.isfinite()].eq(INF).all()
    assert len(family) <= 501
    assert any(torch.equal(policy, base) for policy in family)
    left = [int((train.exits(policy) < LAYERS).sum()) for policy in family]
    assert left[0] == 0
    assert left[-1] > 0.95 * train.samples
    assert max(later - earlier for earlier, later in pairwise(left)) < 0.05 * train.samples


def test_offsets_of_gates_that_never_fire():
    data = outcomes([[NAN, 1.0], [NAN, 2.0]], torch.zeros(2, 2, dtype=torch.bool))
    assert torch.equal(offset_policies(data, torch.zeros(2))[:, 1].unique(), torch.tensor([0.0, 1.0, 2.0]).double())
    with pytest.raises(CalibrationError, match="No gate saves"):
        thresholds_within(outcomes([[NAN], [NAN]], [[False], [False]]), ALPHA)
    with pytest.raises(InputError, match="no layer is used"):
        offset_policies(data, torch.full((2,), INF))
    with pytest.raises(InputError, match="count=1"):
        offset_policies(data, torch.zeros(2), count=1)


# ---------------------------------------------------------------- the certificate


def test_certificate(train, policies):
    data = draw(2000, seed=2)
    certificate = certify(data, policies, ALPHA, DELTA)
    outcome = measure(data, torch.tensor(certificate.thresholds, dtype=torch.float64))
    assert (certificate.changed, certificate.expected_cost) == (outcome.changed, outcome.cost)
    assert certificate.samples == 2000
    assert certificate.risk == outcome.changed / 2000
    assert certificate.p_value == tail(outcome.changed, 2000, ALPHA) <= DELTA
    assert certificate.risk < certificate.upper_bound <= ALPHA
    assert certificate.expected_cost < 0.9 * FULL == 0.9 * certificate.full_cost
    assert 1 < certificate.tested <= len(policies)
    assert "fixed sequence" in certificate.method


def test_the_cheapest_of_those_that_pass_is_chosen():
    """A later policy may cost more: it asks a gate more, for nothing."""
    data = outcomes([[1.0, 3.0]] * 100, torch.zeros(100, 2, dtype=torch.bool), gate_cost=1.5, costs=[3.0, 4.0, 9.0])
    family = torch.tensor([[INF, INF], [INF, 2.0], [2.0, 2.0]])
    certificate = certify(data, family, ALPHA, DELTA)
    assert certificate.thresholds == (INF, 2.0)
    assert certificate.expected_cost == 4 + 1.5
    assert certificate.tested == 3


def test_the_sequence_stops_at_the_first_failure():
    margins = torch.tensor([[2.0, 1.0]] * 100)
    differs = torch.tensor([[True, False]] * 100)
    family = torch.tensor([[INF, INF], [0.0, INF], [INF, 0.0]])  # the last alone would pass
    with pytest.raises(CalibrationError, match="100 of 100"):
        certify(outcomes(margins, differs), family, ALPHA, DELTA)
    assert certify(outcomes(margins, differs), family[[0, 2]], ALPHA, DELTA).thresholds == (INF, 0.0)


def test_more_is_saved_where_more_is_allowed(policies):
    data = draw(2000, seed=2)
    for limits in (
        [(alpha, DELTA) for alpha in (0.02, 0.05, 0.1, 0.3)],
        [(ALPHA, delta) for delta in (0.001, 0.1, 0.5)],
    ):
        costs = [certify(data, policies, *limit).expected_cost for limit in limits]
        assert all(later <= earlier for earlier, later in pairwise(costs))
        assert costs[-1] < costs[0]


def test_all_answers_stay():
    data = outcomes(torch.randn(300, 3), torch.zeros(300, 3, dtype=torch.bool))
    base = thresholds_within(data, ALPHA)
    certificate = certify(data, offset_policies(data, base), ALPHA, DELTA)
    assert certificate.changed == 0
    assert certificate.expected_cost == 1.0  # all leave after the first layer
    assert certificate.upper_bound == upper_bound(0, 300, DELTA)
    with pytest.raises(CalibrationError, match="at least 45 prompts"):
        certify(rows(data, torch.arange(44)), offset_policies(data, base), ALPHA, DELTA)
    assert certify(rows(data, torch.arange(45)), offset_policies(data, base), ALPHA, DELTA).samples == 45


def test_all_answers_differ():
    """As many leave as may differ, and no more."""
    data = outcomes(
        torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1000, 3, dtype=torch.bool)
    )
    certificate = certify(data, offset_policies(data, thresholds_within(data, ALPHA)), ALPHA, DELTA)
    assert 0 < certificate.changed < ALPHA * 1000
    everywhere = torch.tensor([[-9.0, -9.0, -9.0]])
    with pytest.raises(CalibrationError, match="no number of prompts"):
        certify(data, everywhere, ALPHA, DELTA)


def test_too_few_samples_says_how_many():
    differs = torch.zeros(100, 1, dtype=torch.bool)
    differs[:4] = True
    with pytest.raises(
        CalibrationError, match=f"4 of 100 .* about {samples_needed(ALPHA, DELTA, 0.04)} prompts"
    ) as error:
        certify(outcomes(torch.ones(100, 1), differs), torch.zeros(1, 1), ALPHA, DELTA)
    assert isinstance(error.value, VTEError)
    enough = outcomes(torch.ones(900, 1), differs.repeat(9, 1))
    assert certify(enough, torch.zeros(1, 1), ALPHA, DELTA).changed == 36


def test_what_has_to_pass_first_counts_for_how_many_are_needed():
    """The first policy costs more than it saves, but is tested before the second."""
    data = outcomes(
        torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 95), torch.tensor([[True, False]] * 100), costs=[3.0, 1.0, 3.0]
    )
    with pytest.raises(CalibrationError, match=r"changes 5 of 100 answers.* no number of prompts"):
        certify(data, torch.tensor([[0.5, INF], [INF, 0.5]]), ALPHA, DELTA)


def test_nothing_saves():
    silent = outcomes(torch.full((500, 2), NAN), torch.zeros(500, 2, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="No policy saves anything"):
        certify(silent, torch.zeros(1, 2), ALPHA, DELTA)


def test_bound_of_one_policy(train):
    thresholds = thresholds_for_speedup(train, 1.3)
    data = draw(2000, seed=2)
    certificate = bound(data, thresholds, DELTA)
    assert certificate.max_disagreement == certificate.upper_bound == upper_bound(certificate.changed, 2000, DELTA)
    assert certificate.p_value == DELTA
    assert certificate.thresholds == tuple(thresholds.tolist())
    everything_wrong = outcomes(torch.ones(5, 1), torch.ones(5, 1, dtype=torch.bool))
    assert bound(everything_wrong, torch.zeros(1), DELTA).upper_bound == 1.0


# ---------------------------------------------------------------- the promise


def test_the_promise_holds_over_many_splits_and_a_naive_threshold_breaks_it():
    """Prompts are drawn from a finite population, so that each policy's true disagreement is known exactly."""
    splits, samples = 300, 500
    population = draw(20_000, seed=3)
    family = torch.linspace(3, 1, 60)[:, None].expand(-1, LAYERS)
    truth = [measure(population, policy).changed / population.samples for policy in family]
    assert truth == sorted(truth)
    assert sum(0.04 < rate < 0.06 for rate in truth) > 8  # close enough to the limit to put the promise to the test
    generator = torch.Generator().manual_seed(4)
    broken, naive_broken, costs = 0, 0, []
    for _ in range(splits):
        data = rows(population, torch.randint(population.samples, (samples,), generator=generator))
        certificate = certify(data, family, ALPHA, DELTA)
        broken += truth[family[:, 0].tolist().index(certificate.thresholds[0])] > ALPHA
        costs.append(certificate.expected_cost)
        lenient = max(n for n, policy in enumerate(family) if measure(data, policy).changed <= ALPHA * samples)
        naive_broken += truth[lenient] > ALPHA
    at_most = next(count for count in range(splits) if tail(count, splits, DELTA) > 0.999)
    assert 0.02 * splits < broken <= at_most
    assert naive_broken > 3 * at_most
    assert sum(costs) / splits < 0.92 * FULL


def test_choosing_policies_on_the_tested_prompts_breaks_the_promise():
    """Why there are two splits: gates of noise, of which the one is chosen that looks best where it is then tested."""
    generator = torch.Generator().manual_seed(5)
    broken, splits, samples, gates, rate = 0, 200, 100, 40, 0.07
    for _ in range(splits):
        differs = torch.rand(samples, gates, generator=generator) < rate
        best = int(differs.sum(0).argmin())
        alone = outcomes(torch.ones(samples, 1), differs[:, best, None])
        broken += bound(alone, torch.zeros(1), DELTA).upper_bound < rate
    assert broken > 0.5 * splits


# ---------------------------------------------------------------- answers that differ without any exit


def skipping(*differs):
    """Three prompts, two layers; the gate of layer 0 fires for the first, that of layer 1 for the second."""
    margins = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    return ExitOutcomes(margins, torch.tensor(differs), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(2))


def test_staying_may_differ_too():
    data = skipping([False, True, True], [True, False, True], [False, False, True])
    assert measure(data, torch.tensor([INF, INF])).changed == 3
    assert measure(data, torch.tensor([0.0, INF])).changed == 2
    assert measure(data, torch.tensor([0.0, 0.0])).changed == 1
    assert measure(data, torch.tensor([INF, 0.0])).changed == 2


def test_more_answers_differ_without_exits_than_may():
    data = skipping([False, False, True], [False, False, False], [False, False, True])
    with pytest.raises(CalibrationError, match=r"Skips and adapters alone change 2 of the 3 .* more than 50\.00%"):
        thresholds_within(data, 0.5)
    assert measure(data, thresholds_within(data, 0.7)).changed <= 2


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("margins", [[1.0, 2.0]], r"margins: expected a torch.Tensor, got list"),
        ("margins", torch.zeros(4), r"margins: expected \[n, L\] floating point, got \[4\] float32"),
        ("margins", torch.zeros(0, 2), "margins"),
        ("margins", torch.zeros(4, 0), "margins"),
        ("margins", torch.zeros(4, 2, dtype=torch.long), r"got \[4, 2\] int64"),
        ("differs", torch.zeros(4, 4, dtype=torch.bool), r"differs: expected \[4, 3\] bool, or \[4, 2\]"),
        ("differs", torch.zeros(4, 2), "bool, or .* float32"),
        ("costs", torch.zeros(2), r"costs: expected \[4, 3\] or \[3\]"),
        ("costs", torch.tensor([1.0, 2.0, NAN]), "costs: expected finite"),
        ("costs", torch.tensor([1.0, -2.0, 3.0]), "costs: expected finite"),
        ("gate_costs", torch.zeros(3), r"gate_costs: expected \[2\]"),
        ("gate_costs", torch.tensor([0.0, INF]), "gate_costs: expected finite"),
    ],
)
def test_bad_outcomes(field, value, message):
    fields = {
        "margins": torch.zeros(4, 2),
        "differs": torch.zeros(4, 2, dtype=torch.bool),
        "costs": torch.ones(3),
        "gate_costs": torch.zeros(2),
    }
    ExitOutcomes(**fields)
    with pytest.raises(InputError, match=message):
        ExitOutcomes(**fields | {field: value})


@pytest.mark.parametrize(
    "thresholds", [torch.zeros(LAYERS - 1), torch.zeros(1, LAYERS), torch.zeros(LAYERS, dtype=torch.long)]
)
def test_bad_shapes_of_thresholds(train, thresholds):
    for call in (measure, offset_policies, lambda data, values: bound(data, values, DELTA)):
        with pytest.raises(InputError, match=r"thresholds: expected \[6\] floating point"):
            call(train, thresholds)


@pytest.mark.parametrize("value", [NAN, -INF])
def test_bad_thresholds(train, value):
    with pytest.raises(InputError, match="NaN or -inf"):
        measure(train, torch.full((LAYERS,), value))


def test_bad_policies(train):
    for family in (torch.zeros(LAYERS), torch.zeros(0, LAYERS)):
        with pytest.raises(InputError, match="policies"):
            certify(train, family, ALPHA, DELTA)
    with pytest.raises(InputError, match="thresholds"):
        certify(train, torch.zeros(3, LAYERS + 1), ALPHA, DELTA)
