"""Export: every graph answers as PyTorch does, and has the form that TensorRT and cameras want."""

import itertools
import json
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import export
from common import models
from common.cli import UserError
from common.images import as_tensor, load_folder
from common.runtimes import latency, open_exported
from common.runtimes.executorch import ExecuTorch
from common.runtimes.onnxruntime import OnnxRuntime
from common.runtimes.openvino import OpenVino
from tests.conftest import TWO_NODES, launch


def classes_of(run_dir):
    return sorted(path.name for path in (run_dir / "support").iterdir())


def graph_of(path):
    return onnx.load(path).graph


def test_export_answers_as_pytorch_does(run_dir):
    facts = json.loads((run_dir / "export" / "benchmark.json").read_text())
    assert facts["command"].startswith("accelerate launch export.py --model ")
    assert facts["fidelity"]["onnxruntime fp32"]["max_abs_diff"] < 1e-4
    assert facts["fidelity"]["onnxruntime fp16"]["top1_agreement"] == 1
    assert facts["fidelity"]["onnxruntime int8"]["top1_agreement"] > 0.8  # 12 images, some between the classes
    student = models.load_model(str(run_dir / "student"))
    session = onnxruntime.InferenceSession(run_dir / "export" / "student_fp32.onnx")
    for batch_size in (1, 3, 17):
        x = torch.randn(batch_size, 3, 32, 32)
        logits = session.run(["logits"], {"images": x.numpy()})[0]
        np.testing.assert_allclose(logits, student(x).detach().numpy(), atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == classes_of(run_dir)
    assert json.loads(metadata["preprocessing"]) == {
        "orientation": "upright, as EXIF or XMP say", "background": "white", "color_order": "RGB",
        "crop": "central square", "interpolation": "bicubic, antialiased", "input_size": [3, 32, 32], "range": [0, 1],
        "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    assert {(row["model"], row["runtime"], row["precision"]) for row in facts["latency"]} == {
        ("student", "torch", "fp32"), ("teacher", "torch", "fp32"),
        *(("student", "onnxruntime", precision) for precision in ("fp32", "fp16", "int8")),
    }  # fmt: skip
    assert all(0 < row["median_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in facts["latency"])


def test_a_graph_with_preprocessing_takes_what_a_camera_gives(run_dir, tmp_path):
    """uint8 images to probabilities, against preprocessing in numpy; and evaluate.py measures it as the student."""
    launch("export.py", "--model", run_dir / "student", "--output_dir", tmp_path, "--include_preprocessing",
           "--precision", "fp32", "fp16", "int8", "int8_tensorrt", "--data_dir", run_dir / "generated", "--query_dir",
           run_dir / "support", "--runtime", "onnxruntime", "openvino")  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    student = models.load_model(str(run_dir / "student"))
    x = (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = student(torch.from_numpy(x).float()).softmax(-1).detach().numpy()
    for precision, tolerance in (("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.15)):
        session = onnxruntime.InferenceSession(tmp_path / f"student_{precision}.onnx")
        probabilities = session.run(["probabilities"], {"images": pixels})[0]
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected, atol=tolerance)
    session = onnxruntime.InferenceSession(tmp_path / "student_fp32.onnx")
    runtime = OpenVino(tmp_path / "student_fp32.onnx", torch.device("cpu"))
    blobs = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    for size in ((400, 300), (300, 400), (401, 77), (20, 15), (1, 40), (1, 1)):  # the middle, as from a file
        photo = blobs.resize(size, Image.Resampling.BICUBIC)
        with torch.inference_mode():
            expected = models.with_head(student)(as_tensor(photo, 32)[None]).softmax(-1)
        pixels = np.array(photo)[None].repeat(2, 0)
        answers = session.run(["probabilities"], {"images": pixels})[0], runtime.run(torch.from_numpy(pixels)).numpy()
        for found in answers:
            np.testing.assert_allclose(found, expected.expand(2, -1), atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["image_size"]) is None
    model = onnx.load(tmp_path / "student_int8_tensorrt.onnx")  # TensorRT does not resize: this one says its size
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert json.loads({p.key: p.value for p in model.metadata_props}["image_size"]) == [32, 32]
    facts = json.loads((tmp_path / "benchmark.json").read_text())["fidelity"]
    images, labels, *_ = load_folder(run_dir / "support", 32)
    for name, found in facts.items():
        if not name.startswith("onnxruntime"):
            continue
        answers = OnnxRuntime(tmp_path / f"student_{name.split()[1]}.onnx", torch.device("cpu"))(images)
        assert found["accuracy"]["mean"] == pytest.approx((answers.argmax(-1) == labels).double().mean().item())
    launch("evaluate.py", "--model", f"student={run_dir / 'student'}", f"camera={tmp_path / 'student_fp32.onnx'}",
           "--data_dir", run_dir / "generated", "--output_dir", tmp_path / "evaluation")  # fmt: skip
    methods = json.loads((tmp_path / "evaluation" / "results.json").read_text())["methods"]
    assert methods["camera"]["correct"] == methods["student"]["correct"]


def test_a_fixed_batch_size_is_in_the_graph_and_any_number_of_images_can_be_asked(run_dir, tmp_path):
    """Exported on two nodes, of which the first does it."""
    launch("export.py", "--model", run_dir / "student", "--output_dir", tmp_path, "--batch_size", 17, "--precision",
           "int8", "--data_dir", run_dir / "generated", by=TWO_NODES)  # fmt: skip
    assert sum(1 for _ in (run_dir / "generated").rglob("0*.png")) < 17  # int8 is calibrated with some twice
    for precision in ("fp32", "int8"):
        shape = graph_of(tmp_path / f"student_{precision}.onnx").input[0].type.tensor_type.shape
        assert [d.dim_value for d in shape.dim] == [17, 3, 32, 32]
    images, *_ = load_folder(run_dir / "generated", 32)
    student = models.load_model(str(run_dir / "student"))
    answers = OnnxRuntime(tmp_path / "student_fp32.onnx", torch.device("cpu"))(images[:7])
    torch.testing.assert_close(answers, models.with_head(student)(images[:7]), atol=1e-4, rtol=1e-4)
    args = export.parse_args(["--model", str(run_dir / "student"), "--batch_size", "3", "--benchmark"])
    with pytest.raises(UserError, match="--benchmark_batch_sizes 3 alone"):
        export.main(args)


def test_int8_is_quantized_as_tensorrt_wants_it(run_dir):
    """Symmetric, weights per output channel, biases in floating point, every convolution between Q/DQ pairs."""
    graph = graph_of(run_dir / "export" / "student_int8.onnx")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs and all(
        (values[node.input[2]] == 0).all() and values[node.input[2]].dtype == np.int8 for node in pairs
    )
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 5
    for node in layers:
        activation, weight = (made_by[name] for name in node.input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert made_by[activation.input[0]].op_type == "QuantizeLinear"
        stored, scale = values[weight.input[0]], values[weight.input[1]]
        assert stored.dtype == np.int8 and scale.shape == (len(stored),)
        assert values[node.input[2]].dtype == np.float32


def test_int8_is_calibrated_with_the_photos_too_and_its_answers_have_no_largest_value(run_dir, tmp_path):
    """Generated images are dark, photos light: the input's range is that of both. Whatever leads to the answers alone
    reads floating point."""
    for name, grey in (("generated", 96), ("photos", 255)):
        for c in classes_of(run_dir):
            (tmp_path / name / c).mkdir(parents=True)
            Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / name / c / "0.png")
    both = ["--support_dir", tmp_path / "photos", "--include_preprocessing"]
    for options, largest in (([], 1 - 2 * 96 / 255), (both, 1)):
        launch("export.py", "--model", run_dir / "student", "--output_dir", tmp_path / "export", "--precision", "int8",
               "int8_tensorrt", "--data_dir", tmp_path / "generated", *options, "--runtime", "onnxruntime")  # fmt: skip
        for precision in ("int8", "int8_tensorrt"):
            graph = graph_of(tmp_path / "export" / f"student_{precision}.onnx")
            values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
            first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
            assert values[first.input[1]] == pytest.approx(largest / 127, rel=0.01)
            assert [node.op_type for node in graph.node][-2 if options else -1] == "Gemm"


def test_reparameterized_students_are_plain_convolutions(tmp_path):
    """RepVGG's branches become one convolution each, without normalisation, and answer the same."""
    torch.manual_seed(0)
    student = models.load_model("repvgg_a0", pretrained=False, image_size=32, num_classes=2)
    with torch.no_grad():  # statistics that are not those of a new network
        student.train()(torch.randn(16, 3, 32, 32))
    models.save_model(student.eval(), tmp_path / "student", ["a", "b"])
    launch("export.py", "--model", tmp_path / "student", "--output_dir", tmp_path / "export")
    kinds = {node.op_type for node in graph_of(tmp_path / "export" / "student_fp32.onnx").node}
    assert "Conv" in kinds and not kinds & {"BatchNormalization", "Add"}
    x = torch.rand(4, 3, 32, 32)
    answers = OnnxRuntime(tmp_path / "export" / "student_fp32.onnx", torch.device("cpu"))(x)
    torch.testing.assert_close(answers, models.with_head(student)(x), atol=1e-4, rtol=1e-3)


def test_every_runtime_is_compared_and_timed(run_dir, tmp_path):
    """torch.compile and OpenVINO answer as PyTorch does; rows for each batch size and number of threads; the page."""
    launch("export.py", "--model", run_dir / "student", "--output_dir", tmp_path, "--precision", "fp32", "int8",
           "--data_dir", run_dir / "generated", "--query_dir", run_dir / "query", "--support_dir", run_dir / "support",
           "--runtime", "torch", "torch_compile", "openvino", "--teacher", "assets/teacher", "--benchmark",
           "--benchmark_batch_sizes", 1, 3, "--num_threads", 1, 2)  # fmt: skip
    facts = json.loads((tmp_path / "benchmark.json").read_text())
    assert facts["command"].startswith("python export.py --model ")
    assert set(facts["fidelity"]) == {"torch_compile fp32", "openvino fp32", "openvino int8"}
    for name in ("torch_compile fp32", "openvino fp32"):
        assert facts["fidelity"][name]["max_abs_diff"] < 1e-3
    assert facts["fidelity"]["openvino int8"]["top1_agreement"] > 0.9
    for name in ("student torch", "teacher torch"):
        low, high = facts["accuracy"][name]["ci95"]
        assert 0 < low < facts["accuracy"][name]["mean"] < high
    rows = {
        (row["model"], row["runtime"], row["precision"], row["threads"], row["batch_size"]): row
        for row in facts["latency"]
    }
    assert len(rows) == len(facts["latency"]) == 5 * 2 * 2
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["median_ms"] * 1000)
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy against latency" in page
    for name in ("torch fp32", "torch_compile fp32", "openvino fp32", "openvino int8", "teacher torch fp32"):
        assert f">{name}</text>" in page
    table = (tmp_path / "benchmark.md").read_text()
    assert table.startswith(facts["verdict"]) and table.count("| student | torch_compile") == 4


def test_programs_for_phones_answer_as_pytorch_does(run_dir, tmp_path, monkeypatch):
    """One image at a time, in fp32 and in int8 with answers in floating point; and what is said where one is amiss."""
    launch("export.py", "--model", run_dir / "student", "--output_dir", tmp_path, "--precision", "int8",
           "--runtime", "torch", "executorch", "--support_dir", run_dir / "support", "--query_dir",
           run_dir / "query", "--benchmark", "--benchmark_batch_sizes", 1, 2)  # fmt: skip
    facts = json.loads((tmp_path / "benchmark.json").read_text())
    sizes = {(row["runtime"], row["batch_size"]) for row in facts["latency"]}
    assert sizes == {("torch", 1), ("torch", 2), ("executorch", 1)}  # which takes no other
    facts = facts["fidelity"]
    assert facts["executorch fp32"]["max_abs_diff"] < 1e-4 and facts["executorch int8"]["top1_agreement"] > 0.8
    from executorch.extension.pybindings import portable_lib

    images, *_ = load_folder(run_dir / "query", 32, classes_of(run_dir))
    program = open_exported(tmp_path / "student_int8.pte", torch.device("cpu"))
    assert program.classes == classes_of(run_dir) and program.max_batch_size == 1
    for count in (2, 1):
        ExecuTorch(tmp_path / "student_int8.pte", torch.device("cpu"), count)
        assert portable_lib._threadpool_get_thread_count() == count
    program = open_exported(tmp_path / "student_int8.pte", torch.device("cpu"))
    answers = program(images)
    assert len(answers[:, 0].unique()) > len(images) / 2  # int8 answers of one scale would often be equal
    (tmp_path / "student_fp32.pte").write_bytes(b"no program")
    with pytest.raises(UserError, match="is no program for this ExecuTorch"):
        open_exported(tmp_path / "student_fp32.pte", torch.device("cpu"))
    (tmp_path / "student_int8.pte.json").write_text("{}")
    with pytest.raises(UserError, match="json is damaged"):
        open_exported(tmp_path / "student_int8.pte", torch.device("cpu"))
    (tmp_path / "student_int8.pte.json").unlink()
    with pytest.raises(UserError, match="json is missing"):
        open_exported(tmp_path / "student_int8.pte", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    args = export.parse_args(["--model", str(run_dir / "student"), "--runtime", "executorch"])
    with pytest.raises(UserError, match="pip install executorch"):
        export.main(args)


def test_the_counted_operations_of_conv4():
    """Nine multiplications and additions of each weight at each position; the head sees 256 features."""
    positions = [(3 * 32**2), (64 * 16**2), (64 * 8**2), (64 * 4**2)]
    expected = sum(2 * 9 * 64 * n for n in positions) + 2 * 256 * 7
    assert models.count_flops(models.load_model("conv4_64", pretrained=False, num_classes=7)) == expected


def test_operations_of_a_model_that_gives_a_weight_to_a_layer_are_counted():
    assert models.count_flops(models.load_model("pit_ti_distilled_224", pretrained=False)) > 1e9


def test_a_student_with_an_upsampling_layer_in_half_precision():
    """The conversion notes a wrong type behind such a layer, which the checker would not let pass."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.Upsample(scale_factor=2, mode="bilinear"), torch.nn.Conv2d(4, 2, 3)]
    student, images = torch.nn.Sequential(*layers, torch.nn.Flatten()), torch.rand(2, 3, 8, 8)
    half = export.convert_fp16(export.export_graph(student, images, "logits", {0: "batch"}))
    onnx.checker.check_model(half, full_check=True)
    (answers,) = onnxruntime.InferenceSession(half.SerializeToString()).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(answers, student(images).detach().numpy(), atol=2e-3)


def test_functions_take_turns_until_each_has_been_called_often():
    calls = []
    seconds = latency.benchmark(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(2e-3))},
        min_calls=60, min_seconds=30,
    )  # fmt: skip
    assert len(seconds["a"]) >= 60 and len(seconds["b"]) >= 60
    assert all(1.9e-3 < t for t in seconds["b"]) and np.median(seconds["a"]) < 1e-3
    turns = [name for name, group in itertools.groupby(calls)]
    assert turns == ["a", "b"] * (len(turns) // 2) and len(turns) >= 4
    warm_up = len(calls) - len(seconds["a"]) - len(seconds["b"])
    assert len(turns) <= warm_up <= 5 * len(turns)  # which nobody counts; fewer where they took too long


def test_fidelity_by_hand_and_what_is_said_of_it():
    reference = torch.tensor([[2.0, 0], [0, 1], [3, 0], [0, 1]])
    other = torch.tensor([[2.0, 0.5], [0, 1], [0, 1], [1.5, 1]])
    labels = torch.tensor([0, 1, 0, 0])
    found = export.compare(reference, other, labels)
    assert found["max_abs_diff"] == 3 and found["mean_abs_diff"] == pytest.approx((0.5 + 4 + 1.5) / 8)
    assert found["top1_agreement"] == 0.5 and found["accuracy"]["mean"] == 0.75
    assert found["accuracy_change"]["mean"] == 0  # one lost, one won
    worse = export.compare(reference, reference.flip(1), torch.tensor([0, 1, 0, 1]))
    assert worse["accuracy_change"]["mean"] == -1
    assert export.verdict({"fp32": found, "int8": worse}).startswith("int8 LOSES accuracy: -100.0 [")
    assert "--query_dir" in export.verdict({"fp32": export.compare(reference, other)})


def test_the_verdict_says_what_so_many_images_can_show():
    """Where no answer changes, the score test of n images does not reject a loss of z^2 / (n + z^2)."""

    def changed(images, lost):
        before = torch.eye(2)[torch.zeros(images, dtype=torch.long)]
        after = torch.eye(2)[(torch.arange(images) < lost).long()]
        return export.compare(before, after, torch.zeros(images, dtype=torch.long))

    assert export.verdict({"fp32": changed(11, 0)}) == (
        "No loss above 0.5 points was seen, but 11 images cannot rule out one of 25.9: fp32."
    )
    assert export.verdict({"fp32": changed(1000, 0)}) == "Nothing loses more than 0.5 points of accuracy: fp32."
    said = export.verdict({"fp32": changed(100, 0), "fp16": changed(100, 2), "int8": changed(100, 20)})
    assert "fp16 may lose accuracy: -2.0 [" in said and "on 100 images, which cannot tell." in said
    assert "int8 LOSES accuracy: -20.0 [" in said and said.endswith("cannot rule out one of 3.7: fp32.")
