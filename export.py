"""Exports a student to ONNX (fp32, fp16, int8), TensorRT and a package for C++, checks that it still answers the same,
and times it beside its teacher.

accelerate launch export.py --model outputs/demo/student --benchmark --teacher assets/teacher
"""

import json
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from timm.utils import reparameterize_model

from common import models
from common.cli import UserError, argument_parser, positive_int, run
from common.images import as_tensor, load_folder
from common.processes import start
from common.records import provenance, whole_file, write_json
from common.report import fidelity_table, latency_table, points, write_report
from common.runtimes import RUNTIMES
from common.runtimes.base import Student, WithPreprocessing, as_input, log_probabilities
from common.runtimes.latency import latency
from common.runtimes.pytorch import PyTorch
from common.shards import open_samples
from common.statistics import accuracy, paired_difference

QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]
PRECISIONS = ("fp32", "fp16", "int8", "int8_tensorrt")
TOLERATED_LOSS = 0.005  # of accuracy, that a precision may lose before the report says so first


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
    """Feeds inputs, a numpy array, to ONNX Runtime's calibration, in whole batches: the last is filled up with the
    first inputs."""

    def __init__(self, inputs, batch_size):
        count = -(-len(inputs) // batch_size)
        self.batches = iter(np.resize(inputs, (count, batch_size, *inputs.shape[1:])))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def convert_int8(fp32_path, path, inputs, batch_size, for_tensorrt=False):
    """Explicit Q/DQ nodes around convolutions, matrix products, sums and poolings: symmetric, weights per channel and
    biases in floating point. Ranges come from the inputs, and the answers stay in floating point: an answer that is
    surer than those on the inputs must not be cut off.

    ONNX Runtime computes in int8 where inputs and outputs are quantized, and many CPUs' sums of products overflow
    unless weights have 7 bits. TensorRT fuses a layer with what follows it if only its inputs are quantized, and takes
    8 bits. Each is slow or wrong with the other's file.
    """
    properties = {p.key: p.value for p in onnx.load(fp32_path).metadata_props}
    properties["int8_for_tensorrt"] = json.dumps(for_tensorrt)
    with tempfile.TemporaryDirectory() as folder:
        folded, quantized = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(fp32_path, folded, skip_symbolic_shape=True)  # folds batch normalisation
        quantize_static(
            folded,
            quantized,
            Calibration(inputs, batch_size),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            nodes_to_exclude=float_sums(onnx.load(folded).graph),
            per_channel=True,
            reduce_range=not for_tensorrt,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        proto = onnx.load(quantized)
    leave_in_float(proto.graph, outputs_of_layers=for_tensorrt)
    if for_tensorrt:
        join_sums(proto.graph)
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


def float_sums(graph):
    """The names of sums that are not quantized: those with a constant, as a position embedding or a bias, belong to the
    layer before; and those without a convolution's result, as a transformer's residual stream, have a few channels so
    much larger than the others that 8 bits would not hold both."""
    constants = {tensor.name for tensor in graph.initializer}
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.output}
    sums = [node for node in graph.node if node.op_type == "Add"]
    return [node.name for node in sums if constants & set(node.input) or not convolved & set(node.input)]


def leave_in_float(graph, outputs_of_layers):
    """Takes Q/DQ pairs away before the network's end: before whatever leads to no quantized layer any more. With
    `outputs_of_layers`, before all that is not quantized itself."""
    ends = {value.name for value in graph.output}
    readers, at_end = {}, {}
    for node in reversed(graph.node):
        after = [reader for name in node.output for reader in readers.get(name, [])]
        at_end[node.output[0]] = node.op_type not in QUANTIZED and all(at_end[r.output[0]] for r in after)
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made_by = {name: node for node in graph.node for name in node.output}
    for pair in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        quantize, name = made_by.get(pair.input[0]), pair.output[0]
        if quantize is None:
            continue  # of a weight
        source = quantize.input[0]
        for node in readers.get(name, []):
            if at_end[node.output[0]] or (outputs_of_layers and node.op_type not in QUANTIZED):
                node.input[:] = [source if given == name else given for given in node.input]
        if name in ends:
            for node in graph.node:
                node.input[:] = [name if given == source else given for given in node.input]
                node.output[:] = [name if made == source else made for made in node.output]
            graph.node.remove(pair)
    remove_unused(graph)


def remove_unused(graph):
    """Takes away nodes and constants whose results nobody reads."""
    used = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def join_sums(graph):
    """Takes the Q/DQ pair away between a residual sum and a convolution that only it uses: TensorRT computes the two as
    one layer then. The pair of the other summand stays, and with it the result is int8."""
    made_by = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    for total in [node for node in graph.node if node.op_type == "Add"]:
        for side, name in enumerate(total.input):
            pair = made_by.get(name)
            if pair is None or pair.op_type != "DequantizeLinear":
                continue
            quantize = made_by[pair.input[0]]
            source = made_by.get(quantize.input[0])
            names = (quantize.input[0], pair.input[0], name)
            if source is not None and source.op_type == "Conv" and all(uses[name] == 1 for name in names):
                total.input[side] = quantize.input[0]
                break
    remove_unused(graph)


def compare(reference, other, labels=None):
    """How far answers [N, num_classes] are from the reference: maximum and mean difference, top-1 agreement and, where
    labels [N] are known, accuracy, and its change with the 95% interval of paired answers."""
    difference = (reference - other).abs()
    before, after = reference.argmax(-1), other.argmax(-1)
    facts = {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "top1_agreement": (before == after).double().mean().item(),
    }
    if labels is not None:
        mean, low, high = paired_difference((after == labels).int().tolist(), (before == labels).int().tolist())
        facts["accuracy"] = accuracy(after == labels)
        facts["accuracy_change"] = {"mean": mean, "ci95": [low, high]}
    return facts


def verdict(fidelity):
    """The first line of the report: what costs accuracy, and what loss so many images cannot rule out. `fidelity` is
    {name: facts of `compare`}."""
    changes = {name: facts.get("accuracy_change") for name, facts in fidelity.items()}
    if not changes:
        return "Nothing was compared."
    if not all(changes.values()):
        return "Accuracy was not compared: give labelled images with --query_dir."
    count = max(facts["accuracy"]["count"] for facts in fidelity.values())
    sentences, rest = [], []
    for name, change in changes.items():
        if change["mean"] >= -TOLERATED_LOSS:
            rest.append(name)
        elif change["ci95"][1] < 0:
            sentences.append(f"{name} LOSES accuracy: {points(change['mean'], *change['ci95'])} points.")
        else:
            found = points(change["mean"], *change["ci95"])
            sentences.append(f"{name} may lose accuracy: {found} points on {count} images, which cannot tell.")
    largest = max((-changes[name]["ci95"][0] for name in rest), default=0)
    if rest and largest <= TOLERATED_LOSS:
        sentences.append(f"Nothing loses more than {100 * TOLERATED_LOSS} points of accuracy: {', '.join(rest)}.")
    elif rest:
        sentences.append(
            f"No loss above {100 * TOLERATED_LOSS} points was seen, but {count} images cannot rule out one of "
            f"{100 * largest:.1f}: {', '.join(rest)}."
        )
    return " ".join(sentences)


def markdown(results):
    """benchmark.md: the verdict, how far the answers are from PyTorch's, and the latencies."""
    parts = [results["verdict"], markdown_table(*fidelity_table(results))]
    if results["latency"]:
        parts += [f"Latency on {results['machine']}.", markdown_table(*latency_table(results))]
    return "\n\n".join(parts) + "\n"


def markdown_table(head, *rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def read_images(args, model, classes):
    """Images to calibrate with, images to compare answers on, both [N, 3, h, w] in [0, 1], and the labels [N] of these,
    or None where nobody knows them."""
    size, labels, found = models.input_size(model), None, []
    if args.data_dir:
        images = torch.stack([as_tensor(image) for _, image in open_samples(args.data_dir, size[0])])
        found.append(images[:: -(-len(images) // args.num_samples)])
    if args.support_dir:
        found.append(load_folder(args.support_dir, size[0], classes)[0])
    if not found:
        found.append(torch.randint(256, (64, 3, *size), generator=torch.Generator().manual_seed(args.seed)) / 255)
    images = queries = torch.cat(found)
    if args.query_dir:
        queries, labels, *_ = load_folder(args.query_dir, size[0], classes)
    return images, queries, labels


def write_onnx(model, classes, args, examples):
    """Writes the ONNX files of --precision, and of fp32, from which the others are made.

    Args:
        examples: images [N, 3, h, w] in [0, 1] that int8's ranges come from.
    Returns:
        {precision: file}, the last of --precision last.
    """
    precisions = dict.fromkeys(["fp32"] * ("fp32" not in args.precision) + args.precision)
    files = {precision: Path(args.output_dir) / f"student_{precision}.onnx" for precision in precisions}
    export_fp32(model, classes, args, files["fp32"])
    if "fp16" in files:
        convert_fp16(files["fp32"], files["fp16"])
    for precision in {"int8", "int8_tensorrt"} & set(files):
        inputs = as_input(model, examples, args.include_preprocessing).numpy()
        batch_size = args.batch_size or min(32, len(inputs))
        convert_int8(files["fp32"], files[precision], inputs, batch_size, precision == "int8_tensorrt")
    return files


def build(runtime, student):
    """Lets a runtime write its own file. Returns the UserError of one that cannot: all else is made and measured before
    it is raised."""
    try:
        runtime.build(student)
    except UserError as error:
        return error


def teacher_accuracy(teacher, args, classes):
    """Accuracy on the queries of the teacher, specialised on --support_dir by cosine prototypes."""
    size = models.input_size(teacher)[0]
    supports, labels, *_ = load_folder(args.support_dir, size, classes)
    classifier = models.PrototypeClassifier(teacher, supports, labels)
    queries, labels, *_ = load_folder(args.query_dir, size, classes)
    with torch.inference_mode():
        answers = torch.cat([classifier(part) for part in queries.split(64)])
    return accuracy(answers.argmax(-1) == labels)


def refuse(args):
    """Raises a UserError where options contradict each other, or a runtime is not installed."""
    if args.batch_size and args.benchmark and args.benchmark_batch_sizes != [args.batch_size]:
        raise UserError(
            f"--batch_size {args.batch_size} fixes it: give --benchmark_batch_sizes {args.batch_size} alone."
        )
    if args.benchmark and max(args.benchmark_batch_sizes) > args.max_batch_size:
        raise UserError(f"--benchmark_batch_sizes up to {max(args.benchmark_batch_sizes)}: raise --max_batch_size.")
    if args.opt_batch_size > args.max_batch_size:
        raise UserError(f"--opt_batch_size {args.opt_batch_size} is above --max_batch_size {args.max_batch_size}.")
    if "tensorrt" in args.runtime and args.precision[-1] == "int8":
        raise UserError("--precision int8 is for CPUs: an engine wants int8_tensorrt, the last of --precision.")
    if {"int8", "int8_tensorrt"} & set(args.precision) and not (args.data_dir or args.support_dir):
        raise UserError(
            "--precision int8 needs images to calibrate on: the generated ones as --data_dir, photos as --support_dir."
        )
    for name in args.runtime:
        RUNTIMES[name].require()


def main(args):
    classes = models.class_names(args.model)
    if not classes:
        raise UserError(f"{args.model} is no folder of a trained student: give one that distill.py wrote.")
    refuse(args)
    accelerator = start(args)
    if not accelerator.is_main_process:
        return  # one process exports; a second would only disturb its timing
    device, cpu, output_dir = accelerator.device, torch.device("cpu"), Path(args.output_dir)
    model = reparameterize_model(models.load_model(args.model))  # RepVGG and its kind become plain convolutions
    try:
        flops = {"student": models.count_flops(model)}
    except (RuntimeError, AssertionError, IndexError) as error:  # what layers raise, and timm's checks
        size = "x".join(map(str, models.input_size(model)))
        raise UserError(
            f"{args.model} takes no images of {size}, the size in its config.json ({error}): distil it anew, without "
            "--student_image_size."
        ) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    images, queries, labels = read_images(args, model, classes)
    student = Student(model, classes, write_onnx(model, classes, args, images), output_dir, device, args)
    unbuilt = {name: error for name in args.runtime if (error := build(RUNTIMES[name], student))}

    reference = PyTorch(model, cpu)(queries)
    results = {
        "kind": "export",
        "num_images": len(queries),
        "fidelity": {},
        "latency": [],
        "accuracy": {},
        "flops": flops,
    }
    if labels is not None:
        results["accuracy"]["student torch"] = accuracy(reference.argmax(-1) == labels)
    teacher = models.load_model(args.teacher, image_size=args.teacher_image_size) if args.teacher else None
    if teacher:
        flops["teacher"] = models.count_flops(teacher)
        if labels is not None and args.support_dir:
            results["accuracy"]["teacher torch"] = teacher_accuracy(teacher, args, classes)

    devices = [cpu] if device.type == "cpu" else [cpu, device]
    for num_threads in args.num_threads or [torch.get_num_threads()]:
        torch.set_num_threads(num_threads)
        found = {
            (name, precision, where.type): RUNTIMES[name](source, where, num_threads)
            for where in devices
            for name in args.runtime
            if name not in unbuilt
            for precision, source in RUNTIMES[name].sources(student, where).items()
        }
        for (name, precision, where), runtime in found.items():
            row = f"{name} {precision}" + f" on {where}" * (where != "cpu")
            if (name, where) != ("torch", "cpu") and row not in results["fidelity"]:
                expected = log_probabilities(reference.softmax(-1)) if runtime.includes_preprocessing else reference
                results["fidelity"][row] = compare(expected, runtime(queries), labels)
        if args.benchmark:
            # On a CPU that file shows how accurate it is, not how fast.
            timed = {("student", *k): r for k, r in found.items() if k[1] != "int8_tensorrt" or k[0] == "tensorrt"}
            if teacher:
                timed |= {("teacher", "torch", "fp32", d.type): PyTorch(teacher, d) for d in devices}
            results["latency"] += latency(timed, args.benchmark_batch_sizes, queries.shape[1:], num_threads)
        devices = [cpu]  # the number of threads makes a difference there only

    results["bytes"] = {path.name: path.stat().st_size for path in output_dir.glob("student*") if path.is_file()}
    results["verdict"] = verdict(results["fidelity"])
    results["machine"] = f"{device.type}, {os.cpu_count()} cores"
    results |= provenance(args, vars(args))
    write_json(output_dir / "benchmark.json", results)
    write_report(output_dir / "report.html", results)
    with whole_file(output_dir / "benchmark.md") as path:
        path.write_text(markdown(results))
    print(markdown(results))
    accelerator.end_training()
    for error in unbuilt.values():
        raise error


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/export")
    add = parser.add_argument
    add("--model", default="outputs/demo/student", help="the student's folder")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="ONNX files to write")
    add(
        "--runtime",
        nargs="+",
        choices=list(RUNTIMES),
        default=["torch", "onnxruntime"],
        help="what the student is compared and timed in; aotinductor also makes student.pt2, for the C++ program, and "
        "tensorrt student.engine, from the last of --precision",
    )
    add("--data_dir", help="generated images, which int8 is calibrated with")
    add("--query_dir", help="labelled images to check answers on; default: those calibrated with, or random numbers")
    add(
        "--include_preprocessing",
        action="store_true",
        help="in the graph: uint8 images [batch, height, width, 3] in, probabilities out",
    )
    add("--num_samples", type=positive_int, default=512, help="at most so many of --data_dir, evenly spaced")
    add("--benchmark", action="store_true", help="time the models")
    add("--num_threads", type=positive_int, nargs="+", help="numbers of CPU threads to time with; default: PyTorch's")
    add("--teacher", help="a teacher to time beside the student")
    add(
        "--support_dir",
        help="the student's photos: int8 is calibrated with them too, and their prototypes are the teacher's classes "
        "where its accuracy on --query_dir is measured",
    )
    add("--teacher_image_size", type=positive_int, help="the teacher's input side; default: its own")
    add("--batch_size", type=positive_int, help="a fixed batch size of the ONNX files; default: any")
    add("--benchmark_batch_sizes", type=positive_int, nargs="+", default=[1], help="batch sizes to time")
    add = parser.add_argument_group("TensorRT engine and AOTInductor package").add_argument
    add("--opt_batch_size", type=positive_int, default=1, help="the batch that the engine's kernels are chosen for")
    add("--max_batch_size", type=positive_int, default=256, help="the largest batch that engine and package take")
    add("--workspace_mib", type=positive_int, default=1024, help="the engine's workspace limit in MiB")
    add("--timing_cache", help="file of kernel timings for later builds; default: timing.cache in --output_dir")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
