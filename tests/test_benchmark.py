"""Benchmarks over episodes: what is shared, kept, extended and divided, and that a folder gives the same accuracy."""

import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import distill
import evaluate
import tint_invert
from benchmarks import students
from common import datasets, diffusion, episodes, icons_fs, models, other_images, planning, statistics
from common.cli import UserError
from common.images import as_tensor
from common.processes import stopwatch
from common.records import read_json, write_json
from common.teachers import make_teacher
from tests.conftest import ACCELERATE, ROOT, TWO_NODES, TWO_PROCESSES, killed_when, launch

EPISODES = ("evaluate.py", "--dataset", "icons_fs", "--split", "val", "--num_ways", 2, "--num_shots", 2)
LITTLE = (
    "--invert", "--max_train_steps 3 --validation_samples 2 --num_inference_steps 3 --null_text_steps 1",
    "--generate", "--num_images_per_class 3", "--distill", "--max_train_steps 3 --train_batch_size 4",
)  # fmt: skip


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def files_of(folder, pattern):
    """{path: time of its last change}"""
    return {path: path.stat().st_mtime_ns for path in sorted(Path(folder).glob(pattern))}


def test_a_benchmark_grows_by_what_is_new_only(tmp_path):
    """First two arms, then more queries, episodes and arms: what was there is neither changed nor made again."""
    base = (*EPISODES, "--output_dir", tmp_path, *LITTLE)
    launch(*base, "--num_episodes", 1, "--num_queries", 4, "--methods", "prototypes", "tint", by=ACCELERATE)
    first, made = results_of(tmp_path), files_of(tmp_path, "episodes/*/*/**/*.*")
    records = {p: json.loads(p.read_text()) for p in (tmp_path / "episodes" / "00000").glob("result-*.json")}
    assert len(records) == 2 and len(list(tmp_path.glob("episodes/00000/invert-*"))) == 1

    arms = ("prototypes", "tint", "free=tint --generate.alpha 1", "words=textual_inversion", "img2img", "supports",
            "teacher")  # fmt: skip
    launch(*base, "--num_episodes", 2, "--num_queries", 6, "--methods", *arms)
    now = files_of(tmp_path, "episodes/*/*/**/*.*")
    assert {path: now[path] for path in made} == made  # nothing was made again
    for folder in (tmp_path / "episodes").iterdir():
        scripts = [path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()]
        assert {s: scripts.count(s) for s in scripts} == {"support": 1, "invert": 1, "generate": 4, "distill": 5}
    for path, before in records.items():
        after = json.loads(path.read_text())["correct"]
        assert {name: hits[:4] for name, hits in after.items()} == before["correct"]
        assert all(len(hits) == 6 for hits in after.values())
    results = results_of(tmp_path)
    assert list(results["methods"]) == ["prototypes", "tint", "free", "words", "img2img", "supports", "teacher"]
    assert results["methods"]["tint"]["num_queries"] == 2 * 2 * 6
    assert results["episodes"][0] == first["episodes"][0]
    assert len(results["paired_differences"]) == 21
    assert len(results["examples"]) == 2 and list(results["examples"][0]["generated"]) == [
        "tint",
        "free",
        "words",
        "img2img",
    ]
    assert (tmp_path / "report.html").is_file()

    _, error = launch(*base, "--seed", 1, "--methods", "teacher", code=2)
    assert "benchmark.json" in error and "seed: 0 then, 1 now" in error


def test_two_processes_and_a_killed_run_give_the_same(tmp_path):
    """One process, two, and one that was killed in between: the same answers of every arm to every query."""
    options = ("--num_episodes", 4, "--num_queries", "all", "--methods", "teacher", "prototypes", "supports", *LITTLE)
    launch(*EPISODES, "--output_dir", tmp_path / "one", *options)
    launch(*EPISODES, "--output_dir", tmp_path / "two", *options, by=TWO_NODES)

    killed = tmp_path / "killed"
    command = (*EPISODES, "--output_dir", killed, *options)
    killed_when(lambda: list(killed.glob("episodes/00001/distill-*")), *command)
    assert not (killed / "results.json").exists()
    before = files_of(killed, "episodes/00000/result-*.json")
    assert len(before) == 3
    launch(*EPISODES, "--output_dir", killed, *options)
    assert files_of(killed, "episodes/00000/result-*.json") == before

    one = results_of(tmp_path / "one")
    for other in ("two", "killed"):
        other = results_of(tmp_path / other)
        assert other["episodes"] == one["episodes"]
        for name, method in one["methods"].items():
            assert other["methods"][name]["per_episode"] == pytest.approx(method["per_episode"], abs=0.011), name


