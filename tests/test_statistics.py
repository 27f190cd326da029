"""Intervals over episodes by simulation, theorem 1 by Monte Carlo, the planner by brute force and simulation."""

from functools import partial

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import t as student_t

from benchmarks import planner
from common import planning, statistics
from common.statistics import Moments


def beta(a, deviation):
    """Parameters of the Beta distribution with this mean and standard deviation."""
    size = a * (1 - a) / deviation**2 - 1
    return a * size, (1 - a) * size


def draw_hits(rng, a, deviation, episodes, queries, benchmarks):
    """Right answers [benchmarks, episodes]: accuracies from a Beta distribution, queries independent given them."""
    shape = (benchmarks, episodes)
    accuracies = np.full(shape, a) if deviation == 0 else rng.beta(*beta(a, deviation), shape)
    return rng.binomial(queries, accuracies)


def known(a, s2):
    """Moments of an accuracy whose variance over episodes is known."""
    return Moments(0, a, a, a - a**2 - s2, s2, np.inf, np.inf)


def coverage(a, deviation, episodes, queries, benchmarks=10_000):
    hits = draw_hits(np.random.default_rng(0), a, deviation, episodes, queries, benchmarks)[..., None]
    m = statistics.moments(hits, hits, np.full_like(hits, queries))
    low, high = statistics.interval(m, statistics.squared_margin(m) / episodes)
    for i in range(3):
        one = statistics.benchmark_accuracy(hits[i], np.full((episodes, 1), queries))
        assert one["ci95"] == pytest.approx([low[i], high[i]])
    return np.mean((low <= a) & (a <= high))


@pytest.mark.parametrize(
    ("a", "deviation", "episodes", "queries"),
    [
        (0.6, 0.0, 3, 75), (0.6, 0.1, 3, 15), (0.6, 0.1, 20, 75), (0.8, 0.05, 3, 400), (0.8, 0.1, 5, 75),
        (0.8, 0.02, 10, 75), (0.8, 0.1, 100, 75), (0.9, 0.05, 30, 150), (0.95, 0.02, 10, 75), (0.95, 0.03, 20, 400),
        (0.99, 0.0, 20, 75), (0.99, 0.005, 20, 400), (0.99, 0.01, 100, 75), (0.99, 0.0, 100, 15),
    ],
)  # fmt: skip
def test_intervals_cover_the_truth_in_93_to_97_percent(a, deviation, episodes, queries):
    assert 0.93 <= coverage(a, deviation, episodes, queries) <= 0.97


@pytest.mark.parametrize(
    ("a", "deviation", "episodes", "queries"), [(0.95, 0.05, 7, 400), (0.99, 0.0, 3, 15), (0.99, 0.02, 3, 75)]
)
def test_where_an_interval_is_less_exact_it_is_nearly_or_more_than_sure(a, deviation, episodes, queries):
    """The two kinds of corners that the docstring names: a long tail at 1, and hardly any wrong answer."""
    assert coverage(a, deviation, episodes, queries) >= 0.92


def test_600_episodes_and_all_right():
    assert 0.93 <= coverage(0.85, 0.07, 600, 75, 2000) <= 0.97
    low, high = statistics.benchmark_accuracy([75] * 10, [75] * 10)["ci95"]
    assert high == pytest.approx(1) and 0.98 < low < 1  # no error in 750 queries: some in a hundred are still possible
    assert statistics.benchmark_accuracy([70], [75])["ci95"] == pytest.approx(statistics.wilson_interval(70, 75))


def score_test(only_a, only_b, count, difference):
    """The score statistic of matched proportions, its nuisance parameter by maximising the likelihood numerically."""

    def loss(q):
        both = [(only_a, q + difference), (only_b, q), (count - only_a - only_b, 1 - 2 * q - difference)]
        return -sum(n * np.log(max(p, 1e-300)) for n, p in both if n)

    bounds = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (only_a - only_b - count * difference) / np.sqrt(count * (2 * q + difference * (1 - difference)))


