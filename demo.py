"""The five scripts in a row, on one episode of Icons-FS or on your own photos, and what came of it.

    python demo.py
    python demo.py --support_dir photos --query_dir test_photos

`photos` and `test_photos` hold a folder of images per class. Two students are trained, one on generated images and one
on the photos alone; the end says which is better on the test photos, and whether so many can tell. Without test photos
a quarter of each class is held out where every class has 8 or more; else nobody can know.

Finished stages are kept: an interrupted run goes on where it stopped. Where photos were added, what is there is
extended; where some were changed or taken away, it is put aside and made anew. So are the students of before, always.
"""

import argparse
import itertools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common.cli import HelpFormatter, UserError, natural_int, run, words_of
from common.images import list_images, require_unseen
from common.inversion import read_inversion
from common.processes import generator, stopwatch
from common.records import blaming, fingerprint, keep_apart, read_json, whole_folder, write_json
from common.report import better, points, with_interval
from common.runtimes.web import serving
from common.statistics import trials_to_tell

HERE = Path(__file__).resolve().parent
MINI_SD = "assets/mini-sd"
STAGES = {  # each word is filled in on its own, so that paths may hold spaces
    "episode": "-m common.datasets --output_dir {root} --split {split}",
    "invert": "tint_invert.py --support_dir {support} --output_dir {root}/inversion"
              " --pretrained_model_name_or_path {diffusion}",
    "generate": "tint_generate.py --inversion_dir {root}/inversion --output_dir {root}/generated"
                " --teacher {teacher}",
    "distill_supports": "distill.py --supports_only --support_dir {support} --output_dir {root}/student_supports"
                        " --teacher {teacher} --student {student} --query_dir {query} --num_views 5000",
    "distill": "distill.py --train_dir {root}/generated --support_dir {support} --output_dir {root}/student"
               " --teacher {teacher} --student {student} --query_dir {query} --num_views 5000",
    "evaluate": "evaluate.py --data_dir {query} --support_dir {support} --output_dir {root}/evaluation"
                " --model teacher=prototypes:{teacher} student_before=prototypes:{student}"
                " student_supports={root}/student_supports student_tint={root}/student",
    "evaluate_generated": "evaluate.py --generated_dir generated={root}/generated --support_dir {support}"
                          " --data_dir {query} --teacher {teacher} --output_dir {root}/evaluation_generated",
    "export": "export.py --model {root}/student --data_dir {root}/generated --query_dir {query}"
              " --support_dir {support} --teacher {teacher} --benchmark --web --output_dir {root}/export",
}  # fmt: skip
TITLES = {
    "teacher": "teacher (cosine prototypes)", "student_before": "student before distillation",
    "student_supports": "student distilled on the photos alone",
    "student_tint": "student distilled on generated images",
}  # fmt: skip
MADE = ("support", "query", "student", "student_supports")  # what is not the same for other photos
ENOUGH = 8  # photos of each class, of which some can be held out


