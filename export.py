"""Exports a student to ONNX (fp32, fp16, int8), and to what GPUs, C++ programs, phones and browsers run; checks that it
still answers the same, and times it beside its teacher.

python export.py --model outputs/demo/student --benchmark --teacher assets/teacher --web
"""

import copy
import json
import os
import warnings
from pathlib import Path

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from timm.utils import reparameterize_model
from tqdm.auto import tqdm

from common import models
from common.cli import UserError, argument_parser, note, positive_int, refuse_others, run
from common.images import as_tensor, count_supports, load_folder
from common.memory import announce
from common.preprocessing import CentralSquare, WithPreprocessing
from common.processes import start
from common.quantization import convert_int8
from common.records import provenance, refuse_other_results, whole_file, write_json
from common.report import points, write_report
from common.runtimes import RUNTIMES
from common.runtimes.base import Student, as_input, log_probabilities
from common.runtimes.latency import latency
from common.runtimes.pytorch import PyTorch
from common.runtimes.web import PACKAGE, find_package, serving, write_page
from common.shards import open_samples, require_finished
from common.statistics import accuracy, paired_difference

PRECISIONS = ("fp32", "fp16", "int8", "int8_tensorrt")
TOLERATED_LOSS = 0.005  # of accuracy, that a precision may lose before the report says so first


def export_graph(module, example, output, dynamic_shapes):
    """A module as an ONNX model, simplified, with batch normalisation folded into the convolutions.

    Args:
        example: its input, which is to be called "images". output: the name of its output.
        dynamic_shapes: {dimension of the input: its name}, of those that may be of any length.
    """
    dynamic = {axis: torch.export.Dim(name) for axis, name in dynamic_shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals
        program = torch.onnx.export(
            module.eval(), (example,), dynamo=True, input_names=["images"], output_names=[output],
            dynamic_shapes=(dynamic,) if dynamic else None, verbose=False,
        )  # fmt: skip
    return program.model_proto


def export_fp32(model, batch_size=None, preprocessing=True):
    """The student in single precision: uint8 "images" [batch, h, w, 3] to "probabilities" [batch, classes]; or, without
    preprocessing, normalised float32 [batch, 3, h, w] to "logits"."""
    count, size, batch = batch_size or 2, models.input_size(model), {} if batch_size else {0: "batch"}
    if preprocessing:
        images = torch.zeros(count, *size, 3, dtype=torch.uint8)
        return export_graph(WithPreprocessing(model), images, "probabilities", batch)
    return export_graph(model, torch.zeros(count, 3, *size), "logits", batch)


def convert_fp16(fp32):
    """Half-precision weights and arithmetic; input and output stay float32."""
    model = OnnxModel(convert_float_to_float16(copy.deepcopy(fp32), keep_io_types=True))
    model.topological_sort()  # the conversion leaves its casts at the end
    del model.model.graph.value_info[:]  # some types in between are noted as they were
    return model.model


def of_any_size(graph, size, batch_size=None):
    """Lets a graph of uint8 images [batch, h, w, 3] take images of any height and width, which must be equal within a
    batch: their central squares are resized before it as for PyTorch."""
    example = torch.zeros(batch_size or 2, size[0] + 3, size[1] + 5, 3, dtype=torch.uint8)
    shapes = ({} if batch_size else {0: "batch"}) | {1: "height", 2: "width"}
    square = export_graph(CentralSquare(size), example, "square", shapes)
    graph = onnx.compose.add_prefix(graph, "student/", rename_outputs=False)
    merged = onnx.compose.merge_models(square, graph, io_map=[("square", "student/images")])
    versions = {entry.domain: entry.version for entry in merged.opset_import}  # each is there twice
    del merged.opset_import[:]
    merged.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in versions.items())
    return merged


