"""A student's ONNX file in OpenVINO."""

import torch

from common.runtimes.base import Runtime
from common.runtimes.onnxruntime import metadata_of


class OpenVino(Runtime):
    """An ONNX file, on the CPU, in the precision that it has."""

    module, title = "openvino", "OpenVINO"

    @classmethod
    def sources(cls, student, device):
        if device.type != "cpu":
            return {}
        # 8-bit weights overflow there.
        return {precision: path for precision, path in student.onnx.items() if precision != "int8_tensorrt"}

    def __init__(self, path, device, num_threads=None):
        import openvino

        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY",  # else it may compute in half precision
            "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads(),
        }
        self.compiled = openvino.Core().compile_model(str(path), "CPU", config)
        self.describe(metadata_of(path))

    def run(self, inputs):
        return torch.from_numpy(self.compiled([inputs.numpy()])[0])
