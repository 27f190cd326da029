"""A benchmark over few-shot episodes: each draws classes, supports and queries, and runs the project's scripts for each
arm. Arms share what they have in common, finished work is kept, processes divide the episodes among themselves.

Below --output_dir, episodes/<index>/ holds support/, <script>-<key>/ (what a script wrote) and result-<key>.json (which
queries an arm answers rightly). A key stands for all settings up to there: what is changed is made anew beside the old.
"""

import os
import shlex
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from common import datasets, models, planning, statistics
from common.cli import UserError, note, words_of
from common.images import as_tensor
from common.memory import announce, bytes_of
from common.other_images import load_pool, other_images
from common.processes import stopwatch
from common.records import blaming, check_settings, digest, fingerprint, provenance, read_json, settings_of, write_json
from common.report import data_uri
from common.shards import open_samples
from common.teachers import make_teacher

METHODS = {  # the stages that each method runs, or whose options it takes
    "teacher": ("distill",),  # itself, specialised on the supports
    "prototypes": ("distill",),  # the student's, before distillation
    "supports": ("distill",),
    "base": ("distill",),  # on unlabelled images of base classes
    "mined": ("distill",),  # on the unlabelled images of --web_dir that are nearest to the supports
    "real": ("distill",),  # on other images of the classes
    "tint": ("invert", "generate", "distill"),
    "textual_inversion": ("invert", "generate", "distill"),
    "null_text": ("invert", "generate", "distill"),
    "img2img": ("invert", "generate", "distill"),
}
OPTIONS = (
    "dataset", "dataset_dir", "split", "num_ways", "num_shots", "num_queries", "num_episodes", "seed", "methods",
    "pretrained_model_name_or_path", "teacher", "teacher_image_size", "student", "invert", "generate", "distill",
    "num_real", "num_unlabeled", "web_dir",
)  # fmt: skip
FILES = (  # options that name a file or a folder, whose contents count
    "pretrained_model_name_or_path", "upscaler", "prompt_templates", "teacher", "teacher_checkpoint", "student",
    "student_checkpoint",
)  # fmt: skip
# Options of the scripts that a benchmark sets itself.
SET_HERE = ("output_dir", "seed", "support_dir", "inversion_dir", "train_dir", "unlabeled_dir", "method")
PARTS = {"teacher": "teacher", "prototypes": "student"}  # whose options alone count, and, for the teacher,
VIEWS = ("min_crop", "flip_probability", "color_jitter")  # those of the views that it may be trained on
IDENTITY = ("dataset", "dataset_dir", "split", "num_ways", "num_shots", "seed")  # of a benchmark: it cannot change


@dataclass(frozen=True)
class Arm:
    """One way to a classifier: its scripts' arguments, and for each a key that stands for all settings up to there."""

    name: str
    method: str
    options: str
    mains: dict  # {script: its function of arguments}
    arguments: dict  # {script: Namespace}
    keys: dict  # {script, or "images" that no script makes: key}
    key: str