def metadata(model, classes, args, precision, any_size):
    """What a program needs to know beside the graph, {name: JSON}, and "source", the model's path.

    "preprocessing" says how a photo becomes an input where the graph does not do it; "includes_preprocessing", whether
    it takes uint8 images [batch, height, width, 3], of any size where "image_size" is null, and gives probabilities.
    "batch_size" null is any too.
    """
    size, config = models.input_size(model), model.pretrained_cfg
    facts = {
        "classes": classes,
        "preprocessing": {
            "orientation": "upright, as EXIF or XMP say", "background": "white", "color_order": "RGB",
            "crop": "central square", "interpolation": "bicubic, antialiased", "input_size": [3, *size],
            "range": [0, 1], "mean": config["mean"], "std": config["std"],
        },
        "includes_preprocessing": bool(args.include_preprocessing), "image_size": None if any_size else list(size),
        "batch_size": args.batch_size, "int8_for_tensorrt": precision == "int8_tensorrt",
    }  # fmt: skip
    return {name: json.dumps(value) for name, value in facts.items()} | {"source": str(args.model)}


def compare(reference, other, labels=None):
    """How far answers [N, num_classes] are from the reference: maximum and mean difference, top-1 agreement and, where
    labels [N] are known, accuracy, and its change with the 95% interval of paired answers."""
    difference = (reference - other).abs()
    before, after = reference.argmax(-1), other.argmax(-1)
    facts = {"max_abs_diff": difference.max().item(), "mean_abs_diff": difference.mean().item()}
    facts["top1_agreement"] = (before == after).double().mean().item()
    if labels is not None:
        mean, low, high = paired_difference((after == labels).int().tolist(), (before == labels).int().tolist())
        facts["accuracy"] = accuracy(after == labels)
        facts["accuracy_change"] = {"mean": mean, "ci95": [low, high]}
    return facts


def verdict(fidelity):
    """The report's first line, of {name: facts of `compare`}: what costs accuracy, what loss cannot be ruled out."""
    changes = {name: facts.get("accuracy_change") for name, facts in fidelity.items()}
    if not changes:
        return "Nothing was compared."
    if not all(changes.values()):
        return "Accuracy was not compared: give labelled images with --query_dir."
    count = max(facts["accuracy"]["count"] for facts in fidelity.values())
    sentences, rest = [], []
    for name, change in changes.items():
        found = points(change["mean"], *change["ci95"])
        if change["mean"] >= -TOLERATED_LOSS:
            rest.append(name)
        elif change["ci95"][1] < 0:
            sentences.append(f"{name} LOSES accuracy: {found} points.")
        else:
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