def test_paired_intervals_are_tangos_and_stay_between_minus_one_and_one():
    for only_a, only_b, count in ((5, 3, 48), (9, 2, 20), (0, 4, 30), (1, 0, 12), (12, 12, 25)):
        a = [1] * only_a + [0] * (count - only_a)
        b = [0] * only_a + [1] * only_b + [0] * (count - only_a - only_b)
        mean, low, high = statistics.paired_difference(a, b)
        assert mean == pytest.approx((only_a - only_b) / count)
        for end, side, z in ((low, -1, statistics.Z95), (high, 1, -statistics.Z95)):
            counts = only_a, only_b, count
            beyond = partial(lambda counts, z, d: score_test(*counts, d) - z, counts, z)
            expected = brentq(beyond, mean + side * 1e-6, side * 0.999)
            assert end == pytest.approx(expected, abs=1e-5)
    for a, b in (([1], [0]), ([0], [1]), ([1], [1]), ([1] * 3, [0] * 3)):
        mean, low, high = statistics.paired_difference(a, b)
        assert -1 <= low <= mean <= high <= 1 and high - low > 0.5
        mean, low, high = (statistics.benchmark_difference([[a]] * 2, [[b]] * 2)[k] for k in ("mean", "ci95", "ci95"))
        assert -1 <= low[0] <= mean <= high[1] <= 1


def test_differences_cover_the_truth():
    """Two methods that answer alike mostly; who is right where they differ is decided per episode."""
    rng, benchmarks, queries = np.random.default_rng(1), 3000, 15
    for differ, share, episodes in ((0.1, 0.5, 5), (0.1, 0.7, 30), (0.03, 0.6, 10), (0.2, 0.9, 3), (0.01, 0.5, 10)):
        shares = rng.beta(10 * share, 10 * (1 - share), (benchmarks, episodes, 1))
        differs = rng.binomial(queries, differ, (benchmarks, episodes, 5))
        first = rng.binomial(differs, shares)
        m = statistics.moments(2 * first - differs, differs, np.full_like(differs, queries), lowest=-1)
        low, high = statistics.interval(m, statistics.squared_margin(m) / episodes)
        inside = np.mean((low <= differ * (2 * share - 1)) & (differ * (2 * share - 1) <= high))
        assert 0.93 <= inside <= 0.985, (differ, share, episodes, inside)


def test_methods_that_never_differ_have_an_interval_around_zero():
    same = [[[1, 0, 1, 1] * 5] * 2] * 6
    result = statistics.benchmark_difference(same, same)
    low, high = result["ci95"]
    assert result["mean"] == 0 and low == pytest.approx(-high) and 0.001 < high < 0.1


def theorem_1(a, s2, num_episodes, num_queries):
    """Var(a_hat): a in [0, 1], s2 in [0, a - a^2]."""
    return s2 / num_episodes + (a - a**2 - s2) / (num_episodes * num_queries)


def test_theorem_1_and_the_unbiased_variance_by_monte_carlo():
    a, deviation, episodes, queries = 0.85, 0.08, 6, 20
    hits = draw_hits(np.random.default_rng(2), a, deviation, episodes, queries, 100_000)
    means = hits.mean(1) / queries
    assert means.var() == pytest.approx(theorem_1(a, deviation**2, episodes, queries), rel=0.02)
    estimates = [statistics.accuracy_moments(row, [queries] * episodes).s2 for row in hits[:5000]]
    error = np.std(estimates) / len(estimates) ** 0.5
    assert np.mean(estimates) == pytest.approx(deviation**2, abs=4 * error) and error < 0.1 * deviation**2
    shares = statistics.benchmark_accuracy(hits[0], [queries] * episodes)
    assert shares["s2"] == pytest.approx(max(0, estimates[0]))


