"""Preprocessing as part of a student's graph: what a camera gives, uint8 images, to probabilities."""

import torch
from torch import nn


class WithPreprocessing(nn.Module):
    """What a camera needs: images uint8 [B, H, W, 3], of the model's input size, to probabilities [B, num_classes]."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(model.pretrained_cfg[key])[:, None, None])

    def forward(self, images):
        # TensorRT's one layer for uint8 is the conversion; and unless memory follows the order of the axes, the pooling
        # of some models becomes a gather.
        x = images.float().permute(0, 3, 1, 2).contiguous()
        return self.model((x - self.mean) / self.std).softmax(-1)


def bicubic(line, side, count):
    """The weights [count, N] that resample the middle of a line of N pixels, as Pillow does: Keys' kernel (a = -0.5),
    widened to the distance of the results where that is larger. Pixels beside the middle count where they exist.

    Args:
        line: N ones. side: length of the middle, a tensor: lengths are known when the graph runs.
    """
    step = side / count
    centers = (line.sum() - side) / 2 + (torch.arange(count, device=line.device) + 0.5) * step
    x = (line.cumsum(0) - 0.5 - centers[:, None]).abs() / step.clamp_min(1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


class CentralSquare(nn.Module):
    """`common.images.square` as a graph: uint8 images [B, H, W, 3] of any height and width to [B, h, w, 3].

    Resampling is a product of matrices for the columns and one for the rows, each rounded to 8 bits. Pillow begins with
    the rows where these shrink by more than twice as many pixels; there hard edges differ, by up to 12 of 255.
    """

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float()
        column, row = torch.ones_like(x[0, 0, :, 0]), torch.ones_like(x[0, 0, 0])
        side = torch.minimum(column.sum(), row.sum())
        x = to_8_bits(x @ bicubic(row, side, self.size[1]).T)
        x = to_8_bits(bicubic(column, side, self.size[0]) @ x)
        return x.permute(0, 2, 3, 1).byte()


def to_8_bits(x):
    return (x + 0.5).floor().clamp(0, 255)
