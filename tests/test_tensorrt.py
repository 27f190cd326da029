"""The exported graphs against what TensorRT's documentation says of operators, types and explicit quantization: it
cannot run here, and what it would refuse or run slowly has to be found by reading.

Sources, by these names below:
    operators: "Supported ONNX Operators" of ONNX-TensorRT, whose list is in data/tensorrt_operators.json.
    guide: TensorRT's developer guide, "Working with Quantized Types", "Explicit Quantization" and its "Q/DQ
        Layer-Placement Recommendations".
    api: TensorRT's Python API reference, 11.4.
    parser: ONNX-TensorRT's importers, `QuantDequantLinearHelper`.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.utils import reparameterize_model

import export
from common import models

PRECISIONS = ("fp32", "fp16", "int8", "int8_tensorrt")
STUDENTS = ("conv4_64", "tf_mobilenetv3_small_minimal_100")
DOCUMENT = json.loads((Path(__file__).parent / "data" / "tensorrt_operators.json").read_text())
TYPES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.DOUBLE: "FP64",
    TensorProto.INT8: "INT8", TensorProto.UINT8: "UINT8", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}  # fmt: skip
FLOATS = {"FP32", "FP16", "BF16"}
# TensorRT 10.0, which came before JetPack 6's 10.3, takes opsets 9 to 20 (operators, in the edition of 10.0); its ONNX
# releases, 1.16 and 1.17, know IR version 10. TensorRT 11 takes opsets 9 to 25 and ONNX 1.20 ("ONNX Opset Guide").
OPSETS, IR_VERSION = range(9, 21), 10
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
POOLING = {"AveragePool", "GlobalAveragePool"}  # quantizable; MaxPool and the next ones commute with quantization
COMMUTING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


class Graph:
    """A model with what the checks look up: constants, producers, consumers, and the type of each tensor."""

    def __init__(self, model):
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
        self.model, graph = model, model.graph
        self.nodes = graph.node
        self.ends = {value.name for value in [*graph.input, *graph.output]}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.used_by = {}
        for node in graph.node:
            for name in node.input:
                self.used_by.setdefault(name, []).append(node)
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.types = {value.name: TYPES.get(value.type.tensor_type.elem_type, "another type") for value in values}
        self.types |= {tensor.name: TYPES.get(tensor.data_type, "another type") for tensor in graph.initializer}

    def all(self, *kinds):
        return [node for node in self.nodes if node.op_type in kinds]

    def producer(self, name, kind=None):
        """The node that makes a tensor, if there is one and it is of that kind."""
        node = self.made_by.get(name)
        return node if node is not None and kind in (None, node.op_type) else None

    def quantized(self, name):
        """The tensor that a Q/DQ pair before `name` quantizes, the tensor of quantized constants, or None."""
        pair = self.producer(name, "DequantizeLinear")
        if pair is None:
            return None
        quantize = self.producer(pair.input[0], "QuantizeLinear")
        return pair.input[0] if quantize is None else quantize.input[0]


def attribute(node, name, default=None):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def operator_faults(model):
    """Operators, types and restrictions that TensorRT's parser does not take.

    operators: each operator is on the list, all its tensors are of the types there, axes of reductions are constants,
    poolings have no dilations and one output; uint8 only at the ends of the network; opset. api, `DataType.UINT8`:
    uint8 has to be converted before any other layer.
    """
    graph, faults = Graph(model), []
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset not in OPSETS or opset not in range(DOCUMENT["opsets"][0], DOCUMENT["opsets"][1] + 1):
        faults.append(f"opset {opset}")
    if model.ir_version > IR_VERSION:
        faults.append(f"IR version {model.ir_version}")
    for node in graph.nodes:
        allowed = DOCUMENT["operators"].get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if not allowed:
            faults.append(f"{node.op_type} is not supported")
            continue
        if node.op_type == "QuantizeLinear":
            allowed = [*allowed, "INT8"]
        if node.op_type == "DequantizeLinear":
            allowed = [*allowed, *FLOATS]
        kinds = [(name in graph.ends, graph.types[name]) for name in [*node.input, *node.output] if name]
        wrong = {kind for at_end, kind in kinds if kind not in allowed or (kind == "UINT8" and not at_end)}
        faults += [f"{node.op_type} of {kind}" for kind in wrong]
        if node.op_type.startswith("Reduce") and any(name not in graph.constants for name in node.input[1:]):
            faults.append(f"{node.op_type} over axes that are not constant")
        if node.op_type in ("MaxPool", "AveragePool"):
            if len(node.output) > 1 or set(attribute(node, "dilations", [1])) != {1}:
                faults.append(f"{node.op_type} with dilations or indices")
    return faults


def half_faults(model):
    """What is not in half precision between the ends of an fp16 graph, and casts elsewhere than there: in a strongly
    typed network each would be a layer of its own (guide; api, `ICastLayer`)."""
    graph = Graph(model)
    inside = [name for name in graph.types if name not in graph.ends]
    faults = [f"{name} is {graph.types[name]}" for name in inside if graph.types[name] in ("FP32", "FP64")]
    casts = [node for node in graph.all("Cast") if not {node.input[0], node.output[0]} & graph.ends]
    return faults + [f"Cast from {node.input[0]} to {node.output[0]}" for node in casts]


def quantization_faults(model):
    """What the parser refuses in Q/DQ nodes.

    parser: scales are positive; zero points are zeros, as many as scales; as many scales as the axis is long, or one;
    uint8 is not a quantized type. api, `IQuantizeLayer`: scales and zero points are constants when the engine is built.
    """
    graph, faults = Graph(model), []
    for node in graph.all("QuantizeLinear", "DequantizeLinear"):
        data, scale, *zero = node.input
        scales, zeros = graph.constants.get(scale), [graph.constants.get(name) for name in zero]
        if scales is None or any(values is None for values in zeros):
            faults.append("a scale or zero point that is no constant")
            continue
        if graph.types[scale] not in FLOATS or not (np.isfinite(scales).all() and (scales > 0).all()):
            faults.append("a scale that is not positive")
        if any((values != 0).any() for values in zeros):
            faults.append("a zero point that is not zero")
        if len(zeros) != 1 or zeros[0].dtype != np.int8 or zeros[0].size != scales.size:
            faults.append("a zero point that is not int8, or not one to a scale")
        if data in graph.constants and scales.size > 1:
            shape, axis = graph.constants[data].shape, attribute(node, "axis", 1)
            if axis >= len(shape) or shape[axis] != scales.size:
                faults.append("scales of another number than the axis has channels")
    return faults


def output_axis(node):
    """The axis of a layer's weight that its output channels are on."""
    return {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if attribute(node, "transB") else 1, "MatMul": -1}[node.op_type]


