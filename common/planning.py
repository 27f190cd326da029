"""How many episodes and queries a benchmark needs: what a pilot, or the user, knows of its scores, and the plan of it.

With s2 the variance of an episode's mean score and v that of a query's (`common.statistics`), P episodes of Q queries
cost P (episode_seconds + Q query_seconds), and their interval has a half-width of about t sqrt((s2 + v / Q) / P).
"""

from pathlib import Path

import numpy as np
from scipy.special import stdtrit
from scipy.stats import chi2

from common import statistics
from common.cli import UserError, positive_int, refusing
from common.records import blaming, read_json, write_json
from common.report import percent
from common.statistics import Moments

MARGIN = 1.05  # more episodes than needed, so that the last few need no stage of their own
ENOUGH = 20  # episodes to know a variance by: fewer do not decide on more than these


def variance_range(m):
    """What s2 may be after a pilot: the 5, 50 and 95% quantiles of its posterior, log(s2 + v / Q) having a flat prior.

    (P - 1) spread / (s2 + v / Q) is chi-squared with P - 1 degrees of freedom, cut off where s2 < 0: a pilot whose
    episodes happen to vary no more than their queries does not make s2 nothing. Endless episodes know s2.
    """
    if np.isinf(m.episodes):
        return [float(m.s2)] * 3
    degrees, noise = m.episodes - 1, statistics.smoothed(m)[1] / m.queries
    squares = degrees * max(m.spread, 1 / (12 * m.queries**2))
    possible = chi2.cdf(squares / noise, degrees)
    return [max(0.0, float(squares / chi2.ppf(above * possible, degrees) - noise)) for above in (0.95, 0.5, 0.05)]


def largest_square(m, half_width):
    """The largest argument with which `statistics.interval` of these Moments has at most this half-width."""
    return np.exp(statistics.bisect(lambda x: width(m, np.exp(x)) <= 2 * half_width, -40.0, 0.0))


def width(m, square):
    low, high = statistics.interval(m, square)
    return high - low


def squared_half_width(m, s2, num_episodes, num_queries, degrees=np.inf):
    """What to expect for `statistics.interval`, with Student's quantile of P - 1 degrees of freedom, or of fewer."""
    student = stdtrit(np.minimum(num_episodes - 1, degrees), 0.975)
    return student**2 * (s2 + statistics.smoothed(m)[1] / num_queries) / num_episodes


def fewest_episodes(m, s2, num_queries, largest):
    """The smallest P >= 2 at which the interval is narrow enough, for each of these numbers of queries [N]. After Stein
    (1945), Student's quantile has the degrees of freedom with which the pilot m knows the variance."""
    degrees = m.episodes - 1
    one = stdtrit(degrees, 0.975) ** 2 * (s2 + statistics.smoothed(m)[1] / num_queries)
    episodes = np.maximum(2.0, np.ceil(one / largest - 1e-9))
    while (short := squared_half_width(m, s2, episodes, num_queries, degrees) > largest * (1 + 1e-9)).any():
        episodes += short
    return episodes