def test_the_variance_over_episodes_is_unbiased_for_queries_in_equal_numbers_a_class():
    """Classes of very different accuracy: single queries vary less than a (1 - a), since none is left to chance."""
    rng = np.random.default_rng(5)
    classes, deviation = np.array([0.99, 0.97, 0.90, 0.75, 0.60]), 0.027
    easier = rng.uniform(-1, 1, (50_000, 10, 1)) * np.array([0.01, 0.03, 0.1, 0.1, 0.1]) * deviation * 3**0.5 / 0.068
    hits = rng.binomial(15, classes + easier)
    m = statistics.moments(hits, hits, np.full_like(hits, 15))
    assert m.s2.mean() == pytest.approx(deviation**2, rel=0.02)
    pooled = statistics.moments(*(x.sum(-1, keepdims=True) for x in (hits, hits, np.full_like(hits, 15))))
    assert pooled.s2.mean() < 0.65 * deviation**2  # what pretends that the classes of queries were drawn at random

    one = statistics.benchmark_accuracy(hits[0], np.full((10, 5), 15))
    assert one["s2"] == pytest.approx(max(0, m.s2[0])) and one["num_queries"] == 750
    assert statistics.benchmark_accuracy(hits[0] > 14, np.ones((10, 5)))["s2"] is None


def test_the_theorem_for_differences_by_monte_carlo():
    """Var = s2 / P + v / (P Q) of the mean difference, and unbiased estimates of s2 and v, from classes that differ."""
    rng, runs, episodes, queries = np.random.default_rng(6), 100_000, 6, 5
    differ = np.array([0.05, 0.1, 0.2, 0.4])
    shares = rng.beta(3, 2, (runs, episodes, 1))
    differs = rng.binomial(queries, differ, (runs, episodes, 4))
    sums = 2 * rng.binomial(differs, shares) - differs
    true = differ * (2 * shares - 1)  # of each class and episode
    s2, v = true.mean(-1).var(), (differ - true**2).mean()
    total = differ.mean() - true.mean() ** 2 - s2 - true.var(-1).mean()  # v as the docstring has it
    assert v == pytest.approx(total, rel=0.01)
    means = sums.sum(-1) / (4 * queries)
    assert means.mean(1).var() == pytest.approx((s2 + v / (4 * queries)) / episodes, rel=0.02)
    m = statistics.moments(sums, differs, np.full_like(differs, queries), lowest=-1)
    assert m.s2.mean() == pytest.approx(s2, rel=0.02) and m.query_variance.mean() == pytest.approx(v, rel=0.01)
    assert m.square.mean() == pytest.approx(differ.mean(), rel=0.01)


def test_the_plan_is_the_cheapest_of_all():
    """Against trying every number of queries and of episodes."""
    episodes, queries = np.arange(2, 3000)[:, None], np.arange(1, 601)
    for a, s2, episode, query, half_width in (
        (0.9, 0.0025, 100, 0.1, 0.02), (0.8, 0.0004, 1, 0.05, 0.03), (0.95, 0.001, 5, 0.001, 0.01),
        (0.7, 0.01, 0.01, 1, 0.05),
    ):  # fmt: skip
        found = planning.plan(known(a, s2), episode, query, half_width=half_width, max_queries=600)
        best = found["plan"]
        assert best["half_width"] <= half_width * (1 + 1e-6)
        variance = theorem_1(a, s2, episodes, queries)
        trials = a * (1 - a) / variance / student_t.ppf(0.975, episodes - 1) ** 2
        low, high = statistics.wilson_interval(a * trials, trials, 1)
        costs = np.where(high - low <= 2 * half_width, episodes * (episode + queries * query), np.inf)
        assert best["seconds"] == pytest.approx(costs.min(), rel=1e-6)
        assert all(row["seconds"] >= best["seconds"] for row in found["alternatives"])
        assert found["low"] == found["high"] == best

        spent = planning.plan(known(a, s2), episode, query, budget_seconds=best["seconds"], max_queries=600)["plan"]
        assert spent["seconds"] <= best["seconds"] * (1 + 1e-9) and spent["half_width"] <= 1.002 * best["half_width"]


