"""The demo: its commands are understood by the scripts, photos go all the way, and its words say what they can."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
from argparse import Namespace

import numpy as np
import pytest

import demo
from common import datasets
from common.cli import UserError
from common.records import fingerprint
from common.statistics import paired_difference, trials_to_tell
from tests import launcher
from tests.conftest import INVERT

LITTLE = (
    "--invert", " ".join(map(str, INVERT)), "--generate", "--num_images_per_class 6",
    "--distill", "--max_train_steps 6 --train_batch_size 8",
)  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--support_dir", "my photos"], ["--support_dir", "my photos", "q"]])
def test_every_command_is_understood_by_its_script(options, monkeypatch):
    more = "--distill", "--max_train_steps 7", "--export", "--timing_cache 'a file'", "--output_dir", "out put"
    args = demo.parse_args([*options[:2], "--seed", "3", *more])
    query = {0: "out put/query", 2: None, 3: "test photos"}[len(options)]
    stages = demo.commands(args, args.support_dir or "out put/support", query)
    assert ("episode" in stages) == (not options) and ("evaluate" in stages) == bool(query)
    for stage, words in stages.items():
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        monkeypatch.setattr("sys.argv", [module, *words[2 if words[0] == "-m" else 1 :]])
        found = importlib.import_module(module).parse_args()
        assert found.seed == 3 and found.output_dir.startswith("out put")
        assert not stage.startswith("distill") or found.max_train_steps == 7
        if stage == "evaluate":  # photos of a class may bear the name of one that the bundled models were trained on
            assert {"teacher=prototypes:assets/teacher", "student_before=prototypes:assets/student"} < set(found.model)
        assert stage != "export" or (found.timing_cache == "a file" and found.query_dir == query)


@pytest.fixture
def photos(tmp_path):
    """A function that writes so many photos, not square, of two classes to tmp_path/<name> and returns the folder."""
    data = datasets.load_dataset("icons_fs", "val")

    def write(name, first, last, classes=2):
        for c in sorted(data.classes)[:classes]:
            (tmp_path / name / c).mkdir(parents=True, exist_ok=True)
            for reference in data.classes[c][first:last]:
                data.open(c, reference).resize((48, 40)).save(tmp_path / name / c / f"{reference}.png")
        return tmp_path / name

    return write


@pytest.fixture
def scripts(monkeypatch):
    """The scripts that the demo has run, each in a fork of a process that has imported what it needs."""
    started = []

    def run(command, cwd, env):
        started.append(command[1])
        code, out, err = launcher.run(command[1:], cwd, 600)
        print(out, err)
        return Namespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_photos_go_all_the_way_and_only_what_is_new_is_done_again(photos, scripts, tmp_path, capsys):
    folder, out = photos("my photos", 0, 8), tmp_path / "out"
    options = ["--support_dir", str(folder), "--output_dir", str(out), *LITTLE]
    demo.main(demo.parse_args(options))
    assert scripts == ["tint_invert.py", "tint_generate.py", "distill.py", "distill.py", "evaluate.py", "evaluate.py",
                       "export.py"]  # fmt: skip
    held_out, supports = ({p.relative_to(out / part) for p in out.glob(f"{part}/*/*")} for part in ("query", "support"))
    assert len(held_out) == 4 and len(supports) == 12 and not held_out & supports
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["accuracy"]) == list(demo.TITLES) and all(m["count"] == 4 for m in summary["accuracy"].values())
    assert 0 < summary["teacher_agreement"] <= 1 and summary["max_abs_diff"]["onnxruntime fp32"] < 1e-3
    assert set(summary["latency_ms"]) == {"teacher torch", "student torch", "student onnxruntime"}
    records = [json.loads(p.read_text()) for p in out.glob("inversion/*/inversion.json")]
    expected = np.mean([r["reconstruction_psnr_db"]["vae"] for r in records])
    assert np.isclose(summary["reconstruction_psnr_db"]["vae"], expected)
    said = capsys.readouterr().out
    assert "cannot be told" in said and "on 4 test photos" in said and str(out / "evaluation" / "report.html") in said
    assert f"{demo.MINI_SD} draws icons" in said
    assert f"http.server --directory {shlex.quote(str(out / 'export' / 'web'))}" in said
    assert (out / "export" / "web" / "student.onnx").is_file()

    export = out / "export" / "benchmark.json"
    facts = json.loads(export.read_text())
    (row,) = (row for row in facts["latency"] if row["runtime"] == "onnxruntime")
    others = [row | {"batch_size": 16, "median_ms": 16}, row | {"precision": "int8", "median_ms": 8},
              row | {"threads": 64, "median_ms": 64}]  # fmt: skip
    export.write_text(json.dumps(facts | {"latency": [*facts["latency"], *others]}))
    latencies = demo.summarise(out, {})["latency_ms"]
    assert latencies == summary["latency_ms"] | {"student onnxruntime int8": 8}

    scripts.clear()
    demo.main(demo.parse_args(options))
    assert not scripts and "cannot be told" in capsys.readouterr().out


def test_photos_are_held_out_where_there_are_enough_and_are_never_in_both(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def find(*options):
        return demo.find_photos(demo.parse_args([*map(str, options), "--output_dir", str(out)]), out)

    few, many, test = photos("few", 0, 7), photos("many", 0, 9), photos("test", 9, 12)
    name = next(many.iterdir()).name
    (many / name / "nested").mkdir()
    first = next((many / name).glob("*.png"))
    first.rename(many / name / "nested" / os.fsdecode(b"K\xe4fer.png"))  # as old archives name them
    assert find("--support_dir", few) == (str(few), None)
    assert find("--support_dir", few, "--query_dir", test) == (str(few), str(test))
    record, done = out / "stages.json", {k: {"command": "x", "seconds": 1.0} for k in ("distill_supports", "distill")}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"stages": done}))
    find("--support_dir", few, "--query_dir", test)
    assert list(json.loads(record.read_text())["stages"]) == ["distill_supports", "distill"]
    photos("test", 13, 14)
    find("--support_dir", few, "--query_dir", test)
    assert list(json.loads(record.read_text())["stages"]) == ["distill"]  # which follows what is done again
    support, query = find("--support_dir", many)
    before = {path.relative_to(out) for path in query.rglob("*.png")}
    assert len(before) == 4 and len(list(support.rglob("*.png"))) == 14 and (support, query) == (out / "support", query)
    photos("many", 12, 13)
    for folder in (out / "student", out / "student_supports"):
        folder.mkdir()
    find("--support_dir", many)
    assert len(before & {path.relative_to(out) for path in query.rglob("*.png")}) >= 2  # one of each class gives way
    assert len(list((out / "support_1").rglob("*.png"))) == 14  # what was there is put aside
    assert (out / "student_1").is_dir() and not (out / "student").exists()

    inverted = {path.relative_to(support).as_posix(): fingerprint([path]) for path in support.rglob("*.png")}
    facts = {"settings": {"support_images": inverted}}
    monkeypatch.setattr(demo, "read_inversion", lambda folder: facts)
    (out / "inversion" / name).mkdir(parents=True)
    (out / "inversion" / name / "inversion.json").touch()
    find("--support_dir", many)
    assert (out / "inversion").is_dir()
    for number, changed in enumerate((next(iter(inverted)), "gone.png"), 1):  # a photo that is another now, or gone
        facts["settings"]["support_images"] = inverted | {changed: "0"}
        find("--support_dir", many)
        assert (out / f"inversion_{number}").is_dir() and not (out / "inversion").exists()
        shutil.copytree(out / f"inversion_{number}", out / "inversion")
    shutil.rmtree(out / "inversion")
    (out / "student").mkdir()
    assert find("--support_dir", many, "--query_dir", test) == (str(many), str(test))
    assert not (out / "student").exists()  # it has learned from fewer photos, as long as some were held out
    find("--support_dir", many)
    with pytest.raises(UserError, match="holds one class only"):
        find("--support_dir", photos("one", 0, 2, 1))
    with pytest.raises(UserError, match="are not the wanted classes"):
        find("--support_dir", many, "--query_dir", photos("one", 0, 2, 1))
    shutil.copy(next((out / "query" / name).rglob("*.png")), many / name / "twin.png")
    shutil.copy(many / name / "twin.png", many / name / "twins.png")
    with pytest.raises(UserError, match="what was trained on cannot test"):
        for seed in range(20):
            find("--support_dir", many, "--seed", seed)
    for path in (many / name).glob("twin*.png"):
        path.unlink()

    shutil.copy(next((many / name).glob("*.png")), test / name / "another name.png")
    with pytest.raises(UserError, match=r"another name.png is the same image as .*many"):
        find("--support_dir", many, "--query_dir", test)
    with pytest.raises(UserError, match="student is there already"):
        (tmp_path / "other" / "student").mkdir(parents=True)
        demo.find_photos(demo.parse_args(["--support_dir", str(many)]), tmp_path / "other")
    for root in (many, many / "out", tmp_path):
        with pytest.raises(UserError, match="keep them apart"):
            demo.find_photos(demo.parse_args(["--support_dir", str(many), "--output_dir", str(root)]), root)


def test_a_stage_that_changed_runs_again_and_all_after_it(scripts, tmp_path):
    record = tmp_path / "stages.json"
    record.write_text('{"photos": {}, "stages": {}}')
    stages = {name: ["-m", "tests.launcher", name] for name in "abc"}
    for changed, runs in ((None, 3), (None, 0), ("b", 2), ("c", 1), (None, 0)):
        if changed:
            stages[changed].append("more")
        scripts.clear()
        assert list(demo.run_stages(stages, record)) == list("abc")
        assert len(scripts) == runs


def test_the_conclusion_says_what_so_many_photos_can_tell():
    def said(mean, low, high, wanted=None):
        pair = {"a": "student_tint", "b": "student_supports", "mean": mean, "ci95": [low, high]}
        accuracy = {"student_tint": {"count": 40}}
        facts = {"accuracy": accuracy, "paired_differences": [pair], "photos_to_tell": wanted}
        return demo.conclusion(facts, "out")

    assert "generated images is better: +9.0 [+1.0, +20.0] points on 40" in said(0.09, 0.01, 0.2)
    assert said(-0.09, -0.2, -0.01).endswith("Take out/student_supports.")
    assert "cannot be told" in said(0.05, -0.1, 0.2, 300) and "about 300 could" in said(0.05, -0.1, 0.2, 300)
    assert "equally often" in said(0, -0.1, 0.1)
    assert "nobody can know" in demo.conclusion({}, "out")


@pytest.mark.parametrize("only_a, only_b, both", [(3, 1, 36), (1, 6, 200), (5, 4, 91), (2, 0, 9)])
def test_so_many_trials_tell(only_a, only_b, both):
    """Where all is repeated so often, the interval leaves out 0; once less, and it does not."""
    a = [1] * only_a + [0] * only_b + [1] * both
    b = [0] * only_a + [1] * only_b + [1] * both
    repeats = -(-trials_to_tell(a, b) // len(a))
    for times, told in ((repeats, True), (repeats - 1, False)):
        _, low, high = paired_difference(a * times, b * times) if times else (0, 0, 0)
        assert (low > 0 or high < 0) == told
    assert trials_to_tell(a, a) is None
