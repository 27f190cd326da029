"""Exports a student to ONNX (fp32, fp16, int8) and TensorRT, checks that it still answers the same, and times it.

accelerate launch export.py --model outputs/demo/student --benchmark --teacher assets/teacher
"""

import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from common import models
from common.cli import UserError, argument_parser, positive_int, run, settings_of, start, whole_file, write_json
from common.images import load_folder
from common.onnx_model import OnnxClassifier
from common.tensorrt_engine import build_engine


def export_fp32(model, classes, source, path):
    """Writes the model as ONNX: "images" [batch, 3, h, w] normalised float32 to "logits" [batch, classes].

    The metadata hold the class names and the preprocessing (input size, mean, std), which the graph does not do.
    """
    example = torch.zeros(2, 3, *models.input_size(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    proto = program.model_proto
    config = model.pretrained_cfg
    preprocessing = {"input_size": [3, *models.input_size(model)], "mean": config["mean"], "std": config["std"]}
    onnx.helper.set_model_props(
        proto, {"classes": json.dumps(classes), "preprocessing": json.dumps(preprocessing), "source": str(source)}
    )
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
    """Feeds normalised images [N, 3, h, w] to ONNX Runtime's calibration, one batch at a time."""

    def __init__(self, inputs):
        self.batches = iter(inputs.split(32))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def convert_int8(fp32_path, path, inputs):
    """Explicit Q/DQ nodes around each layer, symmetric, weights per channel, ranges from the calibration inputs."""
    properties = {p.key: p.value for p in onnx.load(fp32_path).metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        folded, quantized = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(fp32_path, folded, skip_symbolic_shape=True)  # folds batch normalisation
        quantize_static(
            folded,
            quantized,
            Calibration(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        proto = onnx.load(quantized)
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


def compare(reference, other):
    """How far logits [N, num_classes] are from the reference: maximum and mean difference, top-1 agreement."""
    difference = (reference - other).abs()
    agreement = (reference.argmax(-1) == other.argmax(-1)).double().mean()
    return {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "top1_agreement": agreement.item(),
    }


def benchmark(callables, batch_sizes, shape, min_calls=200, min_seconds=2.0):
    """Latency of several models on the same random batches.

    The models take turns of a tenth of a second, so that whatever else the machine does meets them alike. The first
    calls of a turn are not counted: the caches, and the waiting threads of the runtime before, are not the model's.

    Args:
        callables: {name: function of a normalised numpy batch [B, 3, h, w]}.
    Returns:
        rows of {model, batch_size, calls, median_ms, p90_ms, p99_ms, images_per_second}
    """
    rows = []
    for batch_size in batch_sizes:
        batch = np.random.default_rng(0).standard_normal((batch_size, *shape), dtype=np.float32)
        seconds = {name: [] for name in callables}
        while any(len(times) < min_calls and sum(times) < min_seconds for times in seconds.values()):
            for name, function in callables.items():
                for _ in range(5):
                    function(batch)
                end = time.perf_counter() + 0.1
                while (before := time.perf_counter()) < end:
                    function(batch)
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
    """A function of a normalised numpy batch that ends when the device has answered."""

    @torch.inference_mode()
    def call(batch):
        return model(torch.from_numpy(batch).to(device)).cpu()

    return call


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
    if "int8" in args.precision and not args.data_dir:
        raise UserError("--precision int8 needs --data_dir: images to calibrate on, for instance the generated ones.")
    accelerator = start(args)
    if not accelerator.is_main_process:
        return  # one process exports; a second would only disturb its timing
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model = models.load_model(args.model)
    shape = (3, *models.input_size(model))

    if args.data_dir:
        images = load_folder(args.data_dir, shape[-1])[0]
        images = images[:: -(-len(images) // args.num_samples)]
        inputs = models.normalize(model, images)
    else:
        inputs = torch.randn(64, *shape, generator=torch.Generator().manual_seed(args.seed))
    with torch.inference_mode():
        reference = torch.cat([model(batch) for batch in inputs.split(64)])

    files = {precision: output_dir / f"student_{precision}.onnx" for precision in ("fp32", *args.precision)}
    export_fp32(model, classes, args.model, files["fp32"])
    if "fp16" in files:
        convert_fp16(files["fp32"], files["fp16"])
    if "int8" in files:
        convert_int8(files["fp32"], files["int8"], inputs)
    sessions = {precision: OnnxClassifier(path, accelerator.device) for precision, path in files.items()}
    fidelity = {}
    for precision, session in sessions.items():
        answers = torch.cat([torch.from_numpy(session.run(batch.numpy())) for batch in inputs.split(64)])
        fidelity[precision] = compare(reference, answers) | {"bytes": files[precision].stat().st_size}
        print(
            f"{files[precision]}: logits differ by at most {fidelity[precision]['max_abs_diff']:.2e}, "
            f"top-1 agrees on {fidelity[precision]['top1_agreement']:.1%} of {len(inputs)} inputs"
        )
    if not fidelity["fp32"]["max_abs_diff"] < 1e-3:
        raise UserError(f"{files['fp32']} does not answer as PyTorch does ({fidelity['fp32']}): do not use it.")

    machine = f"{accelerator.device.type}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    results = {"settings": settings_of(args), "machine": machine, "fidelity": fidelity}
    if args.benchmark:
        device = accelerator.device
        callables = {"student torch": torch_callable(model.to(device), device)}
        if args.teacher:
            teacher = models.load_model(args.teacher, image_size=args.teacher_image_size).to(device)
            if models.input_size(teacher) == shape[1:]:
                callables["teacher torch"] = torch_callable(teacher, device)
            else:
                size = models.input_size(teacher)
                callables["teacher torch"] = torch_callable(
                    torch.nn.Sequential(torch.nn.Upsample(size, mode="bilinear"), teacher), device
                )
        callables |= {f"student onnx {precision}": session.run for precision, session in sessions.items()}
        results["latency"] = benchmark(callables, args.batch_size, shape)
        for row in results["latency"]:  # ONNX Runtime may run elsewhere than PyTorch
            onnx_row = "onnx" in row["model"]
            row["device"] = sessions["fp32"].provider if onnx_row else accelerator.device.type
        table = markdown_table(results["latency"], machine)
        with whole_file(output_dir / "benchmark.md") as path:
            path.write_text(table)
        print(table)
    write_json(output_dir / "benchmark.json", results)
    if "tensorrt" in args.runtime:
        source = files[args.precision[-1]]
        build_engine(source, output_dir / "student.engine", shape, max(args.batch_size), args.workspace_mib)
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
    add("--data_dir", help="images to check answers on and to calibrate int8 with; default: random numbers")
    add("--num_samples", type=positive_int, default=512, help="at most so many of these images, evenly spaced")
    add("--benchmark", action="store_true", help="time the models")
    add("--teacher", help="a teacher to time beside the student")
    add("--teacher_image_size", type=positive_int, help="the teacher's input side; default: its own")
    add("--batch_size", type=positive_int, nargs="+", default=[1], help="batch sizes to time")
    add("--workspace_mib", type=positive_int, default=1024, help="TensorRT's workspace limit in MiB")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
