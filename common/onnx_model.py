"""An exported student in ONNX Runtime. The file's metadata say what it needs: class names, input size, mean, std, and
whether its graph does the preprocessing itself."""

import json

import numpy as np
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


class OnnxClassifier:
    """Callable like the PyTorch model: images [B, 3, H, W] in [0, 1] to logits [B, num_classes], or to the logarithms
    of the probabilities that the graph gives.

    Args:
        device: the torch device to run on; a GPU needs onnxruntime-gpu, else the CPU answers.
    Raises:
        UserError: the file is no ONNX model, or not one of export.py.
    """

    def __init__(self, path, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # CPUs that keep denormals slow down many times on them.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.pretrained_cfg = json.loads(metadata["preprocessing"])
            self.classes = json.loads(metadata["classes"])
            self.includes_preprocessing = json.loads(metadata["includes_preprocessing"])
            self.batch_size = json.loads(metadata["batch_size"])
            self.provider = self.session.get_providers()[0]
        except Exception as error:  # ONNX Runtime raises kinds of its own
            raise UserError(f"{path} is no ONNX file of export.py ({error}): export the model again.") from error

    def run(self, inputs):
        """Inputs, as `as_input` makes them, to logits or probabilities [B, num_classes]: numpy arrays."""
        return self.session.run(None, {"images": inputs})[0]

    def __call__(self, images):
        inputs = as_input(self, images.cpu(), self.includes_preprocessing)
        step = self.batch_size or len(inputs)
        answers = []
        for start in range(0, len(inputs), step):  # a graph of fixed batch size gets zeros where images are missing
            part = inputs[start : start + step]
            missing = step - len(part)
            padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
            answers.append(torch.from_numpy(self.run(padded)[: len(part)]))
        answers = torch.cat(answers).to(images.device)
        return log_probabilities(answers) if self.includes_preprocessing else answers
