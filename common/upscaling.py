"""Support images at the size that a diffusion model takes, smaller ones by a super-resolution network if wanted."""

import torch
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as TF

from common.cli import UserError, optional, refusing
from common.images import load_image


def load_upscaler(path, device):
    """A super-resolution network, of images [1, 3, h, w], from a safetensors checkpoint that spandrel knows."""
    loader = optional("spandrel", "--upscaler").ModelLoader(device)
    with refusing(f"--upscaler {path} is no safetensors checkpoint that spandrel knows ({{error}})."):
        model = loader.load_from_state_dict(load_file(path))
    if getattr(model, "input_channels", None) != 3 or model.scale < 2:
        raise UserError(f"--upscaler {path} does not make RGB images larger: give a super-resolution checkpoint.")
    return model.eval()


@torch.no_grad()
def load_support(path, resolution, upscaler=None):
    """A support image [3, resolution, resolution] in [0, 1]; a smaller one is upscaled first, as often as it takes."""
    if upscaler is None:
        return load_image(path, resolution)
    image = load_image(path)
    while image.shape[-1] < resolution:
        image = upscaler(image[None].to(upscaler.device))[0].float().clamp(0, 1).cpu()
    return TF.resize(image, [resolution] * 2, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