def parse_arm(text, args, stages, precision="no"):
    """An Arm from "[NAME=]METHOD [--SCRIPT.OPTION VALUE ...]", as "free=tint --generate.alpha 1".

    A UserError tells of an unknown method, or an option that names no script that it runs.

    Args:
        stages: {"invert" | "generate" | "distill": the script, with its `parse_args` and `main`}.
        precision: the mixed precision that the scripts run in.
    """
    head, *words = words_of(text) or [""]
    name, _, method = head.rpartition("=")
    if method not in METHODS:
        raise UserError(f"--methods {text}: unknown method {method!r}; there are {', '.join(METHODS)}.")
    scripts, counts = METHODS[method], (PARTS.get(method, ""), *(VIEWS if method == "teacher" else ()))
    teacher = ["--teacher", args.teacher]
    teacher += ["--teacher_image_size", str(args.teacher_image_size)] if args.teacher_image_size else []
    own = {
        "invert": ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path, *words_of(args.invert)],
        "generate": ["--no-agreement", "--method", method, *teacher, *words_of(args.generate)],
        "distill": [*teacher, "--student", args.student, *words_of(args.distill)],
    }
    if method == "supports":
        own["distill"].append("--supports_only")
    script = None
    for word in words:
        if word.startswith("--"):
            script, dot, option = word[2:].partition(".")
            if script not in scripts or not dot or not option.startswith(counts):
                raise UserError(f"--methods {text}: {word} should be --SCRIPT.OPTION, of {scripts}.")
            own[script].append(f"--{option}")
        elif script is None:
            raise UserError(f"--methods {text}: {word!r} belongs to no option.")
        else:
            own[script].append(word)
    arguments = {script: stages[script].parse_args(own[script]) for script in scripts}
    source = image_source(method, arguments["distill"], args)
    keys, key = {"images": digest(*source)} if source else {}, ""
    for script, chosen in arguments.items():
        outside = ["seed", *stages[script].OUTSIDE]
        plain = vars(stages[script].parse_args([])) | ({"method": method} if script == "generate" else {})
        if changed := [option for option in SET_HERE if vars(chosen).get(option) != plain.get(option)]:
            raise UserError(f"--methods {text}: the benchmark itself sets --{changed[0]} of {script}: leave it out.")
        if script == "generate" and chosen.filter_threshold is None:
            outside += ["teacher", "teacher_image_size"]
        if script == "invert" and method == "null_text":  # its prompt has no word to learn
            chosen.max_train_steps, chosen.prompt = 0, chosen.prompt.split(" of ")[0].replace("{}", "").strip()
        settings = with_contents(settings_of(chosen, *outside)) | {"mixed_precision": precision}
        settings = {name: value for name, value in settings.items() if name.startswith(counts)}
        keys[script] = key = digest(key, settings, *([method, *source] if script == "distill" else []))
    return Arm(name or head, method, shlex.join(words), {s: stages[s].main for s in scripts}, arguments, keys, key)


def with_contents(settings):
    """Settings, with a fingerprint of what lies in the files and model folders that they name: a path says little."""

    def contents(path):
        path = Path(path or os.devnull)
        below = (file for file in path.rglob("*") if file.suffix in (".safetensors", ".json"))
        files = [path] if path.is_file() else sorted(below)
        return hashed(tuple((file, file.stat().st_mtime_ns) for file in files)) if files else None

    return {name: [value, contents(value)] if name in FILES else value for name, value in settings.items()}


@cache
def hashed(files):
    return fingerprint(path for path, _ in files)


def image_source(method, options, args):
    """What decides which other images an arm trains on, where no script makes them."""
    if method == "real":
        return [args.num_real]
    if method not in ("base", "mined"):
        return []
    teacher = {k: vars(options)[k] for k in ("teacher", "teacher_image_size", "teacher_checkpoint")}  # mines
    source = [args.num_unlabeled, load_pool(method, args).fingerprint()]
    return source + ([with_contents(teacher)] if method == "mined" else [])


def run_script(script, arm, folder, seed, **inputs):
    """Runs a script, as a function with its own command line, into folder/<script>-<key>, unless that is done. Its bars
    and messages go nowhere. Returns the folder, and the seconds that the script took in all its starts."""
    output_dir = folder / f"{script}-{arm.keys[script]}"
    done, clock = output_dir / "seconds.json", output_dir / ".seconds.json"
    if not done.is_file():
        arguments = vars(arm.arguments[script]) | inputs | {"seed": seed, "output_dir": str(output_dir)}
        with stopwatch(clock), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            arm.mains[script](Namespace(**arguments))
        with suppress(FileNotFoundError):  # another launch that shares the folder was as quick
            clock.replace(done)
    with blaming(done):
        return output_dir, float(read_json(done))