def test_a_process_takes_what_is_left_and_no_other_has(tmp_path):
    """One episode is another process's, who knows for how long; the second is done, and the third is taken."""
    command = (*EPISODES, "--output_dir", tmp_path, "--num_queries", 2, "--methods", "prototypes", "--num_episodes")
    launch(*command, 2)
    shutil.rmtree(tmp_path / "episodes" / "00000")
    done = files_of(tmp_path, "episodes/00001/*.json")
    with FileLock(tmp_path / "episodes" / "00000" / ".lock"):
        out, _ = launch(*command, 3)
    assert "process 0 has done its share" in out
    assert files_of(tmp_path, "episodes/00001/*.json") == done and list(tmp_path.glob("episodes/00002/result-*"))
    assert not list(tmp_path.glob("episodes/00000/result-*"))
    launch(*command, 3)
    assert results_of(tmp_path)["dataset"]["num_episodes"] == 3


def test_the_arms_of_an_episode_share_one_pipeline_and_each_inverts_once(tmp_path, monkeypatch):
    """And what one arm has taught it, another does not see: its files are those of the script alone."""
    loaded, inverted = [], []
    load, invert = diffusion.StableDiffusionPipeline.from_pretrained, tint_invert.invert_images
    monkeypatch.setattr(diffusion.StableDiffusionPipeline, "from_pretrained",
                        lambda *args, **options: loaded.append(args) or load(*args, **options))  # fmt: skip
    monkeypatch.setattr(tint_invert, "invert_images", lambda *args: inverted.append(args) or invert(*args))
    diffusion.load_networks.cache_clear()
    argv = [*EPISODES[1:], "--output_dir", tmp_path / "out", "--num_queries", 2, "--num_episodes", 1, *LITTLE,
            "--methods", "null_text", "tint"]  # fmt: skip
    evaluate.main(evaluate.parse_args([*map(str, argv)]))
    assert len(loaded) == 1 and len(inverted) == 2
    (tint,) = (arm for arm in tmp_path.glob("out/episodes/00000/invert-*") if "{}" in read_prompt(arm))
    launch("tint_invert.py", "--support_dir", tmp_path / "out" / "episodes" / "00000" / "support", "--output_dir",
           tmp_path / "alone", "--seed", 0, *LITTLE[1].split())  # fmt: skip
    for path in tmp_path.glob("alone/*/*.safetensors"):
        assert path.read_bytes() == (tint / path.relative_to(tmp_path / "alone")).read_bytes()


def read_prompt(folder):
    return read_json(next(folder.glob("*/inversion.json")))["settings"]["prompt"]


def test_an_episode_as_folders_gives_the_same_accuracy(tmp_path):
    """The same episode written as image folders and measured there, by another code path."""
    same = ("--split", "val", "--num_ways", 3, "--num_shots", 2, "--seed", 5)
    launch("evaluate.py", "--dataset", "icons_fs", *same, "--num_episodes", 1, "--num_queries", "all",
           "--methods", "teacher", "prototypes", "--output_dir", tmp_path / "benchmark")  # fmt: skip
    launch("-m", "common.datasets", *same, "--episode", 0, "--output_dir", tmp_path)
    launch("evaluate.py", "--data_dir", tmp_path / "query", "--support_dir", tmp_path / "support",
           "--model", "teacher=assets/teacher", "prototypes=assets/student",
           "--output_dir", tmp_path / "folder")  # fmt: skip
    benchmark, folder = results_of(tmp_path / "benchmark"), results_of(tmp_path / "folder")
    assert benchmark["episodes"][0]["classes"] == folder["classes"]
    for name, method in folder["methods"].items():
        assert benchmark["methods"][name]["mean"] == pytest.approx(method["mean"])
        assert benchmark["methods"][name]["ci95"] == pytest.approx(method["ci95"])  # one episode: both are Wilson's


