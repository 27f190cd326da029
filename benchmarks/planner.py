"""Benchmarks that choose their length, simulated: do intervals hold the truth, how wide are they, what do they cost?

Each line is a kind of episodes and a pilot's size: the pilot is run, the cheapest number of queries chosen, the rest
run (`common.planning`). "truth" and "narrow" are the shares of intervals that hold the true mean and that are as narrow
as asked; "cost" is the median, and "90%" the 90% quantile, of the cost divided by that of a planner who knows s2;
"stages" is their mean number.

    python -m benchmarks.planner
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np

from common import planning, statistics
from common.cli import HelpFormatter, natural_int, positive_int, run

HARDNESS = np.array([0.2, 0.6, 1.0, 1.4, 1.8])  # shares of errors of five unequal classes
ONES = np.ones(5, int)
FIELDS = ("mean", "square", "query_variance", "spread", "episodes", "queries")


@dataclass(frozen=True)
class Setting:
    """A kind of episodes of five classes, what is asked of a benchmark over them, and what an episode costs."""

    name: str
    mean: float
    deviation: float  # of an episode's accuracy: of a Beta distribution, or of two points where `rare`
    half_width: float
    pilot_queries: int  # a class
    max_queries: int  # a class
    episode_seconds: float = 100.0  # a query costs 1
    classes: bool = False
    rare: float = 0.0  # share of bad episodes
    disagreement: float = 0.0  # a difference: of this share of queries one method alone is right


SETTINGS = [
    Setting("few queries", 0.7, 0.05, 0.03, 2, 4),
    Setting("many queries", 0.9, 0.05, 0.012, 40, 600, 1000),
    Setting("queries dear", 0.8, 0.08, 0.02, 15, 100, 5),
    Setting("classes differ", 0.8, 0.05, 0.015, 15, 100, classes=True),
    Setting("near 1", 0.95, 0.02, 0.006, 15, 100),
    Setting("nearer 1", 0.99, 0.006, 0.003, 15, 100),
    Setting("no variance", 0.85, 0.0, 0.006, 15, 60),
    Setting("skewed", 0.9, 0.1, 0.025, 15, 100),
    Setting("skewed near 1", 0.95, 0.05, 0.012, 15, 100),
    Setting("difference", 0.0, 0.02, 0.006, 15, 100, disagreement=0.1),
    Setting("difference, rare", 0.005, 0.003, 0.003, 15, 100, disagreement=0.02),
    Setting("corner: faultless or bad", 0.95, 0.1, 0.025, 15, 100),
    Setting("corner: one in ten is bad", 0.943, 0.081, 0.02, 15, 100, rare=0.1),
]


def beta(rng, mean, deviation, shape):
    if deviation == 0:
        return np.full(shape, mean)
    size = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * size, (1 - mean) * size, shape)


def draw_episodes(setting, rng, shape):
    """What decides on the answers in episodes of this shape, per class [*shape, 5]: the accuracy; or, of a difference,
    the share of the queries on which the methods disagree that go to the first."""
    if setting.disagreement:
        share = (1 + setting.mean / setting.disagreement) / 2
        return beta(rng, share, setting.deviation / setting.disagreement / 2, (*shape, 1)) * ONES
    if setting.rare:
        gap = setting.deviation / np.sqrt(setting.rare * (1 - setting.rare))
        best = setting.mean + setting.rare * gap
        episodes = np.where(rng.random((*shape, 1)) < setting.rare, best - gap, best)
    else:
        episodes = beta(rng, setting.mean, setting.deviation, (*shape, 1))
    return 1 - (1 - episodes) * (HARDNESS if setting.classes else ONES)


def answer(setting, rng, episodes, queries):
    """Numbers of scores 1 and -1 among the queries of each class, both [..., 5]."""
    if not setting.disagreement:
        return np.array([rng.binomial(queries, episodes), np.zeros(episodes.shape, int)])
    differ = rng.binomial(queries, setting.disagreement, episodes.shape)
    first = rng.binomial(differ, episodes)
    return np.array([first, differ - first])


def first_queries(rng, scores, queries, fewer):
    """The same of the first `fewer` of each class's queries."""
    kept = rng.hypergeometric(scores.sum(0), queries - scores.sum(0), fewer)
    first = rng.hypergeometric(scores[0], scores[1], kept)
    return np.array([first, kept - first])


