"""What the scripts do on a GPU, without a network: Stable Diffusion 1.5 and DINOv2 ViT-S, with random weights from
their public configurations, take them through an episode in each precision. Prints a Markdown table, writes gpu.json.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --pretrained_model_name_or_path assets/mini-sd --teacher assets/teacher --tests

Each script runs twice: once to warm up, while PyTorch's FlopCounterMode counts its operations, and once to be timed.
The reference makes one image at a time, in 25 steps of two passes. At the end come the runtimes that are installed, and
the tests. The second command does it in little, on a CPU too.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import distill
import export
import tint_generate
import tint_invert
from benchmarks.flops import stable_diffusion_1_5
from benchmarks.generation_time import reference_image
from common import diffusion
from common.cli import HelpFormatter, positive_int, run
from common.processes import best_device, peak_memory
from common.records import read_json, write_json

SCALE = 7.5  # the reference's guidance
HEADER = """| precision | stage | seconds | TFLOP | TFLOP/s | of the matrix rate | peak GiB | images or views a second |
|---|---|---|---|---|---|---|---|"""


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(function, device):
    synchronize(device)
    before = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - before


def matrix_rate(side, dtype, device):
    """TFLOP/s of the product of two matrices [side, side], what no network gets beyond."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    (a @ b).sum().item()  # warm
    return 10 * 2 * side**3 / seconds(lambda: [a @ b for _ in range(10)], device) / 1e12


def write_inputs(args, root, device):
    """Photos of noise, and the models that are not given: (photos, diffusion model, teacher)."""
    rng = np.random.default_rng(0)
    for name in ("house", "tree"):
        (root / "support" / name).mkdir(parents=True, exist_ok=True)
        for k in range(args.num_shots):
            photo = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((256, 256))
            photo.save(root / "support" / name / f"{k}.png")
    torch.manual_seed(0)
    if not args.pretrained_model_name_or_path and not (root / "model" / "model_index.json").is_file():
        stable_diffusion_1_5(device).to("cpu").save_pretrained(root / "model")  # a CPU takes minutes for the noise
    if not args.teacher and not (root / "teacher" / "model.safetensors").is_file():
        teacher = timm.create_model("vit_small_patch14_dinov2")
        timm.models.save_for_hf(teacher, root / "teacher", safe_serialization=True)
    return root / "support", args.pretrained_model_name_or_path or root / "model", args.teacher or root / "teacher"


def stages(args, support, model, teacher, folder):
    """{name: (script, its options, images or views that it makes)} of an episode whose files lie in `folder`."""
    shots, images = 2 * args.num_shots, 2 * args.num_images_per_class
    fixed = ["--patience", 0, "--null_text_tolerance", 0, "--max_train_steps", args.max_train_steps]
    generate = ["--inversion_dir", folder / "inversion", "--no-agreement", "--num_images_per_class",
                args.num_images_per_class, "--batch_size", args.batch_size]  # fmt: skip
    learn = ["--support_dir", support, "--train_dir", folder / "generation", "--teacher", teacher, "--student",
             args.student, "--student_image_size", args.student_image_size, "--max_train_steps",
             args.max_train_steps, *([] if args.teacher else ["--teacher_image_size", 224])]  # fmt: skip
    invert = ["--support_dir", support, "--pretrained_model_name_or_path", model, "--fallback_token", "house",
              "--num_inference_steps", args.num_inference_steps]  # fmt: skip
    return {
        "inversion": (tint_invert, [*invert, *fixed], shots),
        "generation": (tint_generate, generate, images),
        **({"compiled": (tint_generate, [*generate, "--compile"], images)} if args.compile else {}),
        "distillation": (distill, learn, 50 * args.max_train_steps),
    }


def measured(once, device, tflop=None):
    """TFLOP, seconds and peak memory of `once()`: it is counted first, unless that is known, and then timed."""
    with redirect_stdout(sys.stderr):
        with FlopCounterMode(display=False) if tflop is None else nullcontext() as counter:
            once()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spent = seconds(once, device)
    tflop = counter.get_total_flops() / 1e12 if counter else tflop
    return {"tflop": tflop, "seconds": spent, "peak_gib": peak_memory(device) / 2**30}


def run_script(script, options, output_dir):
    shutil.rmtree(output_dir, ignore_errors=True)
    script.main(script.parse_args([*map(str, options), "--output_dir", str(output_dir)]))


def reference(model, precision, num_steps, device):
    """A function that makes one image the reference's way."""
    pipe = diffusion.load_stable_diffusion(model, device, precision)
    schedule, side = diffusion.make_schedule(pipe.scheduler, num_steps), pipe.unet.config.sample_size
    z = torch.randn(1, pipe.unet.config.in_channels, side, side).to(device)
    prompt, null = diffusion.encode_prompts(pipe, ["a photo of a tree", ""]).detach().split(1)
    return partial(reference_image, pipe, schedule, z, prompt, null.expand(num_steps, -1, -1), SCALE)


