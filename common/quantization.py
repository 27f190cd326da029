"""A student's ONNX model in int8, for the kernels of ONNX Runtime and OpenVINO, or for those of TensorRT."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.onnx_model import OnnxModel

QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


class Calibration(CalibrationDataReader):
    """Feeds a numpy array to ONNX Runtime's calibration, in whole batches: the first inputs fill up the last."""

    def __init__(self, inputs, batch_size):
        count = -(-len(inputs) // batch_size)
        self.batches = ({"images": x} for x in np.resize(inputs, (count, batch_size, *inputs.shape[1:])))

    def get_next(self):
        return next(self.batches, None)


def convert_int8(fp32, inputs, batch_size, for_tensorrt=False):
    """The int8 edition of an ONNX model whose input is "images": explicit Q/DQ nodes around convolutions, matrix
    products, sums and poolings, symmetric, with weights per channel and biases in floating point. The answers stay in
    floating point: one that is surer than those on the inputs must not be cut off.

    ONNX Runtime computes in int8 where inputs and outputs are quantized, and many CPUs' sums of products overflow
    unless weights have 7 bits. TensorRT fuses a layer with what follows it if only its inputs are quantized, and takes
    8 bits. Each is slow or wrong with the other's file.

    Args:
        inputs: numpy array of inputs [N, ...], which the ranges come from. batch_size: how many the model takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, folded, quantized = (Path(folder) / f"{name}.onnx" for name in ("fp32", "folded", "int8"))
        onnx.save(fp32, given)  # a model in memory would be changed
        quant_pre_process(given, folded, skip_symbolic_shape=True)  # folds batch normalisation
        quantize_static(
            folded, quantized, Calibration(inputs, batch_size), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=QUANTIZED, nodes_to_exclude=float_sums(onnx.load(folded).graph),
            reduce_range=not for_tensorrt, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )  # fmt: skip
        int8 = onnx.load(quantized)
    leave_in_float(int8.graph, outputs_of_layers=for_tensorrt)
    OnnxModel(int8).prune_graph()
    if for_tensorrt:
        join_sums(int8.graph)
        OnnxModel(int8).prune_graph()
    return int8


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
