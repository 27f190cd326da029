"""Intervals over episodes by simulation, theorem 1 by Monte Carlo, the planner by brute force and simulation."""

import numpy as np
import pytest

from common import statistics


def beta(a, deviation):
    """Parameters of the Beta distribution with this mean and standard deviation."""
    size = a * (1 - a) / deviation**2 - 1
    return a * size, (1 - a) * size


def draw_hits(rng, a, deviation, episodes, queries, benchmarks):
    """Right answers [benchmarks, episodes]: accuracies from a Beta distribution, queries independent given them."""
    shape = (benchmarks, episodes)
    accuracies = np.full(shape, a) if deviation == 0 else rng.beta(*beta(a, deviation), shape)
    return rng.binomial(queries, accuracies)


def coverage(a, deviation, episodes, queries, benchmarks=10_000):
    hits = draw_hits(np.random.default_rng(0), a, deviation, episodes, queries, benchmarks)
    intervals = {}  # of the same hits in another order too: computed once
    for row in map(tuple, np.sort(hits, 1)):
        if row not in intervals:
            intervals[row] = statistics.benchmark_accuracy(row, [queries] * episodes)["ci95"]
    inside = [intervals[row][0] <= a <= intervals[row][1] for row in map(tuple, np.sort(hits, 1))]
    return np.mean(inside)


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


def test_differences_cover_the_truth():
    """Two methods that answer alike mostly; who is right where they differ is decided per episode."""
    rng, benchmarks, queries = np.random.default_rng(1), 3000, 75
    for differ, share, episodes in ((0.1, 0.5, 5), (0.1, 0.7, 30), (0.03, 0.6, 10), (0.2, 0.9, 3)):
        inside = 0
        for _ in range(benchmarks):
            shares = rng.beta(10 * share, 10 * (1 - share), (episodes, 1))
            differs, first = rng.random((episodes, queries)) < differ, rng.random((episodes, queries)) < shares
            a, b = (differs & first).astype(int), (differs & ~first).astype(int)
            low, high = statistics.benchmark_difference(a.tolist(), b.tolist())["ci95"]
            inside += low <= differ * (2 * share - 1) <= high
        assert 0.93 <= inside / benchmarks <= 0.985, (differ, share, episodes, inside / benchmarks)


def test_methods_that_never_differ_have_an_interval_around_zero():
    same = [[1, 0, 1, 1] * 5] * 6
    result = statistics.benchmark_difference(same, same)
    low, high = result["ci95"]
    assert result["mean"] == 0 and low == pytest.approx(-high) and 0.001 < high < 0.1


def test_theorem_1_and_the_unbiased_variance_by_monte_carlo():
    a, deviation, episodes, queries = 0.85, 0.08, 6, 20
    hits = draw_hits(np.random.default_rng(2), a, deviation, episodes, queries, 100_000)
    means = hits.mean(1) / queries
    assert means.var() == pytest.approx(statistics.variance_of_mean(a, deviation**2, episodes, queries), rel=0.02)
    estimates = [statistics.episode_variance(row, [queries] * episodes) for row in hits[:20_000]]
    error = np.std(estimates) / len(estimates) ** 0.5
    assert np.mean(estimates) == pytest.approx(deviation**2, abs=4 * error) and error < 0.1 * deviation**2
    shares = statistics.benchmark_accuracy(hits[0], [queries] * episodes)
    assert shares["s2"] == pytest.approx(max(0, estimates[0]))


def test_the_plan_is_the_cheapest_of_all():
    """Against trying every number of queries and of episodes."""
    for a, s2, episode, query, half_width in (
        (0.9, 0.0025, 100, 0.1, 0.02), (0.8, 0.0004, 1, 0.05, 0.03), (0.95, 0.001, 5, 0.001, 0.01),
        (0.7, 0.01, 0.01, 1, 0.05),
    ):  # fmt: skip
        best, others = statistics.plan(a, s2, episode, query, half_width=half_width, max_queries=600)
        assert best["half_width"] <= half_width
        costs = []
        for queries in range(1, 601):
            for episodes in range(2, 3000):
                if statistics.expected_half_width(a, s2, episodes, queries) <= half_width:
                    costs.append(episodes * (episode + queries * query))
                    break
        assert best["seconds"] <= 1.01 * min(costs)
        assert all(row["seconds"] >= best["seconds"] and row["half_width"] <= half_width for row in others)

        spent, _ = statistics.plan(a, s2, episode, query, budget_seconds=best["seconds"], max_queries=600)
        assert spent["seconds"] <= best["seconds"] and spent["half_width"] <= 1.002 * best["half_width"]


def test_planned_benchmarks_have_the_half_width_that_the_plan_expects():
    rng = np.random.default_rng(3)
    for a, deviation, half_width in ((0.8, 0.08, 0.03), (0.93, 0.04, 0.01), (0.6, 0.1, 0.05)):
        best, _ = statistics.plan(a, deviation**2, 60, 0.2, half_width=half_width)
        hits = draw_hits(rng, a, deviation, best["num_episodes"], best["num_queries"], 300)
        counts = [best["num_queries"]] * best["num_episodes"]
        widths = [np.diff(statistics.benchmark_accuracy(row, counts)["ci95"])[0] / 2 for row in hits]
        assert np.mean(widths) == pytest.approx(best["half_width"], rel=0.1)


def test_impossible_plans_are_refused():
    for numbers in ((1.0, 0.001, 1, 1), (0.9, 0.2, 1, 1), (0.9, 0.01, -1, 1), (0.9, 0.01, 0, 0)):
        with pytest.raises(ValueError):
            statistics.plan(*numbers, half_width=0.01)
    with pytest.raises(ValueError, match="half-width"):
        statistics.plan(0.9, 0.01, 1, 1, half_width=-0.01)
    with pytest.raises(ValueError, match="do not pay"):
        statistics.plan(0.9, 0.01, 10, 1, budget_seconds=15)