def test_real_base_and_mined_images_are_what_they_say(tmp_path):
    """Which images these arms train on, against the data set's own records and a search in numpy."""
    base = datasets.load_dataset("icons_fs", "base")
    names = sorted(base.classes)[:10]
    datasets.write_images(base, {name: base.classes[name][:20] for name in names}, tmp_path / "web")
    options = ("--num_episodes", 1, "--num_queries", "all", "--num_real", 7, "--num_unlabeled", 9, "--web_dir",
               tmp_path / "web", *LITTLE)  # fmt: skip
    launch(*EPISODES, "--output_dir", tmp_path, *options, "--methods", "supports", "real", "base", "mined")
    folder, results = tmp_path / "episodes" / "00000", results_of(tmp_path)
    assert list(results["methods"]) == ["supports", "real", "base", "mined"]

    def images(kind):
        return sorted(f"{p.parent.name}/{p.stem}" for p in next(folder.glob(f"{kind}-*")).glob("*/*.png"))

    val, web = datasets.load_dataset("icons_fs", "val"), datasets.load_web("icons_fs", tmp_path / "web")
    order = datasets.draw_episode(val, 2, 2, 0, 0)
    assert images("real") == sorted(f"{name}/{i}" for name in order for i in order[name][-7:])
    assert results["methods"]["real"]["num_queries"] == pytest.approx(
        np.mean([len(order[name]) - 2 - 7 for name in order]) * 2
    )
    assert len(images("base")) == 18 and {image.split("/")[0] for image in images("base")} <= set(base.classes)

    model, everything = models.load_model("assets/teacher"), other_images.references_of(web.classes)
    supports = [(name, i) for name in sorted(order) for i in order[name][:2]]
    f, s = (other_images.features_of(model, *x)[0].numpy() for x in ((web, everything), (val, supports)))
    f, s = ((x - s.mean(0)) / np.linalg.norm(x - s.mean(0), axis=1, keepdims=True) for x in (f, s))
    cosines = (f @ s.T).reshape(-1, 2, 2).max(2)
    found = set(images("mined"))
    for c in range(2):
        ranked = [f"{name}/{path.stem}" for name, path in (everything[k] for k in np.argsort(-cosines[:, c])[:8])]
        assert set(ranked) <= found
    assert 9 <= len(found) <= 18


def test_the_web_of_icons_fs_holds_no_image_of_an_episode():
    facts, web = icons_fs.load_drawings(), datasets.load_web("icons_fs")
    pools = [facts[name][int(i)]["pool"] for name, group in web.classes.items() for i in group]
    assert set(pools) == {"base", "web"} and len(web.classes) == 100


def test_mining_needs_images_to_mine_from(tmp_path):
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng([ord(name), i]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "splits.json").write_text(json.dumps({"base": ["a"], "novel": ["b", "c"]}))
    command = ("evaluate.py", "--dataset", tmp_path / "data", "--num_ways", 2, "--num_shots", 1, "--num_queries", 1,
               "--num_episodes", 1, "--num_unlabeled", 1, *LITTLE)  # fmt: skip
    _, error = launch(*command, "--methods", "mined", "--output_dir", tmp_path / "out", code=2)
    assert "give a folder of them with --web_dir" in error
    command = (*command, "--web_dir", tmp_path / "data", "--output_dir", tmp_path / "out")
    _, notes = launch(*command, "--methods", "mined", "base")
    assert "6 images to mine from are its own, and left out" in notes  # supports, queries, and the third of b and c
    assert {p.parent.name for p in tmp_path.glob("out/episodes/00000/mined-*/*/*.png")} == {"a"}
    _, error = launch(*command, "--methods", "real", code=2)
    assert "2 images beside its supports, 40 of them held back (--num_real)" in error