def test_planned_benchmarks_have_the_half_width_that_the_plan_expects():
    rng = np.random.default_rng(3)
    for a, deviation, half_width in ((0.8, 0.08, 0.03), (0.93, 0.04, 0.01), (0.6, 0.1, 0.05)):
        best = planning.plan(known(a, deviation**2), 60, 0.2, half_width=half_width, max_queries=1000)["plan"]
        hits = draw_hits(rng, a, deviation, best["num_episodes"], best["num_queries"], 300)
        counts = [best["num_queries"]] * best["num_episodes"]
        widths = [np.diff(statistics.benchmark_accuracy(row, counts)["ci95"])[0] / 2 for row in hits]
        assert np.mean(widths) == pytest.approx(best["half_width"], rel=0.1)


def test_the_range_of_the_variance_after_a_pilot_is_right():
    """Bayes by simulation: s2 drawn from the prior, pilots that look alike kept; s2 is in the 90% range in 90%."""
    rng, queries, a = np.random.default_rng(4), 75, 0.8
    noise = a * (1 - a) / queries
    total = noise * np.exp(rng.uniform(0, np.log(30), 200_000))  # a flat prior of log(s2 + v / Q), s2 >= 0
    spread = total * rng.chisquare(9, len(total)) / 9
    for seen in (0.5 * noise, noise, 3 * noise):
        alike = total[np.abs(np.log(spread / seen)) < 0.03] - noise
        m = Moments(0, a, a, a * (1 - a), seen, 10, queries)
        low, middle, high = planning.variance_range(m)
        assert np.mean(alike < low) == pytest.approx(0.05, abs=0.025)
        assert np.mean(alike < middle) == pytest.approx(0.5, abs=0.05)
        assert np.mean(alike > high) == pytest.approx(0.05, abs=0.025)
        assert 0 < low < middle < high


def test_plans_have_the_range_that_the_pilot_allows():
    pilot = Moments(0, 0.95, 0.95, 0.047, 0.0009, 10, 75)
    found = planning.plan(pilot, 100, 0.1, half_width=0.01, max_queries=500, ways=5)
    best, (low, high) = found["plan"], found["plan"]["range"]
    assert low < best["half_width"] <= 0.01 and high > 1.3 * best["half_width"]
    assert found["low"]["seconds"] < best["seconds"] < 0.7 * found["high"]["seconds"]
    assert all(row["num_queries"] % 5 == 0 for row in (best, found["low"], found["high"], *found["alternatives"]))
    exact = planning.plan(known(0.95, pilot.s2), 100, 0.1, half_width=0.01, max_queries=500, ways=5)["plan"]
    assert best["num_episodes"] > 1.2 * exact["num_episodes"]  # Student's quantile of 9 degrees of freedom


@pytest.mark.parametrize("name", ["few queries", "near 1", "difference"])
def test_two_stage_benchmarks_hold_what_they_promise(name):
    setting = next(s for s in planner.SETTINGS if s.name == name)
    for pilot in (5, 30):
        truth, narrow, costs, stages = planner.simulate(setting, pilot, 150, np.random.default_rng(pilot))
        assert truth.mean() >= 0.9 and narrow.mean() >= 0.9  # 95% of 150: 3 standard deviations are 5 points
        assert np.median(costs) <= 2 and stages.min() >= 1 and stages.max() > 1


def test_impossible_plans_are_refused():
    for seconds in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="cost something"):
            planning.plan(known(0.9, 0.01), *seconds, half_width=0.01)
    with pytest.raises(ValueError, match="half-width"):
        planning.plan(known(0.9, 0.01), 1, 1, half_width=-0.01)
    with pytest.raises(ValueError, match="do not pay"):
        planning.plan(known(0.9, 0.01), 10, 1, budget_seconds=15)