def moments(setting, scores, queries):
    return statistics.moments(scores[0] - scores[1], scores.sum(0), queries, lowest=-1 if setting.disagreement else 0)


def known(setting):
    """What a planner knows who knows everything."""
    square = setting.disagreement or setting.mean
    query = square - setting.mean**2 - setting.deviation**2
    if setting.classes:
        query -= HARDNESS.var() * ((1 - setting.mean) ** 2 + setting.deviation**2)
    lowest = -1 if setting.disagreement else 0
    return statistics.Moments(lowest, setting.mean, square, query, setting.deviation**2, np.inf, np.inf)


def simulate(setting, pilot, runs, rng):
    """(truth, narrow, costs, stages), each [runs], of two-stage benchmarks."""
    choices = np.arange(1, setting.max_queries + 1) * 5
    seconds = setting.episode_seconds + choices
    knowing = known(setting)
    largest = planning.largest_square(knowing, setting.half_width)
    cheapest = (np.ceil(statistics.Z95**2 * (knowing.s2 + knowing.query_variance / choices) / largest) * seconds).min()

    episodes = draw_episodes(setting, rng, (runs, pilot))
    scores = answer(setting, rng, episodes, setting.pilot_queries)
    m = moments(setting, scores, np.full(episodes.shape, setting.pilot_queries))
    largest = planning.largest_square(m, setting.half_width)
    queries = np.empty(runs, int)
    for i in range(runs):
        one = replace(m, **{name: getattr(m, name)[i] for name in FIELDS})
        s2 = planning.variance_range(one)[1]
        queries[i] = (planning.fewest_episodes(one, s2, choices, largest[i]) * seconds).argmin() + 1
    queries = queries[:, None, None]
    more = answer(setting, rng, episodes, np.maximum(queries - setting.pilot_queries, 0))
    fewer = first_queries(rng, scores, setting.pilot_queries, np.minimum(queries, setting.pilot_queries))
    scores, number, stages = fewer + more, np.full(runs, pilot), np.ones(runs)
    pilots = number

    def of_first(episodes):
        return moments(setting, scores, queries * (np.arange(scores.shape[2]) < episodes[:, None])[..., None] * ONES)

    while True:
        m, first = of_first(number), of_first(pilots)
        needed, pilots = planning.next_stage(first, m, setting.half_width)
        if (needed == number).all():
            break
        stages += needed > number
        number = needed
        episodes = draw_episodes(setting, rng, (runs, number.max() - scores.shape[2]))
        scores = np.concatenate([scores, answer(setting, rng, episodes, queries)], 2)
    low, high = statistics.interval(m, statistics.squared_margin(m, first) / m.episodes)
    truth = (low <= setting.mean) & (setting.mean <= high)
    wasted = pilot * np.maximum(setting.pilot_queries - queries, 0)
    costs = number * (setting.episode_seconds + 5 * queries[:, 0, 0]) + 5 * wasted[:, 0, 0]
    return truth, (high - low) / 2 <= setting.half_width * (1 + 1e-9), costs / cheapest, stages


def main(args):
    rng = np.random.default_rng(args.seed)
    print("| episodes | pilot | truth, % | narrow, % | cost | 90% | stages |\n|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        for pilot in (5, 10, 30):
            truth, narrow, costs, stages = simulate(setting, pilot, args.num_runs, rng)
            print(
                f"| {setting.name} | {pilot} | {100 * truth.mean():.1f} | {100 * narrow.mean():.1f} | "
                f"{np.median(costs):.2f} | {np.quantile(costs, 0.9):.2f} | {stages.mean():.1f} |",
                flush=True,
            )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--num_runs", type=positive_int, default=2000, help="simulated benchmarks a line")
    add("--seed", type=natural_int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
