"""Imported before a process forks into scripts: what their libraries import no sooner than it is used takes seconds."""

import io

import matplotlib.backends.backend_svg  # noqa: F401
import torch
from diffusers import StableDiffusionPipeline

import demo  # noqa: F401
import distill  # noqa: F401
import evaluate  # noqa: F401
import export  # noqa: F401
import tint_generate  # noqa: F401
import tint_invert  # noqa: F401
from tests import ROOT

StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "mini-sd", safety_checker=None, use_safetensors=True)
torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.zeros(2, 1),), io.BytesIO(), dynamo=True, verbose=False)
