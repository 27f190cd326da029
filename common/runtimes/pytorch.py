"""A student in PyTorch, as it is or compiled."""

import copy

import torch

from common.runtimes.base import Runtime


class PyTorch(Runtime):
    """A timm model."""

    max_batch_size = 64

    @classmethod
    def sources(cls, student, device):
        return {"fp32": student.model}

    def __init__(self, model, device, num_threads=None):
        self.model, self.device = copy.deepcopy(model).to(device), device  # another device may have the original
        self.pretrained_cfg, self.function = model.pretrained_cfg, self.model

    @torch.inference_mode()
    def run(self, inputs):
        return self.function(inputs.to(self.device)).cpu()


class Compiled(PyTorch):
    """A timm model under torch.compile."""

    def __init__(self, model, device, num_threads=None):
        super().__init__(model, device)
        # Threads are for the caller to choose, not for the compiler.
        options = {"cpp.dynamic_threads": True} if device.type == "cpu" else None
        self.function = torch.compile(self.model, options=options)
