"""An exported student, answering in ONNX Runtime or OpenVINO. The file's metadata say what it needs: class names, input
size, mean, std, batch size, and whether its graph does the preprocessing itself."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from common.cli import UserError
from common.models import normalize, resize


def as_input(model, images, includes_preprocessing):
    """Images [B, 3, H, W] in [0, 1] to a numpy array that an exported graph takes: normalised float32 [B, 3, h, w], or
    uint8 [B, h, w, 3] where the graph includes the preprocessing."""
    if includes_preprocessing:
        return resize(model, images).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return normalize(model, images).numpy().astype(np.float32, copy=False)


def log_probabilities(probabilities):
    """Logarithms, of at least 1e-7, below which half precision is zero."""
    return probabilities.clamp_min(1e-7).log()


class ExportedClassifier:
    """Callable like the PyTorch model: images [B, 3, H, W] in [0, 1] to logits [B, num_classes], or to the logarithms
    of the probabilities that the graph gives, on the images' device.

    A subclass calls `describe`, and gives `run`: inputs, as `prepare` makes them, of at most `max_batch_size` images
    (exactly so many where `fixed`), to logits or probabilities [B, num_classes]. Both are numpy arrays, or what a
    subclass says.
    """

    max_batch_size, fixed = 256, False

    def describe(self, metadata):
        """Takes the metadata that export.py wrote, {name: JSON}."""
        self.pretrained_cfg = json.loads(metadata["preprocessing"])
        self.classes = json.loads(metadata["classes"])
        self.includes_preprocessing = json.loads(metadata["includes_preprocessing"])
        batch_size = json.loads(metadata["batch_size"])
        if batch_size:
            self.max_batch_size, self.fixed = batch_size, True

    def prepare(self, images):
        return as_input(self, images.cpu(), self.includes_preprocessing)

    def __call__(self, images):
        answers = []
        for part in images.split(self.max_batch_size):
            missing = self.max_batch_size - len(part) if self.fixed else 0  # black images fill up a fixed batch
            padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            answers.append(torch.as_tensor(self.run(self.prepare(padded)))[: len(part)])
        answers = torch.cat(answers).float().to(images.device)
        return log_probabilities(answers) if self.includes_preprocessing else answers


class OnnxClassifier(ExportedClassifier):
    """An ONNX file in ONNX Runtime.

    Args:
        device: the torch device to run on; a GPU needs onnxruntime-gpu, else the CPU answers.
        num_threads: default PyTorch's.
    Raises:
        UserError: the file is no ONNX model, or not one of export.py.
    """

    def __init__(self, path, device, num_threads=None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        # CPUs that keep denormals slow down many times on them.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and has_cuda_provider():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            metadata = onnx.load(path, load_external_data=False).metadata_props
            if ("int8_for_tensorrt", "true") in [(entry.key, entry.value) for entry in metadata]:
                # Q/DQ nodes to the letter: with 8-bit weights the integer kernels of many CPUs overflow.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            self.describe(self.session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # ONNX Runtime raises kinds of its own
            raise UserError(f"{path} is no ONNX file of export.py ({error}): export the model again.") from error

    def run(self, inputs):
        return self.session.run(None, {"images": inputs})[0]


def has_cuda_provider():
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def import_openvino():
    """The module openvino.

    Raises:
        UserError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"OpenVINO cannot be imported ({error}): pip install openvino.") from error
    return openvino


class OpenVinoClassifier(ExportedClassifier):
    """An ONNX file of export.py in OpenVINO, on the CPU, in the precision that the file has.

    Args:
        num_threads: default PyTorch's.
    Raises:
        UserError: OpenVINO is not installed.
    """

    def __init__(self, path, num_threads=None):
        openvino = import_openvino()
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY",  # else it may compute in half precision
            "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads(),
        }
        self.compiled = openvino.Core().compile_model(str(Path(path)), "CPU", config)
        metadata = onnx.load(path, load_external_data=False).metadata_props
        self.describe({entry.key: entry.value for entry in metadata})

    def run(self, inputs):
        return self.compiled([inputs])[0]