def specialise(arm, folder, seed, supports, dataset, args, device):
    """The classifier of an arm in one episode of these supports, {class name: references}: a function of images
    [B, 3, size, size] in [0, 1] to logits; its size; and {script, or what else: seconds}."""
    before = time.perf_counter()
    options = Namespace(**vars(arm.arguments["distill"]) | {"seed": seed})
    if arm.method in PARTS:
        pictures = [dataset.open(name, reference) for name, drawn in supports.items() for reference in drawn]
        labels = torch.arange(args.num_ways).repeat_interleave(args.num_shots)
        if arm.method == "teacher":
            backbone = models.load_model(options.teacher, True, options.teacher_image_size, options.teacher_checkpoint)
            classifier = make_teacher(backbone.to(device), options, pictures, labels)
        else:
            student, _ = models.load_student(options, list(supports))
            images = torch.stack([as_tensor(picture, models.input_size(student)[0]) for picture in pictures])
            classifier = models.PrototypeClassifier(student.to(device), images.to(device), labels)
        return classifier, models.input_size(classifier)[0], {arm.method: time.perf_counter() - before}
    seconds, inputs = {}, {"support_dir": str(folder / "support")}
    if "invert" in arm.keys:
        inversion, seconds["invert"] = run_script("invert", arm, folder, seed, **inputs)
        images, seconds["generate"] = run_script("generate", arm, folder, seed, inversion_dir=str(inversion))
        inputs["train_dir"] = str(images)
    elif arm.method != "supports":
        option = "train_dir" if arm.method == "real" else "unlabeled_dir"
        images = folder / f"{arm.method}-{arm.keys['images']}"
        if not images.is_dir():
            datasets.write_images(*other_images(arm.method, folder, seed, supports, dataset, options, args), images)
        inputs[option] = str(images)
    student, seconds["distill"] = run_script("distill", arm, folder, seed, **inputs)
    model = models.load_model(str(student)).to(device)
    return models.with_head(model), models.input_size(model)[0], seconds


def draw(index, arms, dataset, args):
    """Supports and queries of an episode, each {class name: references}; classes in the order that the scripts see."""
    order = datasets.draw_episode(dataset, args.num_ways, args.num_shots, args.seed, index)
    held = args.num_real if any(arm.method == "real" for arm in arms) else 0
    supports = {name: order[name][: args.num_shots] for name in sorted(order)}
    beside = {name: order[name][args.num_shots :] for name in sorted(order)}
    queries = {name: rest[: max(0, len(rest) - held)][: args.num_queries] for name, rest in beside.items()}
    for name, drawn in queries.items():
        if len(drawn) < (args.num_queries or 1):
            real = f", {held} of them held back (--num_real)" if held else ""
            raise UserError(f"{name} has {len(beside[name])} images beside its supports{real}, which does not leave "
                            f"--num_queries {args.num_queries or 'all'}: lower "
                            f"{'one of the two' if held else '--num_queries'}.")  # fmt: skip
    return supports, queries


def is_done(record, queries):
    return all(len(record["correct"].get(name, [])) >= len(drawn) for name, drawn in queries.items())