def test_supports_queries_and_real_images_never_meet_however_few_there_are():
    """Of classes of 1 to 9 images: each image is a support, a query, held back or unused, or the episode is refused."""
    real, refused = evaluate_arm("real"), 0
    for size, shots, held, wanted in itertools.product(range(1, 10), (1, 2), (1, 3, 8), (None, 1, 4)):
        numbers = [f"{i}" for i in range(size)]
        data = datasets.FewShotDataset(
            {"a": numbers, "b": numbers}, lambda name, i: Image.new("L", (2, 2), 10 * (name == "a") + int(i))
        )
        args = SimpleNamespace(num_ways=2, num_shots=shots, num_real=held, num_queries=wanted, seed=0)
        if size < shots + held + (wanted or 1):
            with pytest.raises(UserError):
                episodes.draw(0, [real], data, args)
            refused += 1
            continue
        supports, queries = episodes.draw(0, [real], data, args)
        _, others = other_images.other_images("real", Path("00000"), 0, supports, data, None, args)
        for name in "ab":
            together = supports[name] + queries[name] + others[name]
            assert len(set(together)) == len(together) <= size
            assert (len(supports[name]), len(others[name])) == (shots, held)
            assert len(queries[name]) == (wanted or size - shots - held)
    assert 50 < refused < 160


