"""A student's ONNX file in ONNX Runtime."""

import onnx
import onnxruntime
import torch

from common.cli import refusing
from common.runtimes.base import Runtime


def metadata_of(path):
    """The metadata {name: JSON} that export.py wrote into an ONNX file."""
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


class OnnxRuntime(Runtime):
    """An ONNX file of export.py, else a UserError, on the CPU, or on a GPU where onnxruntime-gpu is installed."""

    suffix = ".onnx"

    @classmethod
    def sources(cls, student, device):
        return student.onnx if device.type == "cpu" or has_cuda_provider() else {}

    def __init__(self, path, device, num_threads=None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        # CPUs that keep denormals slow down many times on them.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and has_cuda_provider():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        with refusing(f"{path} is no ONNX file of export.py ({{error}}): export the model again."):
            metadata = metadata_of(path)
            if metadata.get("int8_for_tensorrt") == "true":
                # Q/DQ nodes to the letter: with 8-bit weights the integer kernels of many CPUs overflow.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            self.describe(metadata)

    def run(self, inputs):
        return torch.from_numpy(self.session.run(None, {"images": inputs.numpy()})[0])


def has_cuda_provider():
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