def announce_arms(arms, stages, args, accelerator):
    """Says what memory the arms take, one after the other, beside a diffusion model, which stays."""
    kept, parts = [], {}
    for arm in arms:
        options, found = Namespace(**vars(arm.arguments["distill"]) | {"seed": args.seed}), {}
        if "invert" in arm.arguments:
            inversion = Namespace(**vars(arm.arguments["invert"]))  # which gets the model's own resolution
            pipe = stages["invert"].load_model(inversion, accelerator.device, accelerator.mixed_precision)
            kept = max(kept, [pipe.unet, pipe.vae, pipe.text_encoder], key=lambda modules: bytes_of(*modules))
            ways, made = min(inversion.class_batch_size, args.num_ways), arm.arguments["generate"]
            found |= stages["invert"].activations(pipe, ways, ways * args.num_shots, inversion)
            count = min(made.batch_size, made.num_images_per_class)
            found |= stages["generate"].activations(pipe, inversion.resolution, count)
        if arm.method != "prototypes":
            teacher = models.load_model(options.teacher, True, options.teacher_image_size, options.teacher_checkpoint)
        supports, classes = args.num_ways * args.num_shots, [*map(str, range(args.num_ways))]
        student = teacher if arm.method == "teacher" else models.load_student(options, classes)[0]
        if arm.method not in PARTS:
            modules, learning = stages["distill"].needs(teacher, student, supports, args.num_ways, options)
            found |= {what: bytes_of(*modules) + count for what, count in learning.items()}
        count = min(args.batch_size, args.num_queries or args.batch_size)
        found["queries (--batch_size)"] = bytes_of(student) + models.answering_bytes(student, count)
        parts |= {f"{arm.name}: {what}": count for what, count in found.items()}
    announce(kept, parts, accelerator.device)


def run_episode(index, arms, dataset, args, device, say_needs):
    """What is left of one episode: for each arm, which queries it answers rightly; before the first, `say_needs()`."""
    folder = episode_folder(index, args)
    supports, queries = draw(index, arms, dataset, args)
    for arm in arms:
        record = read_record(folder, arm)
        if is_done(record, queries):
            continue
        say_needs()
        if arm.keys and not (folder / "support").is_dir():
            datasets.write_images(dataset, supports, folder / "support")
        seed = args.seed * 1_000_000 + index  # each episode has noise of its own
        classifier, size, seconds = specialise(arm, folder, seed, supports, dataset, args, device)
        correct = {name: record["correct"].get(name, []) for name in queries}
        before, new = time.perf_counter(), 0
        for label, name in enumerate(queries):
            while part := queries[name][len(correct[name]) :][: args.batch_size]:
                images = torch.stack([as_tensor(dataset.open(name, reference), size) for reference in part])
                with torch.no_grad():
                    answers = classifier(images.to(device)).argmax(-1)
                correct[name] += (answers == label).int().tolist()
                new += len(part)
        del classifier  # before the next arm's scripts begin
        seconds["query"] = (time.perf_counter() - before) / new
        write_json(folder / f"result-{arm.key}.json", {"correct": correct, "seconds": seconds})


def episode_folder(index, args):
    return Path(args.output_dir) / "episodes" / f"{index:05d}"


def read_record(folder, arm):
    """{"correct": {class name: [1 or 0 of each query]}, "seconds": {part: seconds}} of an arm, or {"correct": {}}."""
    path = folder / f"result-{arm.key}.json"
    if not path.is_file():
        return {"correct": {}}
    with blaming(path):
        record = read_json(path)
        correct = {name: list(map(int, hits)) for name, hits in record["correct"].items()}
        return {"correct": correct, "seconds": {part: float(spent) for part, spent in record["seconds"].items()}}


def leave_group():
    """This process's rank; from here on each computes for itself.

    Episodes need nothing of each other, so the processes do not talk: each takes the next that is neither done nor
    locked by another, and the one that finishes last writes the results. They may run on several machines that share
    --output_dir, at different times too.
    """
    rank = int(os.environ.get("RANK", 0))
    if torch.accelerator.is_available():
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
        torch.accelerator.set_device_index(local_rank % count)  # several may share a GPU
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # LOCAL_WORLD_SIZE stays: cores are still shared
        os.environ.pop(name, None)
    return rank