def placement_faults(model):
    """Q/DQ nodes where TensorRT cannot make one int8 layer of what they surround, or makes a less exact one.

    guide, recommendations: (1) all inputs of weighted layers are quantized, (2) activations per tensor and weights per
    output channel; (3) outputs of weighted layers are not quantized where an activation or the network's end follows;
    (4) the residual input of a sum is, (5) but not the convolution's, which separates the two; (6) a quantizable layer
    without weights, as a pooling, has a quantized output if it has a quantized input. Biases stay in floating point,
    in which int8 layers add them (guide, "Quantized Weights", wants weights alone). (7) Weights use all of int8: only
    CPUs gain by 7 bits.
    """
    graph, faults = Graph(model), []
    for node in graph.all(*WEIGHTED):
        if None in [graph.quantized(name) for name in node.input[:2]]:
            faults.append(f"1: {node.op_type} of an input that is not quantized")
            continue
        if any(name not in graph.constants or graph.types[name] not in FLOATS for name in node.input[2:]):
            faults.append(f"1: {node.op_type} with a quantized bias")
        pair = graph.made_by[node.input[1]]
        weight, scales = graph.constants.get(pair.input[0]), graph.constants[pair.input[1]]
        if weight is None or weight.dtype != np.int8:
            continue  # a product of activations
        axis, channels = output_axis(node) % weight.ndim, weight.shape[output_axis(node)]
        if scales.shape != (channels,) or attribute(pair, "axis", 1) % weight.ndim != axis:
            faults.append(f"2: {node.op_type} with weights that are not quantized per output channel")
        largest = np.abs(weight.astype(int)).max(tuple(i for i in range(weight.ndim) if i != axis))
        if ((largest != 127) & (largest != 0)).any():
            faults.append(f"7: {node.op_type} with weights of at most {largest.max()}")
    for node in graph.all("DequantizeLinear"):
        if graph.producer(node.input[0], "QuantizeLinear") is None:
            continue
        if graph.constants[node.input[1]].size != 1:
            faults.append("2: an activation quantized per channel")
        users = [user.op_type for user in graph.used_by.get(node.output[0], [])]
        if node.output[0] in graph.ends:
            users.append("the end")
        faults += [f"3: Q/DQ before {user}" for user in users if user not in WEIGHTED | POOLING | {"Add", "MaxPool"}]
    for node in graph.all("Add"):
        if graph.types[node.output[0]] not in FLOATS or set(node.input) & set(graph.constants):
            continue
        sources = [graph.quantized(name) for name in node.input]
        if sources == [None, None]:
            faults.append("4: a sum of two inputs that are not quantized")
        uses = [len(graph.used_by[name]) + len(graph.used_by.get(s, [])) for name, s in zip(node.input, sources)]
        lone = [s for s, count in zip(sources, uses) if count == 2 and graph.producer(s, "Conv") is not None]
        if None not in sources and lone:
            faults.append("5: a Q/DQ pair between a convolution and the sum that alone uses it")
    for node in graph.all(*POOLING):
        users = [node]
        while users and all(user.op_type in COMMUTING | POOLING for user in users):
            users = [user for node in users for user in graph.used_by.get(node.output[0], [])]
        if graph.quantized(node.input[0]) and any(user.op_type != "QuantizeLinear" for user in users):
            faults.append(f"6: {node.op_type} whose input is quantized and whose output is not")
    return faults