def hold_out(photos, folder, root, seed):
    """Copies a quarter of each class to root/query and the rest to root/support, unless that is done. The lot of a
    photo depends on its name alone: another photo does not change it."""

    def lot(path):
        return generator(seed, "held out", path.relative_to(folder).as_posix()).initial_seed()

    parts = {"support": [], "query": []}
    for paths in photos.values():
        drawn = sorted(paths, key=lot)
        parts["query"] += drawn[: len(drawn) // 4]
        parts["support"] += drawn[len(drawn) // 4 :]
    require_unseen(parts["query"], parts["support"])
    for part, paths in parts.items():
        if not (root / part).is_dir():
            with whole_folder(root / part) as temporary:
                for path in paths:
                    target = temporary / path.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


def find_photos(args, root):
    """The folders of supports and of queries, or None for the latter. What was made of other photos is put aside. A
    UserError tells of folders that hold no photos, other classes or a single one, or a photo in both."""
    keep_apart(args)
    photos = list_images(args.support_dir) if args.support_dir else {}
    if len(photos) == 1:
        raise UserError(f"{args.support_dir} holds one class only: there is nothing to tell apart.")
    queries = list_images(args.query_dir, list(photos)) if args.query_dir else {}
    held_out = bool(photos) and not queries and min(map(len, photos.values())) >= ENOUGH
    require_unseen(*(itertools.chain(*x.values()) for x in (queries, photos)))
    facts, tests = ({name: fingerprint(paths) for name, paths in x.items()} for x in (photos, queries))
    record = root / "stages.json"
    known = read_json(record, dict) if record.is_file() else {}
    if (known.get("photos"), known.get("held_out", held_out)) != (facts, held_out):
        if known:
            put_aside(root)
        elif taken := [str(root / name) for name in MADE if (root / name).exists()]:
            raise UserError(f"{', '.join(taken)} is there already, and not of this program: give another --output_dir.")
        known = {"photos": facts, "tests": tests, "held_out": held_out, "stages": {}}
    with blaming(record):
        if known.get("tests") != tests:
            known["stages"].pop("distill_supports", None)  # which measures, too; and with it go all that follow
    write_json(record, known | {"tests": tests})
    if not photos:
        return root / "support", root / "query"
    support, query = args.support_dir, args.query_dir
    if held_out:
        hold_out(photos, Path(support), root, args.seed)
        support, query = root / "support", root / "query"
    records = [read_inversion(path.parent) for path in root.glob("inversion/*/inversion.json")]
    inverted = [image for facts in records for image in facts["settings"]["support_images"].items()]
    files = {Path(support, name): content for name, content in inverted}
    if not all(file.is_file() and fingerprint([file]) == content for file, content in files.items()):
        put_aside(root, ("inversion", "generated"))  # which take more photos only
    return support, query


def put_aside(root, names=MADE):
    """Renames what was made of other photos and cannot grow."""
    for folder in (root / name for name in names if (root / name).exists()):
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}_{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}_{number}"))
        print(f"the photos have changed: {folder} is now {folder}_{number}")


def commands(args, support, query):
    """{stage: words after `python`} of a run from these folders; `query` may be None."""
    values = {
        "root": args.output_dir, "support": support, "query": query, "split": args.split,
        "diffusion": args.pretrained_model_name_or_path, "teacher": args.teacher, "student": args.student,
    }  # fmt: skip
    found = {}
    for stage, template in STAGES.items():
        if (stage == "episode" and args.support_dir) or (stage == "evaluate" and not query):
            continue
        if not query:
            template = template.replace(" --query_dir {query}", "").replace(" --data_dir {query}", "")
        if not Path(HERE, args.student).is_dir():  # of others it is not known whether they have weights
            template = template.replace(" student_before=prototypes:{student}", "")
        words = [word.format(**values) for word in [*template.split(), "--seed", str(args.seed)]]
        found[stage] = words + words_of(vars(args).get(stage.partition("_")[0]) or "")
    return found


def run_stages(stages, record):
    """Runs the first stage that is not done as it should be, and all that follow. Returns the seconds of each.

    Args:
        stages: {stage: words after `python`}. record: file of what is done.
    """
    facts = read_json(record)
    with blaming(record):
        before = {k: dict(done, seconds=float(done["seconds"])) for k, done in facts["stages"].items()}
    facts["stages"] = {}
    environment = {} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "5"}  # a log needs no smooth bar
    for stage, words in stages.items():
        command = shlex.join(["python", *words])
        if before.get(stage, {}).get("command") != command:
            before = {}
            print(f"--- {command}", flush=True)
            clock = record.with_name(f".seconds-{stage}.json")  # of all its starts
            with stopwatch(clock):
                code = subprocess.run([sys.executable, *words], cwd=HERE, env=os.environ | environment).returncode
            if code:
                sys.exit(code)  # the script has said why
            before[stage] = {"command": command, "seconds": round(read_json(clock), 1)}
            write_json(record, facts | {"stages": facts["stages"] | before})
            clock.unlink()
        facts["stages"][stage] = before[stage]
    return {stage: done["seconds"] for stage, done in facts["stages"].items()}


def summarise(root, seconds):
    """The numbers of summary.json, from what the scripts wrote; accuracies only where there are photos to measure."""
    inversions = [read_json(path)["reconstruction_psnr_db"] for path in sorted(root.glob("inversion/*/inversion.json"))]
    generated = read_json(root / "evaluation_generated" / "results.json")["sets"]
    agreement = [row for rows in generated.values() for row in rows]
    export = read_json(root / "export" / "benchmark.json")
    timed = {}
    for row in export["latency"]:
        if row["device"] == "cpu" and row["batch_size"] == 1:
            what = [row["model"], row["runtime"], *([row["precision"]] if row["precision"] != "fp32" else [])]
            timed.setdefault(" ".join(what), row["median_ms"])  # by the first of --num_threads
    summary = {
        "seconds": seconds,
        "reconstruction_psnr_db": {
            kind: statistics.mean(value for psnr in inversions for value in psnr[kind]) for kind in inversions[0]
        },
        "teacher_agreement": sum(row["images"] * row["agreement"]["mean"] for row in agreement)
        / sum(row["images"] for row in agreement),
        "max_abs_diff": {name: facts["max_abs_diff"] for name, facts in export["fidelity"].items()},
        "latency_ms": timed,
    }
    if "evaluate" in seconds:
        found = read_json(root / "evaluation" / "results.json")
        summary["accuracy"] = {
            name: {k: m[k] for k in ("mean", "ci95", "count")} for name, m in found["methods"].items()
        }
        summary["paired_differences"] = found["paired_differences"]
        right = (found["methods"][name]["correct"] for name in ("student_tint", "student_supports"))
        summary["photos_to_tell"] = trials_to_tell(*right)
    return summary