def collect(arms, dataset, args, pilot=None, wishes=()):
    """What results.json says of a finished benchmark, or None while episodes are missing.

    Args:
        pilot, wishes: how many of the episodes decided on the number of all, if any did, and for what: as `next_of`.
    """

    def deciding(*names):
        return pilot if set(names) in map(set, wishes) else None

    correct, seconds = defaultdict(list), defaultdict(list)
    scripts, episodes = [], []
    for index in range(args.num_episodes):
        folder, spent = episode_folder(index, args), {}
        _, queries = draw(index, arms, dataset, args)
        for arm in arms:
            record = read_record(folder, arm)
            if not is_done(record, queries):
                return None
            correct[arm.name].append([record["correct"][c][: len(q)] for c, q in queries.items()])
            seconds[arm.name].append(sum(t for script, t in record["seconds"].items() if script != "query"))
            spent |= {arm.keys.get(what, (what, arm.name)): t for what, t in record["seconds"].items()}
        scripts.append(spent)
        episodes.append({"index": index, "classes": list(queries)})
    per_query = [sum(t for key, t in spent.items() if key[0] == "query") for spent in scripts]
    methods = {}
    for arm in arms:
        hits, counts = (np.array([[f(c) for c in episode] for episode in correct[arm.name]]) for f in (sum, len))
        with_alpha = arm.method in ("tint", "null_text", "img2img")
        alpha = arm.arguments["generate"].alpha if with_alpha else ["none"]
        methods[arm.name] = {"method": arm.method, "options": arm.options} | {
            "alpha": alpha[0] if len(alpha) == 1 and isinstance(alpha[0], float) else None,
            **statistics.benchmark_accuracy(hits, counts, deciding(arm.name)),
            "per_episode": (hits.sum(1) / counts.sum(1)).tolist(),
            "answers": [["".join(map(str, c)) for c in episode] for episode in correct[arm.name]],
            "seconds": float(np.mean(seconds[arm.name])),
        }
    return {
        "kind": "benchmark",
        "dataset": {"name": args.dataset} | {k: vars(args)[k] for k in (*IDENTITY[2:], "num_queries", "num_episodes")},
        "methods": methods,
        "paired_differences": [
            {"a": a, "b": b} | statistics.benchmark_difference(correct[a], correct[b], deciding(a, b))
            for a, b in statistics.pairs_of(methods)
        ],
        "episodes": episodes,
        "examples": examples(arms, episode_folder(0, args)),
        "cost": {
            "episode_seconds": float(np.mean([sum(spent.values()) for spent in scripts]) - np.mean(per_query)),
            "query_seconds": float(np.mean(per_query)),
        },
    } | provenance(args, OPTIONS)


def examples(arms, folder, count=6):
    """Supports of an episode and what each arm generated from them, for the report."""
    if not (folder / "support").is_dir():
        return []

    def first(directory):
        found = defaultdict(list)
        for row, image in open_samples(directory):
            if len(found[row["label"]]) < count:
                found[row["label"]].append(data_uri(image))
        return found

    supports = first(folder / "support")
    generated = {a.name: first(folder / f"generate-{a.keys['generate']}") for a in arms if "generate" in a.keys}
    return [{"class": c, "supports": supports[c], "generated": {name: found[c] for name, found in generated.items()}}
            for c in supports]  # fmt: skip