def plan(m, episode_seconds, query_seconds, half_width=None, budget_seconds=None, max_queries=None, ways=1):
    """The cheapest benchmark whose interval has `half_width`, or the most precise one within `budget_seconds`.

    Without rounding, Q = sqrt(v / s2 * episode_seconds / query_seconds): an episode that costs much is worth many
    queries, until these say less than the next episode would. All multiples of `ways` are tried. A ValueError tells of
    impossible wishes or numbers.

    Args:
        m: Moments of a pilot, or of endless episodes. max_queries: the most that an episode has.
    Returns:
        {"plan", "low", "high": the best if s2 is its median after the pilot, or at the ends of its 90% range;
        "alternatives" to the plan, "customary": 600 episodes of 15 queries a class, or of max_queries}, each
        {"num_episodes", "num_queries" of an episode, "half_width": expected, "range": [low, high] that the range of s2
        allows, "seconds"}.
    """
    if min(episode_seconds, query_seconds) < 0 or episode_seconds + query_seconds == 0:
        raise ValueError("an episode and a query must cost something")
    if half_width is not None and not 0 < half_width < 0.5:
        raise ValueError(f"a half-width of {half_width} is not between 0 and 0.5")
    most = max(100_000, ways) if max_queries is None else max_queries
    queries = np.arange(ways, most + 1, ways)
    if not len(queries):
        raise ValueError(f"{most} queries an episode are less than one a class")
    seconds = episode_seconds + queries * query_seconds
    low, middle, high = variance_range(m)

    def row(num_episodes, num_queries):
        squares = (squared_half_width(m, s2, num_episodes, num_queries) for s2 in (middle, low, high))
        expected, *widths = (float(width(m, square) / 2) for square in squares)
        cost = float(num_episodes * (episode_seconds + num_queries * query_seconds))
        found = {"num_episodes": int(num_episodes), "num_queries": int(num_queries), "half_width": expected}
        return found | {"range": widths, "seconds": cost}

    def best(s2):
        if half_width:
            episodes = fewest_episodes(m, s2, queries, largest_square(m, half_width))
            loss = episodes * seconds
        else:
            episodes = np.floor(budget_seconds / seconds + 1e-9)
            loss = squared_half_width(m, s2, np.maximum(episodes, 2), queries)
        if episodes.max() < 2:
            raise ValueError(f"{budget_seconds} seconds do not pay for two episodes of {episode_seconds} seconds")
        i = np.where(episodes < 2, np.inf, loss).argmin()
        return row(episodes[i], queries[i]), episodes

    chosen, episodes = best(middle)
    others = {round(chosen["num_queries"] / ways * factor) for factor in (1 / 16, 1 / 4, 1 / 2, 2, 4, 16)}
    others = sorted(i - 1 for i in others - {chosen["num_queries"] // ways} if 1 <= i <= len(queries))
    return {
        "plan": chosen, "low": best(low)[0], "high": best(high)[0],
        "alternatives": [row(episodes[i], queries[i]) for i in others if episodes[i] >= 2],
        "customary": row(600, min(15 * ways, queries[-1])),
    }  # fmt: skip


def next_stage(pilot, m, half_width):
    """How many episodes there must be, P itself where the benchmark is finished; and how many of them are the pilot
    from now on: all, if it was too short.

    Stein's rule for the pilot, and the same for all episodes so far, should these vary more. Both look at how wide the
    interval is and never at where it lies, so that stopping by them favours no outcome. The Moments `pilot` and `m`, of
    the pilot's episodes and of all P, with the same number of queries, may be of numbers or arrays.
    """
    needed = statistics.squared_margin(m, pilot) / largest_square(m, half_width)
    needed = np.where(needed <= m.episodes, m.episodes, np.ceil(MARGIN * needed))
    short = (m.episodes < ENOUGH) & (needed > ENOUGH)
    return np.where(short, ENOUGH, needed).astype(int), np.where(short, ENOUGH, pilot.episodes)


def scores_of(results, names, count=None):
    """Moments of the first `count` episodes (default: all) of results.json: an accuracy, or a difference of methods."""
    kept = (results["methods"][name]["answers"][:count] for name in names)
    answers = [[[[int(hit) for hit in text] for text in episode] for episode in episodes] for episodes in kept]
    if len(names) == 2:
        return statistics.difference_moments(*answers)
    hits, counts = ([[f(c) for c in episode] for episode in answers[0]] for f in (sum, len))
    return statistics.accuracy_moments(hits, counts)


def next_of(results, stages, wishes, half_width, max_queries):
    """The stage of a benchmark that follows the last of `stages`, or None: each interval asked for is narrow enough.

    After the pilot, its episodes get the number of queries that makes the whole cheapest; then come more episodes.

    Args:
        results: what results.json would say. wishes: the names of a method, for its accuracy, or of two, for their
            difference, in a list each. max_queries: the most that a class has.
    Returns:
        {"num_episodes", "num_queries": a class, or None for all, "pilot": how many episodes decide on the number}
    """
    stage, ways = stages[-1], results["dataset"]["num_ways"]
    if len(stages) == 1 and stage["num_queries"]:
        limits = {"half_width": half_width, "max_queries": max_queries * ways, "ways": ways}
        plans = [plan(scores_of(results, names), **results["cost"], **limits)["plan"] for names in wishes]
        dearest = max(plans, key=lambda found: found["seconds"])
        if dearest["num_queries"] != ways * stage["num_queries"]:
            return stage | {"num_queries": dearest["num_queries"] // ways}
    pilots, scores = ([scores_of(results, names, n) for names in wishes] for n in (stage["pilot"], None))
    found = [next_stage(pilot, m, half_width) for pilot, m in zip(pilots, scores)]
    episodes, pilot = (max(map(int, numbers)) for numbers in zip(*found))
    return None if episodes == stage["num_episodes"] else stage | {"num_episodes": episodes, "pilot": pilot}


def read_pilot(args):
    """Of results.json of a benchmark: a score's Moments, {what: seconds}, classes in an episode, methods, a title."""
    if not Path(args.pilot).is_file():
        raise UserError(f"--pilot {args.pilot}: no such file.")
    with blaming(args.pilot):
        pilot = read_json(args.pilot)
        if pilot.get("kind") != "benchmark":
            raise UserError(f"--pilot {args.pilot} is no benchmark over episodes: give results.json of --dataset.")
        names = args.compare or [args.method or list(pilot["methods"])[-1]]
        for name in names:
            if name not in pilot["methods"]:
                raise UserError(f"{name} is no method of {args.pilot}, which has {', '.join(pilot['methods'])}.")
        m, ways = scores_of(pilot, names), positive_int(pilot["dataset"]["num_ways"])
        if m.episodes < 2 or min(len(text) for text in pilot["methods"][names[0]]["answers"][0]) < 2:
            raise UserError(f"--pilot {args.pilot} needs at least two episodes, and two queries a class.")
        cost = {what: float(pilot["cost"][what]) for what in ("episode_seconds", "query_seconds")}
    return m, cost, ways, names, f"{' - '.join(names)}, a pilot of {m.episodes} episodes"


def expected(args):
    """The same by the numbers on the command line, as endless episodes would show them."""
    if args.episode_variance is None or (args.disagreement is None and (args.compare or args.accuracy is None)):
        raise UserError("--plan needs --pilot, a results.json; or --episode_variance, --accuracy (for a difference: "
                        "--disagreement), --episode_seconds and --query_seconds.")  # fmt: skip
    mean, s2, is_accuracy = args.accuracy or 0.0, args.episode_variance, args.disagreement is None
    square = mean if is_accuracy else args.disagreement
    if not 0 < square < 1 or square - mean**2 < s2 or abs(mean) > square:
        raise UserError(
            f"--plan: a mean of {mean} and a variance of {s2} do not go together: 0 <= s2 <= {square:g} - {mean:g}^2"
            + f", and methods that differ on {square:g} of the queries differ by no more" * (abs(mean) > square)
        )
    m = Moments(0 if is_accuracy else -1, mean, square, square - mean**2 - s2, s2, np.inf, np.inf)
    return m, {}, args.num_ways, [], "an accuracy" if is_accuracy else "a difference"


def print_plan(args):
    """Prints the cheapest benchmark that reaches --half_width, or the most precise one in --budget_seconds; with its
    range, where a pilot knows the variance over episodes only so well. The command line has the last word on costs."""
    if (args.half_width is None) == (args.budget_seconds is None):
        raise UserError("--plan needs one of --half_width and --budget_seconds.")
    m, cost, ways, names, title = (read_pilot if args.pilot else expected)(args)
    given = {what: vars(args)[what] for what in ("episode_seconds", "query_seconds")}
    cost |= {what: seconds for what, seconds in given.items() if seconds is not None}
    if len(cost) < 2:
        raise UserError("--plan without --pilot needs --episode_seconds and --query_seconds.")
    with refusing("--plan cannot be ({error}).", (ValueError, OverflowError)):
        found = plan(m, **cost, half_width=args.half_width, budget_seconds=args.budget_seconds,
                     max_queries=args.max_queries, ways=ways)  # fmt: skip
    low, _, high = variance_range(m)
    certain, chosen = np.isinf(m.episodes), found["plan"]
    known = "" if certain else f", 90% range {low:.5f} to {high:.5f}"
    print(f"{title}: mean {percent(m.mean)} %, variance over episodes s2 = {max(m.s2, 0):.5f}{known}")
    print(f"an episode costs {cost['episode_seconds']:.3g} s, a query {cost['query_seconds']:.3g} s\n")
    rows = [("best", chosen)]
    rows += [] if certain else [("best if s2 is low", found["low"]), ("best if s2 is high", found["high"])]
    rows += [("", row) for row in found["alternatives"]] + [("customary", found["customary"])]
    line = "{:20}{:>9}{:>17}{:>14}{:>15}{:>9}".format
    print(line("", "episodes", "queries in each", "95% interval", "" if certain else "90% range", "hours"))
    for name, row in rows:
        half, *ends = (f"{100 * value:.2f}" for value in (row["half_width"], *row["range"]))
        spread, hours = "" if certain else " to ".join(ends), f"{row['seconds'] / 3600:.3g}"
        print(line(name, row["num_episodes"], row["num_queries"], f"±{half}", spread, hours))
    numbers = f"--num_episodes {chosen['num_episodes']} --num_queries {chosen['num_queries'] // ways}"
    print(f"\nevaluate.py {numbers}   (a class of {ways})")
    if args.half_width and not certain:
        wish = " ".join(["--compare" if args.compare else "--method", *names])
        print(f"or, to stop when the interval is narrow enough: evaluate.py --half_width {args.half_width} {wish}")
    write_json(Path(args.output_dir) / "plan.json", found)