def conclusion(summary, root):
    """In words which student is better, and whether so many photos can tell."""
    if "accuracy" not in summary:
        return (
            "Which student is better nobody can know: there are no photos to test on. Give some of the same classes as "
            f"--query_dir; with {ENOUGH} photos of each class or more, a quarter is held out."
        )
    ours, count = ("student_tint", "student_supports"), summary["accuracy"]["student_tint"]["count"]
    pair = next(pair for pair in summary["paired_differences"] if (pair["a"], pair["b"]) == ours)
    found = f"{points(pair['mean'], *pair['ci95'])} points on {count} test photos"
    if winner := better(pair):
        return f"The {TITLES[winner]} is better: {found}. Take {root}/{winner.removesuffix('_tint')}."
    looks = "They were right equally often."
    if wanted := summary["photos_to_tell"]:
        looks = f"If the difference is as large as it looks, about {wanted} could."
    return f"Which student is better cannot be told: generated images minus photos alone, {found}. {looks}"


def main(args):
    if Path.cwd() != HERE:  # where the scripts run
        for name in ("output_dir", "support_dir", "query_dir", "pretrained_model_name_or_path", "teacher", "student"):
            value = vars(args)[name]
            if value and (name == "output_dir" or Path(value).exists()):
                vars(args)[name] = str(Path(value).absolute())
    if args.query_dir and not args.support_dir:
        raise UserError("--query_dir needs --support_dir, the photos to learn from.")
    root = Path(args.output_dir)
    support, query = find_photos(args, root)
    if args.support_dir and args.pretrained_model_name_or_path == MINI_SD:
        print(f"note: {MINI_SD} draws icons of 32 x 32 pixels. Photographs want Stable Diffusion, on a GPU: "
              "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5")  # fmt: skip
    if args.support_dir and query and not args.query_dir:
        print(f"a quarter of each class is held out for the test: the students learn from {support}")
    seconds = run_stages(commands(args, support, query), root / "stages.json")
    with blaming(root):
        summary = summarise(root, seconds)
    write_json(root / "summary.json", summary)

    print(f"\ndone in {sum(seconds.values()):.0f} s")
    if query:
        print("accuracy on the test photos, 95% intervals")
        for name, found in summary["accuracy"].items():
            print(f"  {TITLES[name]:40} {with_interval(found)} %")
    print(conclusion(summary, root))
    print(f"the teacher recognises {summary['teacher_agreement']:.0%} of the generated images")
    print("reconstruction: " + ", ".join(f"{k} {v:.1f} dB" for k, v in summary["reconstruction_psnr_db"].items()))
    print("latency of one image: " + ", ".join(f"{k} {v:.2f} ms" for k, v in summary["latency_ms"].items()))
    print(f"pictures: {root}/generated/grid.png, {root}/inversion/*/reconstruction.png")
    print(f"reports: {', '.join(str(path) for path in sorted(root.glob('*/report.html')))}")
    print(f"in a browser, with its camera: {serving(root / 'export' / 'web')}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--support_dir", help="your photos: one folder per class; default: an episode of Icons-FS")
    add("--query_dir", help="test photos of the same classes")
    add("--output_dir", help="folder to write to; default: outputs/demo, or outputs/ and the name of --support_dir")
    add("--seed", type=natural_int, default=0, help="seed of the episode and of everything random")
    add("--split", default="unseen", help="split of Icons-FS that the episode is drawn from")
    add("--pretrained_model_name_or_path", default=MINI_SD, help="Stable Diffusion model: folder or hub name")
    add("--teacher", default="assets/teacher", help="timm backbone: model folder, timm name or hf-hub:name")
    add("--student", default="assets/student", help="model folder to start from, or timm name for random weights")
    for script in ("invert", "generate", "distill", "export"):
        add(f"--{script}", metavar='"OPTIONS"', default="", help="more options of that script")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"outputs/{Path(args.support_dir).name if args.support_dir else 'demo'}"
    return args


if __name__ == "__main__":
    run(main, parse_args)