def evaluate_episodes(args, stages, accelerator, rank=0):
    """Accuracy of each of --methods over the episodes of --dataset, for results.json; None while other processes have
    episodes to do: the one that finishes last has the results.

    Args:
        stages: as those of `parse_arm`. rank: what `leave_group` says.
    """
    dataset = datasets.load_dataset(args.dataset, args.split, args.dataset_dir)
    arms = [parse_arm(text, args, stages, accelerator.mixed_precision) for text in args.methods]
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError(f"--methods {' '.join(args.methods)}: two have the same name; say NAME=METHOD.")
    for index in range(args.num_episodes):  # a class that is too small is told of now, not after hours
        draw(index, arms, dataset, args)
    output_dir = Path(args.output_dir)
    record = output_dir / "benchmark.json"
    identity = {name: vars(args)[name] for name in IDENTITY} | {"images": dataset.fingerprint()}
    if not check_settings(record, identity):
        write_json(record, {"settings": identity})

    say_needs = cache(partial(announce_arms, arms, stages, args, accelerator))

    def run(stage):
        """This process's share of a stage, whose options are returned."""
        now = Namespace(**vars(args) | stage)
        for index in tqdm(range(now.num_episodes), desc="episodes", disable=rank > 0):
            with suppress(Timeout), FileLock(episode_folder(index, args) / ".lock", timeout=0):
                run_episode(index, arms, dataset, now, accelerator.device, say_needs)
        return now

    if args.half_width is None:
        results = collect(arms, dataset, run({}))
    else:
        results = run_stages(run, arms, dataset, args, rank)
    if results is None:
        print(f"process {rank} has done its share; the one that finishes last writes {output_dir}/results.json")
        return None
    look = {name: results["dataset"][name] for name in ("num_episodes", "num_queries")}
    before, looks = output_dir / "results.json", []
    if before.is_file():
        with blaming(before):
            known = read_json(before, dict)
            looks = list(known.get("looks", []))
            if args.half_width is None:  # those on the way to the last, of a benchmark that stopped by itself, count
                decided = [{name: stage[name] for name in look} for stage in known.get("stages", [])]
                looks[-1:-1] = [stage for stage in decided if stage not in looks]
    return results | {"looks": looks if looks[-1:] == [look] else [*looks, look]}


def run_stages(run, arms, dataset, args, rank):
    """Runs a pilot of --num_episodes, and then as many episodes as --half_width takes (`planning.next_of`).

    Process 0 decides, once all have done their share, and keeps its decisions in stages.json: the other processes, and
    a benchmark that is started again, go by them. It alone returns what results.json says.

    Args:
        run: function of a stage that does this process's share of it and returns its options.
    """
    path, held = Path(args.output_dir) / "stages.json", args.num_real * any(arm.method == "real" for arm in arms)
    most = min(map(len, dataset.classes.values())) - args.num_shots - held
    names = [arm.name for arm in arms]
    wishes = [args.compare] if args.compare else [[name] for name in ([args.method] if args.method else names)]
    for name in chain.from_iterable(wishes):
        if name not in names:
            raise UserError(f"{name} is none of --methods: {', '.join(names)}.")
    if most < (args.num_queries or 1):
        raise UserError(f"--half_width may draw any class, of which the smallest has {most} images for queries: lower "
                        "--num_queries, --num_shots or --num_real.")  # fmt: skip
    if args.num_episodes < 2 or args.num_queries == 1 or args.half_width >= 0.5:
        raise UserError("--half_width, between 0 and 0.5, needs a pilot of 2 or more --num_episodes and --num_queries.")
    pilot = {"num_episodes": args.num_episodes, "num_queries": args.num_queries, "pilot": args.num_episodes}
    wish = digest(args.half_width, wishes, [arm.key for arm in arms])
    if rank == 0 and not check_settings(path, pilot):
        write_json(path, {"settings": pilot, "stages": [pilot], "narrow": None})
    while True:
        decided = until(lambda: path.is_file() and read_json(path, dict))
        with blaming(path):
            stages = [{k: stage[k] and int(stage[k]) for k in pilot} for stage in decided["stages"]]
            last, narrow = stages[-1], decided["narrow"]
        now = run(last)
        if rank > 0:
            if narrow == wish:
                return None
            until(lambda before=decided: read_json(path) != before)
            continue
        results = until(partial(collect, arms, dataset, now, last["pilot"], wishes))
        more = planning.next_of(results, stages, wishes, args.half_width, most)
        if more is None:
            write_json(path, decided | {"narrow": wish})
            return results | {"half_width": args.half_width, "stages": stages, "wishes": wishes}
        print(f"{more['num_episodes']} episodes of {more['num_queries'] or 'all'} queries a class come next")
        write_json(path, decided | {"stages": [*stages, more]})


def until(found):
    """What `found` returns, as soon as it is something: other processes are at work on it."""
    while not (value := found()):
        note("waiting for the other processes' episodes")
        time.sleep(1)
    return value
