"""The demo's commands are understood by the scripts, and its summary says what they wrote."""

import importlib
import json
import shlex
import shutil

import numpy as np

import demo
from tests.conftest import launch


def test_every_command_is_understood_by_its_script(monkeypatch):
    for _, template in demo.STAGES:
        words = shlex.split(template.format(launch="", root="'out put'", seed=3))
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        options = words[2:] if words[0] == "-m" else words[1:]
        monkeypatch.setattr("sys.argv", [module, *options])
        args = importlib.import_module(module).parse_args()
        assert args.seed == 3 and args.output_dir.startswith("out put")


def test_summary(run_dir, tmp_path):
    for part in ("inversion", "export"):
        shutil.copytree(run_dir / part, tmp_path / part)
    models = [f"{name}={run_dir / 'student'}" for name in demo.TITLES]
    launch("evaluate.py", "--model", *models, "--data_dir", run_dir / "query", "--output_dir", tmp_path / "evaluation")
    summary = demo.summarise(tmp_path, {"invert": 1.5})
    assert set(summary) == {
        "wall_seconds", "accuracy", "paired_differences", "reconstruction_psnr_db", "onnx_max_abs_diff", "latency_ms",
    }  # fmt: skip
    assert set(summary["accuracy"]) == {"teacher", "student_before", "student_supports", "student_tint"}
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())["methods"]["teacher"]
    low, high = summary["accuracy"]["teacher"]["ci95"]
    assert 0 <= low < summary["accuracy"]["teacher"]["mean"] == found["mean"] < high <= 1
    records = [json.loads(p.read_text()) for p in tmp_path.glob("inversion/*/inversion.json")]
    expected = np.mean([r["reconstruction_psnr_db"]["vae"] for r in records])
    assert np.isclose(summary["reconstruction_psnr_db"]["vae"], expected)
    assert set(summary["latency_ms"]) == {"teacher", "student_torch", "student_onnx"}