def write_files(name, folder, options=()):
    """What export.py writes of a student of random weights that has seen random images: {precision: model}."""
    torch.manual_seed(0)
    student = models.load_model(name, pretrained=False, image_size=64, num_classes=2)
    with torch.no_grad():
        student.train()(torch.randn(16, 3, 64, 64))
    args = export.parse_args(["--output_dir", str(folder), "--precision", *PRECISIONS, *options])
    images = torch.rand(24, 3, 64, 64)
    files = export.write_onnx(reparameterize_model(student.eval()), ["a", "b"], args, images)
    return {precision: onnx.load(path) for precision, path in files.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{(student, with preprocessing?, precision): model}. The second has residual sums and depthwise convolutions."""
    folder, found = tmp_path_factory.mktemp("tensorrt"), {}
    for name in STUDENTS:
        for preprocessing in (False, True):
            written = write_files(name, folder, ["--include_preprocessing", "model_size"] if preprocessing else [])
            found |= {(name, preprocessing, precision): model for precision, model in written.items()}
    return found


CASES = [(name, preprocessing) for name in STUDENTS for preprocessing in (False, True)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name, preprocessing", CASES)
def test_the_parser_takes_every_operator_and_type(exported, name, preprocessing, precision):
    assert not operator_faults(exported[name, preprocessing, precision])


@pytest.mark.parametrize("name", STUDENTS)
def test_preprocessing_adds_its_own_operators_alone(exported, name):
    """And no gather in the pooling's place, which PyTorch makes of images whose memory has another order of axes."""
    plain, camera = (Counter(node.op_type for node in exported[name, p, "fp32"].graph.node) for p in (False, True))
    assert camera - plain == Counter(["Cast", "Transpose", "Sub", "Div", "Softmax"]) and not plain - camera


@pytest.mark.parametrize("name, preprocessing", CASES)
def test_half_precision_from_end_to_end(exported, name, preprocessing):
    assert not half_faults(exported[name, preprocessing, "fp16"])


@pytest.mark.parametrize("precision", ["int8", "int8_tensorrt"])
@pytest.mark.parametrize("name, preprocessing", CASES)
def test_the_parser_takes_the_quantization(exported, name, preprocessing, precision):
    assert not quantization_faults(exported[name, preprocessing, precision])


@pytest.mark.parametrize("name, preprocessing", CASES)
def test_the_quantization_is_placed_as_recommended(exported, name, preprocessing):
    model = exported[name, preprocessing, "int8_tensorrt"]
    assert not placement_faults(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") >= kinds.count("Conv") + kinds.count("Gemm") - 1  # one feeds two, at most
    assert ("Add" in kinds) == (name == STUDENTS[1])


def test_the_file_for_cpus_is_another(exported):
    """ONNX Runtime wants pairs after convolutions too, and on CPUs without VNNI weights of 7 bits."""
    faults = placement_faults(exported[STUDENTS[1], False, "int8"])
    assert {fault[0] for fault in faults} == {"3", "5", "7"}


# From here on: each check finds what it is for, in a graph that is spoilt in one place.


def of_kind(model, kind, number=0):
    return [node for node in model.graph.node if node.op_type == kind][number]


def constant(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replace(model, name, values):
    constant(model, name).CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def insert(model, node, side, *kinds, **attributes):
    """Puts a chain of nodes before an input of `node`."""
    index, name = list(model.graph.node).index(node), node.input[side]
    for number, (kind, *others) in enumerate(kinds):
        made = f"{name}_{kind}_{number}_{side}"
        model.graph.node.insert(index + number, helper.make_node(kind, [name, *others], [made], **attributes))
        name = made
    node.input[side] = name


def pair_of(model, scale=0.1):
    """A Q/DQ pair for `insert`."""
    if not any(tensor.name == "a_scale" for tensor in model.graph.initializer):
        arrays = {"a_scale": np.float32(scale), "a_zero": np.int8(0)}
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items())
    return ("QuantizeLinear", "a_scale", "a_zero"), ("DequantizeLinear", "a_scale", "a_zero")


def weight_pair(model):
    """The DequantizeLinear of the last convolution's weights, which may have many channels but is not grouped."""
    conv = of_kind(model, "Conv", -1)
    return next(node for node in model.graph.node if conv.input[1] in node.output)


def spoil_zero_point(model):
    replace(model, of_kind(model, "QuantizeLinear").input[2], np.int8(3))


def spoil_unsigned(model):
    node = of_kind(model, "QuantizeLinear")
    for user in [n for n in model.graph.node if node.input[2] in n.input]:
        user.input[2] = "unsigned"
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(0), "unsigned"))