def test_a_real_image_that_is_the_same_as_a_query_is_not_trained_on():
    data = datasets.FewShotDataset(
        {name: [f"{i}" for i in range(8)] for name in "ab"}, lambda name, i: Image.new("L", (2, 2), int(i) // 2)
    )
    args = SimpleNamespace(num_ways=2, num_shots=1, num_real=4, num_queries=None, seed=0)
    supports, queries = episodes.draw(0, [evaluate_arm("real")], data, args)
    _, others = other_images.other_images("real", Path("00000"), 0, supports, data, None, args)
    tested = {int(i) // 2 for group in (supports, queries) for name in "ab" for i in group[name]}
    assert sum(map(len, others.values())) < 8 and not tested & {int(i) // 2 for group in others.values() for i in group}


def evaluate_arm(text, *options):
    args = evaluate.parse_args(["--dataset", "icons_fs", *options])
    return episodes.parse_arm(text, args, evaluate.STAGES)


def test_the_seconds_of_a_run_that_is_killed_count(tmp_path):
    clock = tmp_path / "seconds.json"
    write_json(clock, 1000)
    with stopwatch(clock):
        while (at_a_kill := read_json(clock)) == 1000:
            time.sleep(0.05)
        assert at_a_kill > 1000
    assert at_a_kill <= read_json(clock)


def test_a_specialised_teacher_is_measured_as_it_teaches(tmp_path):
    """The teacher of an episode answers as the one that distill.py would build on the same supports."""
    launch(*EPISODES, "--num_episodes", 1, "--num_queries", 30, "--output_dir", tmp_path,
           "--methods", "teacher", "probe=teacher --distill.teacher_specialization linear_probe")  # fmt: skip
    dataset = datasets.load_dataset("icons_fs", "val")
    order = datasets.draw_episode(dataset, 2, 2, 0, 0)
    pictures = [dataset.open(name, i) for name in sorted(order) for i in order[name][:2]]
    labels = torch.arange(2).repeat_interleave(2)
    for name, kind in (("teacher", "prototypes"), ("probe", "linear_probe")):
        args = distill.parse_args(["--teacher_specialization", kind])
        teacher = make_teacher(models.load_model(args.teacher), args, pictures, labels)
        queries = torch.stack([as_tensor(dataset.open(c, i), 64) for c in sorted(order) for i in order[c][2:32]])
        right = (teacher(queries).argmax(-1) == torch.arange(2).repeat_interleave(30)).float().mean().item()
        assert results_of(tmp_path)["methods"][name]["mean"] == pytest.approx(right)


def test_a_benchmark_stops_when_its_interval_is_narrow_enough(tmp_path):
    """A pilot, the rest, the end: by two processes that do not talk; started again, it goes by what was decided."""
    command = (*EPISODES, "--num_episodes", 4, "--num_queries", 3, "--methods", "prototypes", "teacher", "--output_dir",
               tmp_path, "--half_width")  # fmt: skip
    launch(*command, 0.04, "--compare", "prototypes", "teacher", by=TWO_PROCESSES)
    first, stages = results_of(tmp_path), json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert stages[0] == {"num_episodes": 4, "num_queries": 3, "pilot": 4} and len(stages) > 1
    (pair,) = first["paired_differences"]
    low, high = pair["ci95"]
    assert high - low <= 0.08 and pair["num_episodes"] == stages[-1]["num_episodes"] == first["dataset"]["num_episodes"]
    m, pilot = (planning.scores_of(first, ["teacher", "prototypes"], n) for n in (None, stages[-1]["pilot"]))
    widest = statistics.interval(m, statistics.squared_margin(m, pilot) / m.episodes)
    assert [low, high] == pytest.approx(list(widest)) and high - low > 0.04  # it went on no longer than it had to

    episodes = files_of(tmp_path, "episodes/*/result-*.json")
    launch(*command, 0.04, "--compare", "prototypes", "teacher")
    assert results_of(tmp_path)["looks"] == first["looks"] and len(first["looks"]) == 1
    assert files_of(tmp_path, "episodes/*/result-*.json") == episodes
    assert "A pilot decided" in (tmp_path / "report.html").read_text()
    launch(*EPISODES, "--num_episodes", 2, "--num_queries", 3, "--methods", "teacher", "--output_dir", tmp_path)
    looks = results_of(tmp_path)["looks"]  # of the benchmark that stopped by itself, stage by stage, and this
    assert looks[0] == {"num_episodes": 4, "num_queries": 3} and looks[-2] == first["looks"][0]
    assert len(looks) == len(stages) + 1
    assert f"Results were looked at {len(looks)} times" in (tmp_path / "report.html").read_text()
    for options, message in (((0.04, "--method", "tint"), "none of --methods"), ((0.7,), "between 0 and 0.5")):
        assert message in launch(*command, *options, code=2)[1]


def test_planning_from_a_pilot(tmp_path, capsys):
    """The plan of a pilot's results, of numbers, and what is refused."""
    launch(*EPISODES, "--num_episodes", 4, "--methods", "teacher", "prototypes", "--output_dir", tmp_path)
    output, _ = launch("evaluate.py", "--plan", "--pilot", tmp_path / "results.json", "--method", "teacher",
                       "--half_width", 0.05, "--output_dir", tmp_path / "plan")  # fmt: skip
    assert "customary" in output and "teacher, a pilot of 4 episodes" in output
    launch("evaluate.py", "--plan", "--pilot", tmp_path / "results.json", "--compare", "teacher", "prototypes",
           "--half_width", 0.005, "--output_dir", tmp_path / "plan")  # fmt: skip
    assert "evaluate.py --half_width 0.05 --method teacher\n" in output
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert found["low"]["seconds"] < found["plan"]["seconds"] < found["high"]["seconds"]
    low, high = found["plan"]["range"]
    assert low < found["plan"]["half_width"] < high and found["plan"]["half_width"] <= 0.005

    def plan(*options):
        evaluate.main(evaluate.parse_args(["--plan", "--output_dir", str(tmp_path / "plan"), *map(str, options)]))
        return json.loads((tmp_path / "plan" / "plan.json").read_text())

    numbers = ("--accuracy", 0.9, "--episode_variance", 0.0025, "--episode_seconds", 100, "--query_seconds", 0.1)
    found = plan(*numbers, "--half_width", 0.01)
    best = found["plan"]
    assert best["half_width"] <= 0.01 and best["seconds"] < found["customary"]["seconds"]
    episodes, queries = best["num_episodes"], best["num_queries"]
    variance = 0.0025 / episodes + (0.9 - 0.81 - 0.0025) / (episodes * queries)  # theorem 1, by hand
    assert best["half_width"] == pytest.approx(1.96 * variance**0.5, rel=0.02)
    differing = ("--disagreement", 0.1, "--episode_variance", 0.0004, *numbers[4:], "--half_width", 0.01)
    difference = plan(*differing)["plan"]
    variance = (0.0004 + (0.1 - 0.0004) / difference["num_queries"]) / difference["num_episodes"]
    student = stats.t.ppf(0.975, difference["num_episodes"] - 1)
    assert difference["half_width"] == pytest.approx(student * variance**0.5, rel=0.03)
    again = plan(*numbers, "--budget_seconds", best["seconds"])["plan"]
    assert again["half_width"] == pytest.approx(best["half_width"], rel=1e-3)

    for options, message in [
        ((), "needs one of --half_width and --budget_seconds"),
        (("--half_width", 0.01), "--plan needs --pilot"),
        (("--half_width", 0.01, "--pilot", tmp_path / "none.json"), "no such file"),
        (("--half_width", 0.01, "--pilot", tmp_path / "results.json", "--method", "tint"), "has teacher, prototypes"),
        (("--budget_seconds", 10, *numbers), "do not pay for two episodes"),
        (
            ("--budget_seconds", 1e308, *numbers, "--episode_seconds", 1e-9, "--query_seconds", 0),
            "cannot be .*infinity",
        ),
        (
            ("--half_width", 0.01, *numbers, "--disagreement", 0.1, "--accuracy", 0.2, "--episode_variance", 0),
            "differ on 0.1 of the queries differ by no more",
        ),
        (("--half_width", 0.01, *numbers, "--num_ways", 9, "--max_queries", 8), "8 queries an episode are less than"),
    ]:
        with pytest.raises(UserError, match=message):
            plan(*options)


def keys_of(methods, *options, precision="no"):
    args = evaluate.parse_args(["--dataset", "icons_fs", *map(str, options)])
    return {m: episodes.parse_arm(m, args, evaluate.STAGES, precision).keys for m in methods}


def changed(before, after):
    return {m: {s for s in before[m] if before[m][s] != after[m][s]} for m in before}


def test_other_weights_at_the_same_path_make_students_anew_and_nothing_else(tmp_path):
    shutil.copytree(ROOT / "assets" / "student", tmp_path / "student")
    methods, options = ("tint", "supports", "base", "prototypes", "teacher"), ("--student", tmp_path / "student")
    before = keys_of(methods, *options)
    weights = load_file(tmp_path / "student" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "student" / "model.safetensors")
    found = changed(before, keys_of(methods, *options))
    assert found == {m: {"distill"} if m != "teacher" else set() for m in methods}


def test_another_diffusion_model_template_or_precision_at_the_same_path_inverts_anew(tmp_path):
    """What decides the inversion counts by its contents; what no arm's result hangs on does not count."""
    unet, templates = tmp_path / "model" / "unet" / "model.safetensors", tmp_path / "templates.txt"
    unet.parent.mkdir(parents=True)
    methods = ("tint", "img2img", "supports", "teacher", "prototypes")
    options = ("--pretrained_model_name_or_path", tmp_path / "model", "--invert", f"--prompt_templates {templates}")
    generated = {m: {"invert", "generate", "distill"} if m in ("tint", "img2img") else set() for m in methods}

    def write(weight, template):
        save_file({"w": torch.full((3,), weight)}, unet)
        templates.write_text(template)
        return keys_of(methods, *options)

    first = write(1.0, "a photo of a {}")
    assert write(1.0, "a photo of a {}") == first
    assert changed(first, write(0.5, "a photo of a {}")) == generated
    assert changed(first, write(1.0, "a picture of a {}")) == generated
    write(1.0, "a photo of a {}")
    found = changed(first, keys_of(methods, *options, precision="bf16"))
    assert found == generated | {"supports": {"distill"}}
    found = changed(first, keys_of(methods, *options, "--teacher", "assets/student"))
    assert found["tint"] == found["supports"] == found["teacher"] == {"distill"} and not found["prototypes"]
    filtered = [*options, "--generate", "--filter_threshold 0.5"]
    found = changed(keys_of(methods, *filtered), keys_of(methods, *filtered, "--teacher", "assets/student"))
    assert found["tint"] == {"generate", "distill"}


def test_what_a_teacher_is_trained_on_counts_and_so_does_it_for_what_it_mines():
    def arm(text, distill=""):
        return evaluate_arm(text, "--distill", distill)

    tuned = "teacher --distill.teacher_specialization fine_tune"
    assert arm(tuned).key != arm(tuned, "--flip_probability 0").key
    assert arm(tuned).key == arm(tuned, "--mixup 1 --max_train_steps 7").key
    mined = {arm("mined", options).keys["images"] for options in ("", "--teacher_image_size 32")}
    assert len(mined) == 2
    real = {arm("real", options).keys["images"] for options in ("", "--teacher_image_size 32")}
    assert len(real) == 1


def test_other_images_in_a_data_set_are_another_benchmark(tmp_path):
    for name, i in itertools.product("ab", range(4)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 0, ord(name))).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "splits.json").write_text(json.dumps({"mine": ["a", "b"]}))
    command = ("evaluate.py", "--dataset", tmp_path / "data", "--split", "mine", "--num_ways", 2, "--num_shots", 1,
               "--num_queries", "all", "--num_episodes", 2, "--methods", "prototypes",
               "--output_dir", tmp_path / "out")  # fmt: skip
    launch(*command)
    shutil.copyfile(tmp_path / "data" / "a" / "0.png", tmp_path / "data" / "a" / "9.png")
    _, error = launch(*command, code=2)
    assert "benchmark.json" in error and "images" in error
    _, error = launch(*command, "--split", "yours", code=2)
    assert f"--split yours: {tmp_path / 'data' / 'splits.json'} has mine." in error


def test_a_class_that_is_too_small_is_told_before_any_work(tmp_path):
    for name, count in (("a", 5), ("b", 5), ("c", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (60 * i, 0, ord(name))).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "splits.json").write_text(json.dumps({"novel": ["a", "b", "c"]}))
    data = datasets.load_dataset(str(tmp_path / "data"), "novel")
    seed = next(s for s in range(99) if "c" not in datasets.draw_episode(data, 2, 1, s, 0))
    options = ("--dataset", tmp_path / "data", "--num_ways", 2, "--num_shots", 1, "--num_queries", 3, "--methods",
               "teacher", "--seed", seed, "--num_episodes", 20, "--output_dir", tmp_path / "out")  # fmt: skip
    with pytest.raises(UserError, match="c has 1 images beside its supports"):
        evaluate.main(evaluate.parse_args([*map(str, options)]))
    assert not (tmp_path / "out").exists()
    # Of a pilot without c nobody knows whether its later episodes will have it.
    options = [*map(str, options), "--num_episodes", "2", "--half_width", "0.05"]
    seed = next(s for s in range(99) if all("c" not in datasets.draw_episode(data, 2, 1, s, k) for k in (0, 1)))
    with pytest.raises(UserError, match="--half_width may draw any class, of which the smallest has 1 images"):
        evaluate.main(evaluate.parse_args([*options, "--seed", str(seed)]))


def test_a_student_that_knows_some_of_the_classes_is_refused_unless_prototypes_are_asked_for(tmp_path, capsys):
    for part, name in itertools.product(("support", "query"), "abc"):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (10, 60 * "abc".index(name), 90)).save(tmp_path / part / name / "0.png")
    for classes in ("ab", "abcd", "xy"):
        student = models.load_model("conv4_64", pretrained=False, num_classes=len(classes))
        models.save_model(student, tmp_path / classes, classes)
    backbone = f"backbone={tmp_path / 'xy'}"

    def measured(*specs):
        argv = [
            "--data_dir",
            tmp_path / "query",
            "--support_dir",
            tmp_path / "support",
            "--output_dir",
            tmp_path / "out",
        ]
        evaluate.main(evaluate.parse_args([*map(str, argv), "--model", *specs]))
        return {name: found["classifier"] for name, found in results_of(tmp_path / "out")["methods"].items()}

    with pytest.raises(UserError, match=rf"{tmp_path}/ab lacks classes of .*: \['c'\]. .*prototypes:"):
        measured(backbone, f"student={tmp_path / 'ab'}")
    found = measured(backbone, f"head={tmp_path / 'abcd'}", f"some=prototypes:{tmp_path / 'ab'}",
                     f"prototypes:{tmp_path / 'abcd'}")  # fmt: skip
    assert list(found.values()) == ["prototypes", "head", "prototypes", "prototypes"]
    assert "3 of 3 images of" in capsys.readouterr().err  # they are the supports
    shutil.rmtree(tmp_path / "query" / "c")
    assert measured(f"student={tmp_path / 'ab'}") == {"student": "head"}
    with pytest.raises(UserError, match="no features"):
        measured("prototypes:model.onnx")


