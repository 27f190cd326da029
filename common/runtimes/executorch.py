"""A student as an ExecuTorch program for phones and boards: one image at a time, on XNNPACK's kernels.

The file's facts, as those in the metadata of an ONNX file, stand beside it in `<file>.json`.
"""

import copy
import json
import logging
from pathlib import Path

import torch

from common.cli import refusing
from common.models import input_size
from common.preprocessing import WithPreprocessing
from common.records import write_file, write_json
from common.runtimes.base import Runtime, as_input
from common.runtimes.onnxruntime import metadata_of


def quantize(module, inputs, floating):
    """The int8 edition of a module by torchao's PT2E flow: weights per channel, ranges from the inputs.

    Args:
        inputs: tensor [N, ...], shown one by one. floating: set of the names of submodules that stay in floating point.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def is_quantized(node):
        return floating.isdisjoint(name for name, _ in node.meta.get("nn_module_stack", {}).values())

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(is_quantized)
    observed = prepare_pt2e(torch.export.export(module, (inputs[:1],)).module(), quantizer)
    for one in inputs.split(1):
        observed(one)
    return convert_pt2e(observed)


class ExecuTorch(Runtime):
    """A program, on the CPU. A UserError tells of no ExecuTorch, no program, or one without its facts."""

    module, title, suffix = "executorch.runtime", "ExecuTorch", ".pte"

    @classmethod
    @torch.no_grad()
    def build(cls, student):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        logging.getLogger("executorch").setLevel(logging.ERROR)  # of kernels that other programs would want
        model, preprocessing = copy.deepcopy(student.model), bool(student.options.include_preprocessing)
        heads, prefix = model.pretrained_cfg.get("classifier") or (), "model." if preprocessing else ""
        heads = {prefix + name for name in ([heads] if isinstance(heads, str) else heads)}
        inputs = as_input(model, student.examples, preprocessing)
        module = WithPreprocessing(model).eval() if preprocessing else model
        facts = metadata_of(student.onnx["fp32"]) | {"batch_size": "1", "image_size": json.dumps(input_size(model))}
        for precision, path in cls.sources(student, torch.device("cpu")).items():
            # An answer that is surer than those on the examples must not be cut off.
            edition = quantize(module, inputs, heads) if precision == "int8" else module
            exported = torch.export.export(edition, (inputs[:1],))
            program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
            write_file(path, program.buffer)
            write_json(f"{path}.json", facts)

    @classmethod
    def sources(cls, student, device):
        precisions = [name for name in ("fp32", "int8") if name in student.onnx] if device.type == "cpu" else []
        return {name: student.folder / f"student_{name}.pte" for name in precisions}

    def __init__(self, path, device, num_threads=None):
        self.require()
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Programs

        if num_threads and num_threads != portable_lib._threadpool_get_thread_count():  # before a program is loaded
            portable_lib._unsafe_reset_threadpool(num_threads)

        self.describe_beside(path)
        with refusing(f"{path} is no program for this ExecuTorch ({{error}}): export it again.", RuntimeError):
            self.program = Programs.get().load_program(Path(path))  # it has to outlive the method
            self.method = self.program.load_method("forward")

    def run(self, inputs):
        return self.method.execute([inputs])[0]