def spoil_scale(model):
    replace(model, of_kind(model, "QuantizeLinear").input[1], np.float32(0))


def spoil_constancy(model):
    name = of_kind(model, "QuantizeLinear").input[1]
    model.graph.initializer.remove(constant(model, name))
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))


def spoil_axis_length(model):
    for name, dtype in zip(weight_pair(model).input[1:], (np.float32, np.int8)):
        replace(model, name, np.full(5, dtype is np.float32, dtype))


def spoil_per_tensor(model):
    for name, value in zip(weight_pair(model).input[1:], (np.float32(0.01), np.int8(0))):
        replace(model, name, value)


def spoil_axis(model):
    """Quantized per input channel, of which there are as many scales."""
    node = weight_pair(model)
    channels = constant(model, node.input[0]).dims[1]
    next(a for a in node.attribute if a.name == "axis").i = 1
    for name, dtype in zip(node.input[1:], (np.float32, np.int8)):
        replace(model, name, np.full(channels, dtype is np.float32, dtype))


def spoil_range(model):
    name = weight_pair(model).input[0]
    replace(model, name, (numpy_helper.to_array(constant(model, name)) / 2).astype(np.int8))


def spoil_bias(model):
    insert(model, of_kind(model, "Conv"), 2, *pair_of(model))


def spoil_input(model):
    """Takes the pair before a convolution's activations away."""
    node = of_kind(model, "Conv", 1)
    graph = Graph(model)
    node.input[0] = graph.quantized(node.input[0])


def spoil_activation(model):
    insert(model, of_kind(model, "Relu"), 0, *pair_of(model))


def spoil_end(model):
    made = of_kind(model, "Gemm")
    made.output[0] = "unquantized"
    model.graph.node.append(helper.make_node("QuantizeLinear", ["unquantized", *pair_of(model)[0][1:]], ["q"]))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "a_scale", "a_zero"], ["logits"]))


def spoil_residual(model):
    node, graph = of_kind(model, "Add"), Graph(model)
    for side, name in enumerate(node.input):
        node.input[side] = graph.quantized(name) or name


def spoil_sum(model):
    node, graph = of_kind(model, "Add"), Graph(model)
    side = next(side for side, name in enumerate(node.input) if not graph.quantized(name))
    insert(model, node, side, *pair_of(model))


def spoil_pooling(model):
    """Quantizes the input of the mean over positions, made a pooling layer, and takes the pair after it away."""
    index, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "ReduceMean")
    pooling = helper.make_node("GlobalAveragePool", node.input[:1], node.output)
    model.graph.node.remove(node)
    model.graph.node.insert(index, pooling)
    pooled = model.graph.node[index]
    insert(model, pooled, 0, *pair_of(model))
    graph = Graph(model)
    heads = [n for n in graph.all("Conv", "Reshape", "Gemm") if graph.quantized(n.input[0]) == pooled.output[0]]
    for head in heads:
        head.input[0] = pooled.output[0]