def test_bad_methods_are_refused(tmp_path, capsys):
    def refused(method, *options):
        argv = [*map(str, EPISODES[1:]), "--output_dir", str(tmp_path), "--methods", method, *options]
        with pytest.raises((UserError, SystemExit)) as error:
            evaluate.main(evaluate.parse_args(argv))
        return str(error.value) + capsys.readouterr().err

    for method, message in [
        ("dreambooth", "unknown method"),
        ("tint --alpha 1", "--SCRIPT.OPTION"),
        ("teacher --distill.temperature 2", "--SCRIPT.OPTION"),
        ("prototypes --distill.teacher assets/teacher", "--SCRIPT.OPTION"),
        ("tint tint", "belongs to no option"),
        ("tint --distill.unlabeled_dir x", "the benchmark itself sets --unlabeled_dir of distill"),
        ("base --distill.train_dir x", "the benchmark itself sets --train_dir of distill"),
        ("tint --invert.support_dir x", "the benchmark itself sets --support_dir of invert"),
        ("tint --generate.method img2img", "the benchmark itself sets --method of generate"),
        ("supports --distill.seed 3", "the benchmark itself sets --seed of distill"),
        ("tint --generate.alphabet 1", "unrecognized arguments: --alphabet"),
    ]:
        assert message in refused(method)
    assert "cannot be read as options" in refused("tint 'free")
    assert "lower --num_queries" in refused("teacher", "--num_queries", "1000")


