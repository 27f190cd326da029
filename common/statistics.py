"""Accuracy with honest intervals, on images and over few-shot episodes, and the cheapest benchmark for a wanted one.

An episode p has a true accuracy a_p, of mean a and variance s2 over episodes, and Q queries. The mean of P episodes has

    Var(a_hat) = s2 / P + (a - a^2 - s2) / (P Q)                        (Landolsi and Kahl, 2406.03146, theorem 1)
"""

import math
from functools import cache
from itertools import combinations

import numpy as np
from scipy.stats import t as student_t

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson_interval(correct, count, z=Z95):
    """The Wilson score interval (1927) of a proportion: (low, high) in [0, 1], sound near 0 and 1 and for few images.

    Args:
        correct: number of successes in `count` independent trials, count > 0.
    """
    p = correct / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def accuracy(correct):
    """{"mean", "ci95": Wilson's, "count"} of right and wrong answers [N], a boolean tensor, N > 0."""
    hits, count = int(correct.sum()), len(correct)
    return {"mean": hits / count, "ci95": list(wilson_interval(hits, count)), "count": count}


def paired_difference(a, b, z=Z95):
    """How much more often `a` is right than `b` on the same trials, with its 95% interval: (difference, low, high).

    The interval is that of Agresti and Min (2005) for matched pairs: Wald's after adding half a trial to each of the
    four outcomes, which keeps its coverage where the two seldom differ.

    Args:
        a, b: 1 or 0 for right or wrong, of each trial in the same order.
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, p, q = len(a) + 2, only_a + 0.5, only_b + 0.5
    middle = (p - q) / n
    half = z * math.sqrt((p + q) / n - middle**2) / math.sqrt(n)
    return (only_a - only_b) / len(a), middle - half, middle + half


@cache
def student_quantile(degrees):
    """The 97.5% quantile of Student's t distribution."""
    return float(student_t.ppf(0.975, degrees))


def pairs_of(names):
    """Pairs (a, b) of methods to compare as a minus b: b is named before a."""
    return [(a, b) for b, a in combinations(names, 2)]


def variance_of_mean(a, s2, num_episodes, num_queries):
    """Var(a_hat) of theorem 1: a in [0, 1], s2 in [0, a - a^2]."""
    return s2 / num_episodes + (a - a**2 - s2) / (num_episodes * num_queries)


def episode_variance(hits, counts):
    """An unbiased estimate of s2, which may come out negative: Var(hits / counts) - mean of a_p (1 - a_p) / (Q_p - 1).

    Args:
        hits, counts: right answers and queries of each episode [P], P >= 2 and each count >= 2.
    """
    hits, counts = np.asarray(hits, float), np.asarray(counts, float)
    a = hits / counts
    return a.var(ddof=1) - (a * (1 - a) / (counts - 1)).mean()


def benchmark_accuracy(hits, counts):
    """Mean accuracy over episodes, each of equal weight, with a 95% interval for a.

    The interval is Wilson's, with the number of trials at which independent queries would vary as much as the
    episodes' accuracies do, a_hat (1 - a_hat) P / Var(a_p), and Student's quantile for P - 1 degrees of freedom. Where
    episodes happen to vary less than single queries alone would make them, the latter counts. In simulated benchmarks
    it covers a in 93 to 97%, except where there are fewer than some eight wrong answers in all (more than 97%: it is
    too wide), and where most episodes are faultless and a few are bad, which no small sample shows (accuracies of
    0.95 +- 0.1: 85% for 10 episodes, 89% for 20, 94% for 100). One episode shows the spread of its queries only: the
    interval is then Wilson's own, and speaks of that episode.

    Args:
        hits, counts: right answers and queries of each episode [P].
    Returns:
        {"mean", "ci95": [low, high], "s2": variance over episodes, at least 0, or None where it cannot be known (one
        episode, or episodes of one query), "episode_share": share of Var(a_hat) that comes from episodes, or None,
        "num_episodes", "num_queries": of all episodes}
    """
    hits, counts = np.asarray(hits, float), np.asarray(counts, float)
    episodes, queries = len(hits), int(counts.sum())
    mean, s2, share = float((hits / counts).mean()), None, None
    if episodes == 1:
        interval = wilson_interval(int(hits[0]), queries)
    else:
        spread = (hits / counts).var(ddof=1)
        smoothed = (hits.sum() + 0.5) / (queries + 1)  # away from 0 and 1
        binomial = smoothed * (1 - smoothed) * (1 / counts).mean()
        if spread < binomial:
            spread = min(binomial, spread + (1 / counts**2).mean() / 12)  # a count is rounded: a uniform's variance
        trials = smoothed * (1 - smoothed) * episodes / spread
        interval = wilson_interval(mean * trials, trials, student_quantile(episodes - 1))
        if counts.min() > 1:
            s2 = max(0.0, float(episode_variance(hits, counts)))
            total = variance_of_mean(mean, s2, episodes, 1 / (1 / counts).mean())
            share = float(s2 / episodes / total) if total > 0 else None
    return {
        "mean": mean,
        "ci95": [float(x) for x in interval],
        "s2": s2,
        "episode_share": share,
        "num_episodes": episodes,
        "num_queries": queries,
    }


