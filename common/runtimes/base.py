"""What all runtimes have in common: how images become inputs and answers logits, and what export.py asks of each."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.cli import UserError, optional
from common.models import input_size, normalize, resize
from common.records import blaming, read_json


def as_input(model, images, includes_preprocessing):
    """Images [B, 3, H, W] in [0, 1] to what an exported graph takes: normalised float32 [B, 3, h, w], or uint8
    [B, h, w, 3] where the graph includes the preprocessing."""
    if includes_preprocessing:
        return resize(model, images).mul(255).round().byte().permute(0, 2, 3, 1).contiguous()
    return normalize(model, images)


def log_probabilities(probabilities):
    """Logarithms, of at least 1e-7, below which half precision is zero."""
    return probabilities.clamp_min(1e-7).log()


@dataclass
class Student:
    """A student that export.py is about to run everywhere.

    Attributes:
        model: the timm model, in eval mode, on the CPU. classes: its class names.
        onnx: {precision: ONNX file}, in the order in which they were asked for.
        examples: images [N, 3, h, w] in [0, 1] that int8's ranges come from.
        folder: where a runtime puts files of its own, and finds them. device: the best torch device here.
        options: those of export.py that a build may ask for (`batch_size`, `max_batch_size`, ...).
    """

    model: nn.Module
    classes: list
    onnx: dict
    examples: torch.Tensor
    folder: Path
    device: torch.device
    options: object


class Runtime:
    """A student in a runtime, callable like the PyTorch model: images [B, 3, H, W] in [0, 1] to logits
    [B, num_classes], or to the logarithms of the probabilities that its graph gives, on the images' device.

    A subclass gives `run`, and of the others those that differ. It sets `pretrained_cfg`, of which the input size, mean
    and deviation count, and `classes`, or calls `describe`.

    Attributes:
        module, title: what to import of an optional package, and its name in a message; None where there is none.
        suffix: of the names of the files that it opens; None where it takes a model.
        max_batch_size: the most images that `run` takes; exactly so many where `fixed`.
        includes_preprocessing: whether it takes uint8 images and gives probabilities.
    """

    module, title, suffix = None, None, None
    max_batch_size, fixed, includes_preprocessing = 256, False, False

    @classmethod
    def require(cls):
        """Raises a UserError, which says what to install, where the runtime cannot be imported."""
        if cls.module:
            optional(cls.module, cls.title)

    @classmethod
    def build(cls, student):
        """Writes the runtime's own file, where it has one, or raises a UserError."""

    @classmethod
    def sources(cls, student, device):
        """{precision: what `__init__` takes} of all that it can run of a student on a torch device."""
        raise NotImplementedError

    def __init__(self, source, device, num_threads=None):
        """`source`: a file, or one of the values of `sources`. `num_threads`: of the CPU, by default PyTorch's."""
        raise NotImplementedError

    def describe(self, metadata):
        """Takes the metadata that export.py wrote, {name: JSON}."""
        self.pretrained_cfg = json.loads(metadata["preprocessing"])
        self.classes = json.loads(metadata["classes"])
        self.includes_preprocessing = json.loads(metadata["includes_preprocessing"])
        batch_size = json.loads(metadata["batch_size"])
        if not isinstance(self.includes_preprocessing, bool) or not isinstance(batch_size or 1, int):
            raise ValueError("its metadata are damaged")
        self.fixed, self.max_batch_size = bool(batch_size), batch_size or self.max_batch_size
        normalize(self, torch.zeros(1, 3, *input_size(self)))  # which fails where numbers of it are none

    def describe_beside(self, path):
        """Takes the metadata from the file that export.py wrote beside `path`."""
        facts = Path(f"{path}.json")
        if not facts.is_file():
            raise UserError(f"{facts} is missing: export.py writes it beside the other file.")
        with blaming(facts):
            self.describe(read_json(facts))

    def prepare(self, images):
        """Images [B, 3, H, W] in [0, 1] to what `run` takes, a tensor on the CPU."""
        return as_input(self, images.cpu(), self.includes_preprocessing)

    def run(self, inputs):
        """The call that is timed: what `prepare` gives to logits or probabilities [B, num_classes], on the CPU."""
        raise NotImplementedError

    def __call__(self, images):
        answers = []
        for part in images.split(self.max_batch_size):
            missing = self.max_batch_size - len(part) if self.fixed else 0  # black images fill up a fixed batch
            padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            answers.append(self.run(self.prepare(padded))[: len(part)])
        answers = torch.cat(answers).float().to(images.device)
        return log_probabilities(answers) if self.includes_preprocessing else answers