def test_options_of_an_arm_that_change_nothing_make_nothing_anew_and_its_own_teacher_filters():
    plain, other = evaluate_arm("tint"), "--checkpointing_steps 7 --dataloader_num_workers 1"
    assert evaluate_arm("tint", "--distill", other, "--generate", "--batch_size 8").keys == plain.keys
    arm = evaluate_arm("tint --generate.filter_threshold 0.5 --generate.teacher assets/student")
    assert (
        arm.arguments["generate"].teacher == "assets/student" and arm.arguments["distill"].teacher == "assets/teacher"
    )
    views = evaluate_arm("teacher --distill.teacher_specialization fine_tune --distill.min_crop 0.3")
    assert views.arguments["distill"].min_crop == 0.3 and views.key != evaluate_arm("teacher").key


def test_the_table_of_students():
    """benchmarks.students asks for arms that differ, and reads pairs in either order."""
    args = students.parse_args(["--num_shots", "5", "--num_images", "9", "--max_train_steps", "7", "8"])
    command = students.command(args, students.arms(args))
    options = evaluate.parse_args(command[command.index("evaluate.py") + 1 :])
    arms = {arm.name: arm for arm in (episodes.parse_arm(text, options, evaluate.STAGES) for text in options.methods)}
    assert len({arm.key for arm in arms.values()}) == len(arms) == 2 + 2 * len(students.METHODS)
    assert options.num_shots == 5 and arms["scratch_tint"].arguments["generate"].num_images_per_class == 9
    chosen = {name: vars(arm.arguments["distill"]) for name, arm in arms.items()}
    assert chosen["real"]["max_train_steps"] == 7 and chosen["scratch_real"]["max_train_steps"] == 8
    assert chosen["real"]["student"] == "assets/student" and chosen["scratch_real"]["student"] == "conv4_64"
    assert {name for name, found in chosen.items() if found["cutmix"]} == {"strong", "scratch_strong"}
    results = {
        "methods": {name: {"mean": 0.5, "ci95": [0.4, 0.6]} for name in arms},
        "paired_differences": [
            {"a": "tint", "b": "supports", "mean": 0.02, "ci95": [0.01, 0.04]},
            {"a": "real", "b": "tint", "mean": 0.03, "ci95": [0.02, 0.05]},
            *({"a": "tint", "b": name, "mean": 0, "ci95": [0, 0]} for name in ("prototypes",)),
        ],
    }
    with pytest.raises(UserError, match="lacks tint"):
        students.main(students.parse_args(["--methods", "supports"]))
    lines = students.table(results).splitlines()
    assert "| supports | 50.0 [40.0, 60.0] | +2.0 [+1.0, +4.0] | 50.0 [40.0, 60.0] |  |" in lines
    assert next(line for line in lines if "other real" in line).split(" | ")[2] == "-3.0 [-5.0, -2.0]"