def spoil_operator(model):
    of_kind(model, "Relu").op_type = "Bernoulli"


def spoil_domain(model):
    of_kind(model, "Relu").domain = "com.microsoft"
    model.graph.value_info.extend(onnx.shape_inference.infer_shapes(model).graph.value_info)


def spoil_double(model):
    insert(model, of_kind(model, "Relu"), 0, ("Cast",), to=TensorProto.DOUBLE)
    insert(model, of_kind(model, "Relu"), 0, ("Cast",), to=TensorProto.FLOAT)


def spoil_opset(model):
    model.opset_import[0].version = 21


def spoil_ir(model):
    model.ir_version = 11


def spoil_reduction(model):
    name = of_kind(model, "ReduceMean").input[1]
    value = numpy_helper.to_array(constant(model, name))
    model.graph.initializer.remove(constant(model, name))
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, value.shape))


def spoil_bytes(model):
    """Moves the axes of the uint8 images before they are converted, as PyTorch is easily told to."""
    cast, transpose = of_kind(model, "Cast"), of_kind(model, "Transpose")
    first, last = cast.input[0], transpose.output[0]
    transpose.input[0], cast.output[0] = first, last
    transpose.output[0] = cast.input[0] = "moved"
    nodes = [transpose, cast, *[n for n in model.graph.node if n not in (cast, transpose)]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def spoil_half(model):
    insert(model, of_kind(model, "Relu"), 0, ("Cast",), to=TensorProto.FLOAT)
    insert(model, of_kind(model, "Relu"), 0, ("Cast",), to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    "check, spoil, message",
    [
        (quantization_faults, spoil_zero_point, "a zero point that is not zero"),
        (quantization_faults, spoil_unsigned, "a zero point that is not int8, or not one to a scale"),
        (quantization_faults, spoil_scale, "a scale that is not positive"),
        (quantization_faults, spoil_constancy, "a scale or zero point that is no constant"),
        (quantization_faults, spoil_axis_length, "scales of another number than the axis has channels"),
        (placement_faults, spoil_input, "1: Conv of an input that is not quantized"),
        (placement_faults, spoil_bias, "1: Conv with a quantized bias"),
        (placement_faults, spoil_per_tensor, "2: Conv with weights that are not quantized per output channel"),
        (placement_faults, spoil_axis, "2: Conv with weights that are not quantized per output channel"),
        (placement_faults, spoil_activation, "3: Q/DQ before Relu"),
        (placement_faults, spoil_end, "3: Q/DQ before the end"),
        (placement_faults, spoil_residual, "4: a sum of two inputs that are not quantized"),
        (placement_faults, spoil_sum, "5: a Q/DQ pair between a convolution and the sum that alone uses it"),
        (placement_faults, spoil_pooling, "6: GlobalAveragePool whose input is quantized and whose output is not"),
        (placement_faults, spoil_range, "7: Conv with weights of at most 63"),
        (operator_faults, spoil_operator, "Bernoulli is not supported"),
        (operator_faults, spoil_domain, "Relu is not supported"),
        (operator_faults, spoil_double, "Cast of FP64"),
        (operator_faults, spoil_unsigned, "QuantizeLinear of UINT8"),
        (operator_faults, spoil_opset, "opset 21"),
        (operator_faults, spoil_ir, "IR version 11"),
        (operator_faults, spoil_reduction, "ReduceMean over axes that are not constant"),
    ],
)
def test_a_spoilt_graph_is_found(exported, check, spoil, message):
    model = onnx.ModelProto.FromString(exported[STUDENTS[1], False, "int8_tensorrt"].SerializeToString())
    assert not check(model)
    spoil(model)
    assert message in check(model)


def test_bytes_that_are_moved_before_they_are_converted_are_found(exported):
    model = onnx.ModelProto.FromString(exported[STUDENTS[0], True, "fp32"].SerializeToString())
    spoil_bytes(model)
    assert "Transpose of UINT8" in operator_faults(model)


def test_single_precision_amid_half_is_found(exported):
    model = onnx.ModelProto.FromString(exported[STUDENTS[0], False, "fp16"].SerializeToString())
    spoil_half(model)
    faults = half_faults(model)
    assert any("is FP32" in fault for fault in faults) and any(fault.startswith("Cast from") for fault in faults)
