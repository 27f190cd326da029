"""Accuracies and their differences with honest intervals, on images and over few-shot episodes.

A query has a score: 1 or 0 for right or wrong; of two methods, the difference of these, -1, 0 or 1. An episode has a
true mean score, which varies over episodes with mean m and variance s2, and Q queries. The mean over P episodes has

    Var = s2 / P + v / (P Q),    v = E[score^2] - m^2 - s2 - w

v is the variance of a query's score within its episode. Where queries come in equal numbers a class it is that within
its class and episode, smaller by w, the variance over the classes of an episode. For an accuracy, whose scores are
their own squares, and w = 0 this is theorem 1 of Landolsi and Kahl, 2406.03146; for a difference E[score^2] is the
share of queries that only one of the two methods answers rightly.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import stdtrit

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile
PLANNED = 1.1  # what makes up, in squared margins, for stopping early where bad episodes happen to be missing


def wilson_interval(correct, count, z=Z95):
    """The Wilson score interval (1927) of a proportion, `correct` of `count` > 0 independent trials, numbers or arrays:
    (low, high) in [0, 1], sound near 0 and 1 and for few images."""
    p = correct / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def matched_interval(only_a, only_b, count, z=Z95):
    """The score interval of Tango (1998) of a difference between matched proportions: (low, high) in [-1, 1]. It holds
    the differences D that the score test does not reject:

        (only_a - only_b - count D)^2 <= z^2 count (2 q + D (1 - D)), q the most likely share of `only_b` under D

    `only_a` and `only_b` of `count` trials are those in which one alone succeeds; numbers or arrays.
    """
    difference = (only_a - only_b) / count

    def accepted(d):
        b = (2 * count - only_a + only_b) * d - only_a - only_b
        q = (np.maximum(b**2 + 8 * count * only_b * d * (1 - d), 0) ** 0.5 - b) / (4 * count)
        return (only_a - only_b - count * d) ** 2 <= z**2 * count * (2 * q + d * (1 - d))

    return bisect(accepted, difference, -1.0), bisect(accepted, difference, 1.0)


def bisect(holds, inside, outside):
    """Where, between `inside` and `outside`, numbers or arrays, `holds`, a function of arrays to booleans, ends to."""
    for _ in range(40):
        middle = (inside + outside) / 2
        held = holds(middle)
        inside, outside = np.where(held, middle, inside), np.where(held, outside, middle)
    return inside[()]  # of no dimensions: a number


def accuracy(correct):
    """{"mean", "ci95": Wilson's, "count"} of right and wrong answers [N], a boolean tensor, N > 0."""
    hits, count = int(correct.sum()), len(correct)
    return {"mean": hits / count, "ci95": list(wilson_interval(hits, count)), "count": count}


def paired_difference(a, b):
    """How much more often `a` is right than `b`, 1 or 0 of each of the same trials, with its 95% interval, which is
    Tango's and keeps its coverage where the two seldom differ: (difference, low, high) in [-1, 1]."""
    signs = np.subtract(a, b, dtype=int)
    low, high = matched_interval((signs > 0).sum(), (signs < 0).sum(), len(signs))
    return float(signs.mean()), float(low), float(high)


def trials_to_tell(a, b):
    """How many trials would show which of `a` and `b` is right more often, if their differences go on as they do (the
    interval of `paired_difference` then leaves out 0); None where they are right equally often."""
    signs = np.subtract(a, b, dtype=int)
    return int(Z95**2 * np.abs(signs).mean() / signs.mean() ** 2) + 1 if signs.mean() else None


def pairs_of(names):
    """Pairs (a, b) of methods to compare as a minus b: b is named before a."""
    return [(a, b) for b, a in combinations(names, 2)]


@dataclass(frozen=True)
class Moments:
    """What episodes say of a score, or would be expected to say: numbers, or arrays over many benchmarks."""

    lowest: int  # the lowest score: 0 of an accuracy, -1 of a difference
    mean: float  # of scores and of their squares, episodes having equal weight
    square: float
    query_variance: float  # v, unbiased
    spread: float  # sample variance of the episodes' means; expected: s2 + v / Q
    episodes: int  # P
    queries: float  # Q, the harmonic mean over episodes

    @property
    def s2(self):
        """An unbiased estimate of s2, which may come out negative."""
        return self.spread - self.query_variance / self.queries


def moments(sums, squares, counts, lowest=0):
    """The Moments of episodes of which are known the sums of the scores, those of their squares, and their number, in
    each class of each episode, [..., P, classes]; one without queries has not been run and does not count.

    The variance that queries give to an episode's mean is estimated within classes. A class of one query shows none:
    its score is taken to vary as much as all scores do, which makes s2 too small.
    """
    sums, squares, counts = (np.asarray(x, float) for x in (sums, squares, counts))
    queries = counts.sum(-1)
    run, queries = queries > 0, np.maximum(queries, 1)
    means = sums.sum(-1) / queries
    mean = means.mean(-1, where=run)
    square = (squares.sum(-1) / queries).mean(-1, where=run)
    single = (square - mean**2)[..., None, None]
    within = np.where(counts > 1, (squares - sums**2 / np.maximum(counts, 1)) / np.maximum(counts - 1, 1), single)
    noise = ((counts * within).sum(-1) / queries**2).mean(-1, where=run)
    harmonic = 1 / (1 / queries).mean(-1, where=run)
    episodes = run.sum(-1)
    spread = ((means - mean[..., None]) ** 2).sum(-1, where=run) / np.maximum(episodes - 1, 1)
    return Moments(lowest, mean, square, noise * harmonic, spread, episodes, harmonic)


def accuracy_moments(hits, counts):
    """Moments of right answers and queries of each episode [P], or of its classes [P, classes]."""
    hits, counts = (np.reshape(np.asarray(x, float), (len(x), -1)) for x in (hits, counts))
    return moments(hits, hits, counts)


def difference_moments(a, b):
    """Moments of a's scores less b's, each 1 or 0 of the queries of each class of each episode, [P][classes][N]."""
    scores = [[np.subtract(x, y) for x, y in zip(*episode, strict=True)] for episode in zip(a, b, strict=True)]
    parts = ([[f(score) for score in episode] for episode in scores] for f in (np.sum, np.count_nonzero, np.size))
    return moments(*parts, lowest=-1)


def smoothed(m):
    """(variance of all scores, v) with one query more, half of the lowest score, half of the highest: neither is 0."""
    middle, square = (1 + m.lowest) / 2, (1 + m.lowest**2) / 2
    weight = 1 / (m.episodes * m.queries + 1)
    mean = m.mean + (middle - m.mean) * weight
    return m.square + (square - m.square) * weight - mean**2, m.query_variance + (square - m.query_variance) * weight


def squared_margin(m, pilot=None):
    """The square of the half-width, times P, that the mean's interval would have if it were symmetric.

    Student's quantile squared times the episodes' variance. Few episodes may happen to vary less than their queries
    alone make them: at least, the variance of queries counts, v / Q with the normal quantile (many queries tell v), or
    what is less, the episodes' variance and that of rounding to whole queries, 1 / (12 Q^2), with Student's. What the
    Moments of a `pilot` say, of those of the episodes that decided on P (Stein, 1945), counts if it is more.
    """
    if pilot is not None:
        return PLANNED * np.maximum(squared_margin(m), squared_margin(pilot))
    student = stdtrit(m.episodes - 1, 0.975) ** 2
    queries = Z95**2 * smoothed(m)[1] / m.queries
    return np.maximum(student * m.spread, np.minimum(queries, student * (m.spread + 1 / (12 * m.queries**2))))


def interval(m, squared_half_width):
    """The 95% interval (low, high), between the lowest score and 1, whose half-width would have this square if it were
    symmetric: Wilson's or Tango's with the number of trials at which independent queries would vary as much."""
    trials = smoothed(m)[0] / squared_half_width
    if m.lowest == 0:
        return wilson_interval(m.mean * trials, trials, 1.0)
    return matched_interval((m.square + m.mean) / 2 * trials, (m.square - m.mean) / 2 * trials, trials, 1.0)


def benchmark(m, pilot, alone):
    """Mean and interval of a benchmark with these Moments; one episode has the interval `alone`."""
    ends = alone if m.episodes == 1 else interval(m, squared_margin(m, pilot) / m.episodes)
    return {"mean": float(m.mean), "ci95": [float(end) for end in ends], "num_episodes": int(m.episodes)}


def benchmark_accuracy(hits, counts, pilot=None):
    """Mean accuracy over episodes, each of equal weight, with a 95% interval for a.

    The interval is Wilson's (`interval`, `squared_margin`). In simulated benchmarks it covers a in 93 to 97%, except
    where there are fewer than some eight wrong answers in all (more than 97%: it is too wide), and where most episodes
    are faultless and a few are bad, which no small sample shows (accuracies of 0.95 +- 0.1: 85% for 10 episodes, 89%
    for 20, 94% for 100). Of one episode it is Wilson's own, and speaks of that episode's classes.

    Args:
        hits, counts: right answers and queries of each episode [P], or of its classes [P, classes], which alone makes
            s2 unbiased where queries are drawn class by class.
        pilot: how many of the first episodes decided on the number of all; None: it was fixed beforehand.
    Returns:
        {"mean", "ci95": [low, high], "s2": variance over episodes, at least 0, or None where it cannot be known (one
        episode, or one query a class), "episode_share": share of the mean's variance that comes from episodes, or None,
        "num_episodes", "num_queries": of all episodes}
    """
    m, s2, share, queries = accuracy_moments(hits, counts), None, None, int(np.sum(counts))
    alone = wilson_interval(np.sum(hits), queries)
    result = benchmark(m, pilot and accuracy_moments(hits[:pilot], counts[:pilot]), alone)
    if m.episodes > 1 and np.min(counts) > 1:
        s2 = max(0.0, float(m.s2))
        total = s2 + m.query_variance / m.queries
        share = float(s2 / total) if total > 0 else None
    return result | {"s2": s2, "episode_share": share, "num_queries": queries}


def benchmark_difference(a, b, pilot=None):
    """How much more accurate method `a` is than `b`, {"mean", "ci95", "num_episodes"}, by the same queries of the same
    episodes, 1 or 0 of each, [P][classes][N]. The interval is Tango's (`interval`, `squared_margin`), of one episode
    that of `paired_difference`; `pilot` as in `benchmark_accuracy`."""
    _, *alone = paired_difference(*(np.hstack(x[0]) for x in (a, b)))
    return benchmark(difference_moments(a, b), pilot and difference_moments(a[:pilot], b[:pilot]), alone)
