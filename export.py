"""Exports a student to ONNX (fp32, fp16, int8) and TensorRT, checks that it still answers the same, and times it.

accelerate launch export.py --model outputs/demo/student --benchmark --teacher assets/teacher
"""

import json
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from timm.utils import reparameterize_model
from torch import nn

from common import models
from common.cli import UserError, argument_parser, positive_int, run, settings_of, start, whole_file, write_json
from common.images import as_tensor, load_folder
from common.onnx_model import OnnxClassifier, as_input, log_probabilities
from common.shards import open_samples
from common.statistics import paired_difference
from common.tensorrt_engine import build_engine

QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]
TOLERATED_LOSS = 0.5  # points of accuracy that a precision may lose before the report says so first


class WithPreprocessing(nn.Module):
    """What a camera needs: images uint8 [B, H, W, 3], of the model's input size, to probabilities [B, num_classes]."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(model.pretrained_cfg[key])[:, None, None])

    def forward(self, images):
        return self.model((images.permute(0, 3, 1, 2).float() - self.mean) / self.std).softmax(-1)


def export_fp32(model, classes, args, path):
    """Writes the model as ONNX, simplified, with batch normalisation folded into the convolutions.

    "images" to "logits" [batch, classes]: normalised float32 [batch, 3, h, w]; or, with --include_preprocessing, uint8
    [batch, h, w, 3] to "probabilities". The metadata hold class names, preprocessing, batch size (null is any), source.
    """
    size = models.input_size(model)
    count = args.batch_size or 2
    example = torch.zeros(count, 3, *size)
    if args.include_preprocessing:
        example = torch.zeros(count, *size, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals
        program = torch.onnx.export(
            WithPreprocessing(model).eval() if args.include_preprocessing else model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities" if args.include_preprocessing else "logits"],
            dynamic_shapes=None if args.batch_size else ({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    proto = program.model_proto
    config = model.pretrained_cfg
    facts = {
        "classes": classes,
        "preprocessing": {"input_size": [3, *size], "mean": config["mean"], "std": config["std"]},
        "includes_preprocessing": args.include_preprocessing,
        "batch_size": args.batch_size,
    }
    properties = {name: json.dumps(value) for name, value in facts.items()} | {"source": str(args.model)}
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto, full_check=True)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


def convert_fp16(fp32_path, path):
    """Half-precision weights and arithmetic; input and output stay float32."""
    model = OnnxModel(convert_float_to_float16(onnx.load(fp32_path), keep_io_types=True))
    model.topological_sort()  # the conversion leaves its casts at the end
    proto = model.model
    onnx.checker.check_model(proto)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


class Calibration(CalibrationDataReader):
    """Feeds inputs, a numpy array, to ONNX Runtime's calibration, in whole batches."""

    def __init__(self, inputs, batch_size):
        starts = range(0, len(inputs) - batch_size + 1, batch_size)
        self.batches = iter([inputs[start : start + batch_size] for start in starts])

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def convert_int8(fp32_path, path, inputs, batch_size):
    """Explicit Q/DQ nodes before convolutions, matrix products, sums and poolings: symmetric, weights per channel and
    biases in floating point, as TensorRT wants them. Ranges come from the inputs."""
    properties = {p.key: p.value for p in onnx.load(fp32_path).metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        folded, quantized = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(fp32_path, folded, skip_symbolic_shape=True)  # folds batch normalisation
        quantize_static(
            folded,
            quantized,
            Calibration(inputs, batch_size),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        proto = onnx.load(quantized)
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


def compare(reference, other, labels=None):
    """How far answers [N, num_classes] are from the reference: maximum and mean difference, top-1 agreement and, where
    labels [N] are known, accuracy and its change in percent points with the 95% interval of paired answers."""
    difference = (reference - other).abs()
    before, after = reference.argmax(-1), other.argmax(-1)
    facts = {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "top1_agreement": (before == after).double().mean().item(),
    }
    if labels is not None:
        mean, low, high = paired_difference((after == labels).int().tolist(), (before == labels).int().tolist())
        facts["accuracy"] = (after == labels).double().mean().item()
        facts["accuracy_change_points"] = {"mean": 100 * mean, "ci95": [100 * low, 100 * high]}
    return facts


def verdict(fidelity):
    """The first line of the report: which precisions cost accuracy."""
    changes = {name: facts.get("accuracy_change_points") for name, facts in fidelity.items()}
    if not all(changes.values()):
        return "Accuracy was not compared: give labelled images with --query_dir."
    worse = {name: change for name, change in changes.items() if change["mean"] < -TOLERATED_LOSS}
    if not worse:
        return f"No precision loses more than {TOLERATED_LOSS} points of accuracy: {', '.join(fidelity)}."
    return " ".join(
        f"{name} LOSES {-change['mean']:.1f} points of accuracy [{-change['ci95'][1]:.1f}, {-change['ci95'][0]:.1f}]."
        for name, change in worse.items()
    )


def benchmark(callables, batch_sizes, shape, min_calls=200, min_seconds=2.0):
    """Latency of several models on the same random batches.

    The models take turns of a tenth of a second, so that whatever else the machine does meets them alike. The first
    calls of a turn are not counted: the caches, and the waiting threads of the runtime before, are not the model's.

    Args:
        callables: {name: (function of images [B, 3, h, w] in [0, 1] to inputs, function of inputs, which is timed)}.
    Returns:
        rows of {model, batch_size, calls, median_ms, p90_ms, p99_ms, images_per_second}
    """
    rows = []
    for batch_size in batch_sizes:
        images = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0))
        inputs = {name: prepare(images) for name, (prepare, _) in callables.items()}
        seconds = {name: [] for name in callables}
        while any(len(times) < min_calls and sum(times) < min_seconds for times in seconds.values()):
            for name, (_, function) in callables.items():
                for _ in range(5):
                    function(inputs[name])
                end = time.perf_counter() + 0.1
                while (before := time.perf_counter()) < end:
                    function(inputs[name])
                    seconds[name].append(time.perf_counter() - before)
        for name, times in seconds.items():
            median, p90, p99 = np.percentile(times, [50, 90, 99])
            rows.append(
                {
                    "model": name,
                    "batch_size": batch_size,
                    "calls": len(times),
                    "median_ms": 1e3 * median,
                    "p90_ms": 1e3 * p90,
                    "p99_ms": 1e3 * p99,
                    "images_per_second": batch_size / median,
                }
            )
    return rows