def benchmark_difference(a, b):
    """How much more accurate method `a` is than `b` on the same queries of the same episodes, with its 95% interval.

    Student's interval over the episodes' differences. Where these vary less than single queries alone would make them,
    as where the methods hardly ever differ, the variance of single queries counts, with half a query added to each of
    the four outcomes (Agresti and Min, 2005). One episode: the interval of `paired_difference`.

    Args:
        a, b: for each episode 1 or 0, right or wrong, of each query [P][Q_p], in the same order.
    Returns:
        {"mean", "ci95": [low, high], "num_episodes"}
    """
    if len(a) == 1:
        mean, low, high = paired_difference(a[0], b[0])
        return {"mean": mean, "ci95": [low, high], "num_episodes": 1}
    differences = [np.subtract(x, y) for x, y in zip(a, b, strict=True)]
    means = np.array([d.mean() for d in differences])
    pooled = np.concatenate(differences)
    p, q = ((np.sum(pooled == sign) + 0.5) / (len(pooled) + 2) for sign in (1, -1))
    single = (p + q - (p - q) ** 2) * np.mean([1 / len(d) for d in differences])
    spread = means.var(ddof=1)
    if spread < single:
        spread = min(single, spread + np.mean([1 / len(d) ** 2 for d in differences]) / 12)
    half = student_quantile(len(means) - 1) * math.sqrt(spread / len(means))
    interval = [max(-1.0, float(means.mean() - half)), min(1.0, float(means.mean() + half))]
    return {"mean": float(means.mean()), "ci95": interval, "num_episodes": len(means)}


def expected_half_width(a, s2, num_episodes, num_queries):
    """The half-width to expect of the 95% interval of P >= 2 episodes of Q queries each."""
    return student_quantile(num_episodes - 1) * math.sqrt(variance_of_mean(a, s2, num_episodes, num_queries))


def cheapest_episodes(a, s2, num_queries, half_width):
    """The smallest P >= 2 at which P episodes of Q queries reach a half-width."""
    low, high = 1, 2
    while expected_half_width(a, s2, high, num_queries) > half_width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = expected_half_width(a, s2, middle, num_queries) <= half_width
        low, high = (low, middle) if enough else (middle, high)
    return high


def benchmark_of(a, s2, episode_seconds, query_seconds, num_queries, half_width=None, budget_seconds=None):
    """The benchmark of Q queries an episode that just reaches `half_width`, or just fits `budget_seconds` (None if two
    episodes do not)."""
    seconds = episode_seconds + num_queries * query_seconds
    if half_width is None:
        episodes = int(budget_seconds / seconds + 1e-9)
        if episodes < 2:
            return None
    else:
        episodes = cheapest_episodes(a, s2, num_queries, half_width)
    return {
        "num_episodes": episodes,
        "num_queries": num_queries,
        "half_width": float(expected_half_width(a, s2, episodes, num_queries)),
        "seconds": episodes * seconds,
    }


def plan(a, s2, episode_seconds, query_seconds, half_width=None, budget_seconds=None, max_queries=None):
    """The cheapest benchmark whose interval has `half_width`, or the most precise one within `budget_seconds`.

    Without rounding, Q = sqrt((a - a^2 - s2) / s2 * episode_seconds / query_seconds): an episode that costs much is
    worth many queries, until these say less than the next episode would. The integers around it are tried.

    Args:
        a, s2: mean accuracy and its variance over episodes. max_queries: the most that an episode has.
    Returns:
        (best, alternatives): {"num_episodes", "num_queries" of an episode, "half_width", "seconds"}, and a list of the
        same for other numbers of queries.
    Raises:
        ValueError: impossible wishes or numbers.
    """
    noise = a - a**2 - s2
    if not 0 < a < 1 or s2 < 0 or noise < 0:
        raise ValueError(f"an accuracy of {a} and a variance of {s2} do not go together: 0 < a < 1, 0 <= s2 <= a - a^2")
    if episode_seconds < 0 or query_seconds < 0 or episode_seconds + query_seconds == 0:
        raise ValueError("an episode and a query must cost something")
    if half_width is not None and not 0 < half_width < 0.5:
        raise ValueError(f"a half-width of {half_width} is not between 0 and 0.5")
    limit = max_queries or 100_000
    ratio = math.inf if not s2 or not query_seconds else noise / s2 * episode_seconds / query_seconds
    optimum = max(1, min(limit, math.sqrt(ratio)))
    near = {round(q) for q in np.linspace(optimum / 4, 4 * optimum, 1000)}
    wishes = {"half_width": half_width, "budget_seconds": budget_seconds}

    def tried(queries):
        queries = sorted(q for q in queries if 1 <= q <= limit)
        rows = [benchmark_of(a, s2, episode_seconds, query_seconds, q, **wishes) for q in queries]
        return [row for row in rows if row]

    rows = tried(near | {1, limit})
    if not rows:
        raise ValueError(f"{budget_seconds} seconds do not pay for two episodes of {episode_seconds} seconds")
    best = min(rows, key=lambda row: (row["seconds"], row["half_width"]) if half_width else row["half_width"])
    others = {max(1, round(best["num_queries"] * factor)) for factor in (1 / 16, 1 / 4, 1 / 2, 2, 4, 16)}
    return best, tried(others - {best["num_queries"]})