def runtimes(student, support, output_dir, on_gpu):
    """What export.py measures of the student in the runtimes that are installed."""
    found = ["torch", "onnxruntime", *(["torch_compile"] if on_gpu else [])]
    found += ["tensorrt"] if importlib.util.find_spec("tensorrt") else []
    options = ["--model", student, "--runtime", *found, "--precision", "fp32", *(["fp16"] if on_gpu else [])]
    options += ["--data_dir", support, "--benchmark", "--output_dir", output_dir]
    with redirect_stdout(sys.stderr):
        export.main(export.parse_args([*map(str, options)]))
    return read_json(Path(output_dir) / "benchmark.json")["latency"]


def report(results, root, precision, name, units, row):
    """Adds a stage to the results, of which nothing is lost where a later one fails, and prints its line."""
    rate, speed = results["matrix_tflop_per_second"][precision], row["tflop"] / row["seconds"]
    row = {"precision": precision, "stage": name, **row, "units": units, "tflop_per_second": speed,
           "units_per_second": units / row["seconds"], "share_of_matrix_rate": speed / rate}  # fmt: skip
    results["stages"].append(row)
    write_json(root / "gpu.json", results)
    print(f"| {precision} | {name} | {row['seconds']:.2f} | {row['tflop']:.2f} | {speed:.2f} | {speed / rate:.0%} "
          f"| {row['peak_gib']:.1f} | {row['units_per_second']:.2f} |", flush=True)  # fmt: skip


def main(args):
    device = best_device()
    on_gpu, root = device.type == "cuda", Path(args.output_dir)
    card = torch.cuda.get_device_name() if on_gpu else str(device)
    support, model, teacher = write_inputs(args, root, device)
    results = {"card": card, "torch": torch.__version__, "matrix_tflop_per_second": {}, "stages": []}
    print(f"{card}, PyTorch {torch.__version__}\n\n{HEADER}", flush=True)
    for precision in args.precisions:
        AcceleratorState._reset_state(reset_partial_state=True)  # else Accelerate keeps to the first precision
        rate = matrix_rate(args.matrix_side, diffusion.WEIGHT_DTYPE[precision], device)
        results["matrix_tflop_per_second"][precision], found = rate, {}
        for name, (script, options, units) in stages(args, support, model, teacher, root / precision).items():
            once = partial(run_script, script, [*options, "--mixed_precision", precision], root / precision / name)
            tflop = found["generation"]["tflop"] if "--compile" in options else None
            found[name] = measured(once, device, tflop)
            report(results, root, precision, name, units, found[name])
        once = reference(model, precision, args.reference_steps, device)
        report(results, root, precision, "generation as the reference", 1, measured(once, device))
    AcceleratorState._reset_state(reset_partial_state=True)
    results["runtimes"] = runtimes(root / args.precisions[0] / "distillation", support, root / "export", on_gpu)
    if args.tests:
        results["tests"] = subprocess.run([sys.executable, "-m", "pytest", *args.tests], check=False).returncode
    write_json(root / "gpu.json", results)
    rates = ", ".join(f"{k} {v:.1f}" for k, v in results["matrix_tflop_per_second"].items())
    print(f"\nmatrix products: {rates} TFLOP/s\nruntimes: {json.dumps(results['runtimes'])}")
    print(f"tests: {results.get('tests', 'not run')}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--pretrained_model_name_or_path", help="default: Stable Diffusion 1.5 with random weights")
    add("--teacher", help="default: DINOv2 ViT-S with random weights, at 224 pixels")
    add("--student", default="mobilenetv4_conv_small")
    add("--student_image_size", type=positive_int, default=224)
    add("--precisions", nargs="+", choices=list(diffusion.WEIGHT_DTYPE), default=list(diffusion.WEIGHT_DTYPE))
    add("--num_shots", type=positive_int, default=5, help="photos of each of two classes")
    add("--num_images_per_class", type=positive_int, default=40)
    add("--batch_size", type=positive_int, default=8, help="images generated together")
    add("--max_train_steps", type=positive_int, default=100, help="of textual inversion, and of distillation")
    add("--num_inference_steps", type=positive_int, default=16)
    add("--reference_steps", type=positive_int, default=25, help="the reference's, in each of which are two passes")
    add("--matrix_side", type=positive_int, default=8192)
    add("--compile", action=flag, default=True, help="generate with torch.compile, too")
    add("--tests", nargs="*", default=["tests"], help="test files to run at the end")
    add("--output_dir", default="outputs/gpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
