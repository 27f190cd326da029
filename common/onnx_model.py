"""An exported student in ONNX Runtime. The file's metadata say what it needs: class names, input size, mean, std."""

import json

import numpy as np
import onnxruntime
import torch

from common.cli import UserError
from common.models import normalize


class OnnxClassifier:
    """Callable like the PyTorch model: images [B, 3, H, W] in [0, 1] to logits [B, num_classes].

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
            self.provider = self.session.get_providers()[0]
        except Exception as error:  # ONNX Runtime raises kinds of its own
            raise UserError(f"{path} is no ONNX file of export.py ({error}): export the model again.") from error

    def run(self, inputs):
        """Normalised images [B, 3, h, w], float32, to logits [B, num_classes]: numpy arrays."""
        return self.session.run(["logits"], {"images": inputs})[0]

    def __call__(self, images):
        inputs = normalize(self, images.cpu()).numpy().astype(np.float32, copy=False)
        return torch.from_numpy(self.run(inputs)).to(images.device)