def read_images(args, model, classes):
    """Images to calibrate with, images to compare answers on, both [N, 3, h, w] in [0, 1], and their labels or None."""
    size, labels, found = models.input_size(model), None, []
    if args.data_dir:
        images = [as_tensor(image) for _, image in open_samples(args.data_dir, size[0])]
        found.append(torch.stack(images[:: -(-len(images) // args.num_samples)]))
    if args.support_dir:
        found.append(load_folder(args.support_dir, size[0], classes)[0])
    if not found:
        found.append(torch.randint(256, (64, 3, *size), generator=torch.Generator().manual_seed(args.seed)) / 255)
    images = queries = torch.cat(found)
    if args.query_dir:
        queries, labels, _, paths = load_folder(args.query_dir, size[0], classes)
        count_supports(paths, args.query_dir, args.support_dir)
    return images, queries, labels


def write_onnx(model, classes, args, examples):
    """Writes the ONNX files of --precision, and of fp32, which the others are made from.

    Args:
        examples: images [N, 3, h, w] in [0, 1] that int8's ranges come from.
    Returns:
        {precision: file}, the last of --precision last.
    """
    fp32, files = export_fp32(model, args.batch_size, args.include_preprocessing), {}
    inputs = as_input(model, examples, args.include_preprocessing).numpy()
    precisions = dict.fromkeys(["fp32"] * ("fp32" not in args.precision) + args.precision)
    for precision in tqdm(precisions, desc="writing ONNX", unit="file"):
        graph = fp32
        if precision == "fp16":
            graph = convert_fp16(fp32)
        elif precision != "fp32":
            batch_size = args.batch_size or min(32, len(inputs))
            graph = convert_int8(fp32, inputs, batch_size, precision == "int8_tensorrt")
        any_size = args.include_preprocessing == "any_size" and precision != "int8_tensorrt"
        if any_size:
            graph = of_any_size(graph, models.input_size(model), args.batch_size)
        onnx.helper.set_model_props(graph, metadata(model, classes, args, precision, any_size))
        onnx.checker.check_model(graph, full_check=True)
        files[precision] = Path(args.output_dir) / f"student_{precision}.onnx"
        with whole_file(files[precision]) as temporary:
            onnx.save(graph, temporary)
    return files


def written(folder):
    """{file of a student: time of its writing}"""
    files = [path for pattern in ("student*", "web/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def build(runtime, student):
    """Lets a runtime write its own file. Returns the UserError of one that cannot, to be raised when all is done."""
    try:
        runtime.build(student)
    except UserError as error:
        return error


def refuse(args):
    """Raises a UserError where options contradict each other, or a runtime is not installed."""
    if args.batch_size and args.benchmark and args.benchmark_batch_sizes != [args.batch_size]:
        raise UserError(f"--batch_size fixes it: give --benchmark_batch_sizes {args.batch_size} alone.")
    largest = max([args.opt_batch_size, *(args.benchmark_batch_sizes if args.benchmark else [])])
    if largest > args.max_batch_size:
        raise UserError(f"Batch {largest} is above --max_batch_size {args.max_batch_size}: raise --max_batch_size.")
    if "tensorrt" in args.runtime and args.precision[-1] == "int8":
        raise UserError("--precision int8 is for CPUs: an engine wants int8_tensorrt, the last of --precision.")
    if {"int8", "int8_tensorrt"} & set(args.precision) and not (args.data_dir or args.support_dir):
        raise UserError("int8 needs images to calibrate on: generated ones as --data_dir, photos as --support_dir.")
    any_size = args.include_preprocessing == "any_size" and args.precision[-1] != "int8_tensorrt"
    if "tensorrt" in args.runtime and any_size:
        raise UserError("An engine takes images of one size: give --include_preprocessing model_size.")
    for folder in filter(None, (args.data_dir, args.query_dir)):
        require_finished(folder)
    for name in args.runtime:
        RUNTIMES[name].require()
    if args.web:
        find_package(args.web)


def main(args):
    classes = models.class_names(args.model)
    if not classes:
        raise UserError(f"{args.model} is no folder of a trained student: give one that distill.py wrote.")
    refuse(args)
    output_dir = Path(args.output_dir)
    refuse_other_results(record := output_dir / "benchmark.json", "export")
    accelerator = start(args)
    if not accelerator.is_main_process:
        return  # one process exports; a second would only disturb its timing
    if not record.is_file():
        refuse_others(output_dir / "benchmark.md", *written(output_dir))
        write_json(record, {"kind": "export"})  # whose the files are, should it be interrupted
    device, cpu = accelerator.device, torch.device("cpu")
    model = reparameterize_model(models.load_model(args.model))  # RepVGG and its kind become plain convolutions
    teacher = models.load_model(args.teacher, image_size=args.teacher_image_size) if args.teacher else None
    flops = {"student": models.count_flops(model)}
    before = written(output_dir)
    images, queries, labels = read_images(args, model, classes)
    largest = max([args.batch_size or 16, *(args.benchmark_batch_sizes if args.benchmark else [])])
    networks = {"the student": model} | ({"the teacher": teacher} if teacher else {})
    held = images.nbytes + sum(x.nbytes for x in {images, queries}) if device == cpu else 0
    parts = {f"{name}, {largest} images": held + models.answering_bytes(x, largest) for name, x in networks.items()}
    announce([*networks.values()], parts, device)
    student = Student(model, classes, write_onnx(model, classes, args, images), images, output_dir, device, args)
    if args.web:
        graph = of_any_size(export_fp32(model), models.input_size(model))
        write_page(output_dir / "web", graph.SerializeToString(), classes, args.web)
    unbuilt = {name: error for name in args.runtime if (error := build(RUNTIMES[name], student))}

    reference = models.answers(PyTorch(model, cpu), queries, "comparing with torch fp32")
    fidelity, timings, accuracies = {}, [], {}
    if labels is not None:
        accuracies["student torch"] = accuracy(reference.argmax(-1) == labels)
    if teacher:
        flops["teacher"] = models.count_flops(teacher)
        if labels is not None and args.support_dir:
            specialised, _ = models.of_supports(teacher, args.support_dir, classes)
            accuracies["teacher torch"] = models.accuracy_on(args.query_dir, teacher, specialised, classes)

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
            if (name, where) != ("torch", "cpu") and row not in fidelity:
                expected = log_probabilities(reference.softmax(-1)) if runtime.includes_preprocessing else reference
                found_here = models.answers(runtime, queries, f"comparing {row}", args.batch_size or 16)
                fidelity[row] = compare(expected, found_here, labels)
        if args.benchmark:
            # On a CPU that file shows how accurate it is, not how fast.
            timed = {("student", *k): r for k, r in found.items() if k[1] != "int8_tensorrt" or k[0] == "tensorrt"}
            if teacher:
                timed |= {("teacher", "torch", "fp32", d.type): PyTorch(teacher, d) for d in devices}
            timings += latency(timed, args.benchmark_batch_sizes, queries.shape[1:], num_threads)
        devices = [cpu]  # the number of threads makes a difference there only

    made = [path for path, time in written(output_dir).items() if before.get(path) != time]
    for path in before.keys() - made:
        note(f"{path} is of an earlier export, and stays as it is")
    results = {
        "kind": "export",
        "verdict": verdict(fidelity), "num_images": len(queries), "fidelity": fidelity, "latency": timings,
        "accuracy": accuracies, "flops": flops,
        "bytes": {path.relative_to(output_dir).as_posix(): path.stat().st_size for path in made},
        "machine": f"{device.type}, {os.cpu_count()} cores",
        **provenance(args, vars(args)),
    }  # fmt: skip
    write_json(record, results)
    for name in ("report.html", "benchmark.md"):
        write_report(output_dir / name, results)
    print((output_dir / "benchmark.md").read_text(), f"see {output_dir / 'report.html'}", sep="\n")
    if args.web:
        print(f"in a browser: {serving(output_dir / 'web')}")
    accelerator.end_training()
    if unbuilt:
        raise UserError(" ".join(map(str, unbuilt.values())))


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/export")
    add = parser.add_argument
    add("--model", default="outputs/demo/student", help="the student's folder")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="ONNX files to write")
    add("--runtime", nargs="+", choices=list(RUNTIMES), default=["torch", "onnxruntime"], help="what the student is "
        "compared and timed in; aotinductor also makes student.pt2, for the C++ program, tensorrt student.engine, from "
        "the last of --precision, and executorch student_fp32.pte and student_int8.pte")  # fmt: skip
    add("--data_dir", help="generated images, which int8 is calibrated with")
    add("--query_dir", help="labelled images to check answers on; default: those calibrated with, or random numbers")
    add("--include_preprocessing", nargs="?", choices=["any_size", "model_size"], const="any_size", help="in the "
        "graph: uint8 images [batch, height, width, 3] in, probabilities out. Images are of any size and resized "
        "there, which int8_tensorrt leaves out; or all of the model's input size")  # fmt: skip
    add("--web", nargs="?", const=PACKAGE, metavar="PACKAGE", help="also write a page for browsers, with the npm "
        f"package onnxruntime-web of this folder, by default {PACKAGE} or, without that, a CDN")  # fmt: skip
    add("--num_samples", type=positive_int, default=512, help="at most so many of --data_dir, evenly spaced")
    add("--benchmark", action="store_true", help="time the models")
    add("--num_threads", type=positive_int, nargs="+", help="numbers of CPU threads to time with; default: PyTorch's")
    add("--teacher", help="a teacher to time beside the student")
    add("--support_dir", help="the student's photos: int8 is calibrated with them too, and their prototypes are the "
        "teacher's classes where its accuracy on --query_dir is measured")  # fmt: skip
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