def torch_callable(model, device):
    """A PyTorch model for `benchmark`: the call ends when the device has answered."""

    @torch.inference_mode()
    def call(inputs):
        return model(inputs.to(device)).cpu()

    return lambda images: models.normalize(model, images), call


def markdown_table(rows, machine):
    lines = [
        f"Latency on {machine}",
        "",
        "| model | device | batch | median ms | p90 ms | p99 ms | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = [
        ("{}", "model"),
        ("{}", "device"),
        ("{}", "batch_size"),
        ("{:.3f}", "median_ms"),
        ("{:.3f}", "p90_ms"),
        ("{:.3f}", "p99_ms"),
        ("{:.0f}", "images_per_second"),
    ]
    lines += ["| " + " | ".join(form.format(row[key]) for form, key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(args):
    classes = models.class_names(args.model)
    if not classes:
        raise UserError(f"{args.model} is no folder of a trained student: give one that distill.py wrote.")
    if args.batch_size and args.benchmark and args.benchmark_batch_sizes != [args.batch_size]:
        raise UserError(
            f"--batch_size {args.batch_size} fixes it: give --benchmark_batch_sizes {args.batch_size} alone."
        )
    if "int8" in args.precision and not args.data_dir:
        raise UserError("--precision int8 needs --data_dir: images to calibrate on, for instance the generated ones.")
    accelerator = start(args)
    if not accelerator.is_main_process:
        return  # one process exports; a second would only disturb its timing
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model = reparameterize_model(models.load_model(args.model))  # RepVGG and its kind become plain convolutions
    size = models.input_size(model)[0]
    shape = (3, *models.input_size(model))

    noise = torch.randint(256, (64, *shape), generator=torch.Generator().manual_seed(args.seed))
    generated, labels = noise / 255, None
    if args.data_dir:
        generated = torch.stack([as_tensor(image) for _, image in open_samples(args.data_dir, size)])
        generated = generated[:: -(-len(generated) // args.num_samples)]
    queries = generated
    if args.query_dir:
        queries, labels, *_ = load_folder(args.query_dir, size, classes)

    files = {precision: output_dir / f"student_{precision}.onnx" for precision in ("fp32", *args.precision)}
    export_fp32(model, classes, args, files["fp32"])
    if "fp16" in files:
        convert_fp16(files["fp32"], files["fp16"])
    if "int8" in files:
        examples = as_input(model, generated, args.include_preprocessing)
        convert_int8(files["fp32"], files["int8"], examples, args.batch_size or min(32, len(examples)))
    sessions = {precision: OnnxClassifier(path, accelerator.device) for precision, path in files.items()}
    with torch.inference_mode():
        reference = torch.cat([model(models.normalize(model, batch)) for batch in queries.split(64)])
    if args.include_preprocessing:
        reference = log_probabilities(reference.softmax(-1))
    fidelity = {}
    for precision, session in sessions.items():
        answers = torch.cat([session(batch) for batch in queries.split(64)])
        fidelity[precision] = compare(reference, answers, labels) | {"bytes": files[precision].stat().st_size}
        print(
            f"{files[precision]}: logits differ by at most {fidelity[precision]['max_abs_diff']:.2e}, "
            f"top-1 agrees on {fidelity[precision]['top1_agreement']:.1%} of {len(queries)} images"
        )
    print(verdict(fidelity))
    machine = f"{accelerator.device.type}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    results = {"settings": settings_of(args), "machine": machine, "fidelity": fidelity}
    if args.benchmark:
        device = accelerator.device
        callables = {"student torch": torch_callable(model.to(device), device)}
        if args.teacher:
            teacher = models.load_model(args.teacher, image_size=args.teacher_image_size).to(device)
            callables["teacher torch"] = torch_callable(teacher, device)
        for precision, session in sessions.items():
            prepare = partial(as_input, model, includes_preprocessing=args.include_preprocessing)
            callables[f"student onnx {precision}"] = prepare, session.run
        results["latency"] = benchmark(callables, args.benchmark_batch_sizes, shape)
        for row in results["latency"]:  # ONNX Runtime may run elsewhere than PyTorch
            onnx_row = "onnx" in row["model"]
            row["device"] = sessions["fp32"].provider if onnx_row else accelerator.device.type
        table = f"{verdict(fidelity)}\n\n{markdown_table(results['latency'], machine)}"
        with whole_file(output_dir / "benchmark.md") as path:
            path.write_text(table)
        print(table)
    write_json(output_dir / "benchmark.json", results)
    if "tensorrt" in args.runtime:
        source = files[args.precision[-1]]
        build_engine(source, output_dir / "student.engine", shape, max(args.benchmark_batch_sizes), args.workspace_mib)
    accelerator.end_training()


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/export")
    add = parser.add_argument
    add("--model", default="outputs/demo/student", help="the student's folder")
    add("--precision", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32"], help="ONNX files to write")
    add(
        "--runtime",
        nargs="+",
        choices=["onnxruntime", "tensorrt"],
        default=["onnxruntime"],
        help="tensorrt also builds student.engine, from the last of --precision",
    )
    add("--data_dir", help="generated images, which int8 is calibrated with; default: random numbers, not for int8")
    add("--query_dir", help="labelled images to check answers on; default: those of --data_dir")
    add(
        "--include_preprocessing",
        action="store_true",
        help="in the graph: uint8 images [batch, height, width, 3] in, probabilities out",
    )
    add("--num_samples", type=positive_int, default=512, help="at most so many of these images, evenly spaced")
    add("--benchmark", action="store_true", help="time the models")
    add("--teacher", help="a teacher to time beside the student")
    add("--teacher_image_size", type=positive_int, help="the teacher's input side; default: its own")
    add("--batch_size", type=positive_int, help="a fixed batch size of the ONNX files; default: any")
    add("--benchmark_batch_sizes", type=positive_int, nargs="+", default=[1], help="batch sizes to time")
    add("--workspace_mib", type=positive_int, default=1024, help="TensorRT's workspace limit in MiB")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
