"""How many episodes and queries a benchmark needs: what a pilot, or the user, knows of a method, and the plan of it."""

from pathlib import Path

from common import statistics
from common.cli import UserError
from common.records import read_json, write_json
from common.report import percent


def read_pilot(args):
    """Accuracy, its variance over episodes, seconds an episode and a query, and queries an episode of a pilot.

    From results.json of a benchmark, or from the command line, which has the last word.
    """
    accuracy, s2, cost, ways = args.accuracy, args.episode_variance, {}, args.num_ways
    if args.pilot:
        if not Path(args.pilot).is_file():
            raise UserError(f"--pilot {args.pilot}: no such file.")
        pilot = read_json(args.pilot)
        if pilot.get("kind") != "benchmark":
            raise UserError(f"--pilot {args.pilot} is no benchmark over episodes: give results.json of --dataset.")
        name = args.method or list(pilot["methods"])[-1]
        if name not in pilot["methods"]:
            raise UserError(f"--method {name}: {args.pilot} has {', '.join(pilot['methods'])}.")
        method, cost, ways = pilot["methods"][name], pilot["cost"], pilot["dataset"]["num_ways"]
        accuracy = method["mean"] if accuracy is None else accuracy
        s2 = method["s2"] if s2 is None else s2
        print(f"pilot: {name}, {method['num_episodes']} episodes, {method['num_queries']} queries")
    seconds = [args.episode_seconds, args.query_seconds]
    seconds = [cost.get(k) if x is None else x for x, k in zip(seconds, ("episode_seconds", "query_seconds"))]
    if None in (accuracy, s2, *seconds):
        raise UserError(
            "--plan needs --pilot, a results.json of at least two episodes with two queries; or all of --accuracy, "
            "--episode_variance, --episode_seconds and --query_seconds."
        )
    return accuracy, s2, *seconds, ways


def plan(args):
    """Prints the cheapest benchmark that reaches --half_width, or the most precise one in --budget_seconds."""
    if (args.half_width is None) == (args.budget_seconds is None):
        raise UserError("--plan needs one of --half_width and --budget_seconds.")
    accuracy, s2, episode_seconds, query_seconds, ways = read_pilot(args)
    wanted = {"half_width": args.half_width, "budget_seconds": args.budget_seconds}
    try:
        best, rows = statistics.plan(
            accuracy, s2, episode_seconds, query_seconds, **wanted, max_queries=args.max_queries
        )
    except ValueError as error:
        raise UserError(f"--plan: {error}") from error
    custom = {
        "num_episodes": 600,
        "num_queries": 15 * ways,
        "seconds": 600 * (episode_seconds + 15 * ways * query_seconds),
    }
    custom["half_width"] = statistics.expected_half_width(accuracy, s2, 600, 15 * ways)
    print(f"accuracy {percent(accuracy)} %, variance over episodes s2 = {s2:.5f}")
    print(f"an episode costs {episode_seconds:.3g} s, a query {query_seconds:.3g} s\n")
    print(f"{'':12}{'episodes':>9}{'queries in each':>17}{'95% interval':>15}{'hours':>10}")
    for title, row in [("cheapest", best), *(("", row) for row in rows), ("customary", custom)]:
        print(
            f"{title:12}{row['num_episodes']:9}{row['num_queries']:17}{'±' + percent(row['half_width']):>15}"
            f"{row['seconds'] / 3600:10.3g}"
        )
    per_class = -(-best["num_queries"] // ways)
    print(f"\nevaluate.py --num_episodes {best['num_episodes']} --num_queries {per_class}   (a class of {ways})")
    write_json(Path(args.output_dir) / "plan.json", {"plan": best, "alternatives": rows, "customary": custom})
