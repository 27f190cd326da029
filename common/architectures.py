"""This project's own architectures as timm models: `timm.create_model("conv4_64")` works once this file is imported.

It needs torch and timm alone, and a copy of it lies in the folder of each trained model of such an architecture.
"""

import itertools

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import update_model_input_size
from torch import nn


class FlatHead(nn.Module):
    """timm's interface to a network that ends in a flattened feature map and one linear layer.

    Args:
        blocks: of [B, 3, *img_size] to a map of `channels` and a `stride`-th of the side; to one position without it.
    """

    def __init__(self, blocks, channels, num_classes, img_size, stride=None):
        super().__init__()
        self.blocks, self.channels, self.stride = blocks, channels, stride
        self.num_features = self.head_hidden_size = self.width(img_size)
        self.reset_classifier(num_classes)

    def width(self, img_size):
        height, width = to_2tuple(img_size)
        return self.channels * ((height // self.stride) * (width // self.stride) if self.stride else 1)

    def set_input_size(self, img_size):
        """Takes another input side, as timm's transformers do. The head starts anew where its width changes."""
        if self.width(img_size) != self.num_features:
            self.num_features = self.head_hidden_size = self.width(img_size)
            self.reset_classifier(self.num_classes)
        update_model_input_size(self, img_size)

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return self.blocks(x)

    def forward_head(self, x, pre_logits=False):
        x = x.flatten(1)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Conv4(FlatHead):
    """The four-block convolutional network of the few-shot literature (Vinyals et al., 1606.04080, section 4.1).

    Each block is a 3x3 convolution with `width` channels, batch normalisation, ReLU and 2x2 max pooling. With 64
    channels it has 113,088 parameters without the head, which sees 64 * (img_size / 16)^2 features: 256 for 32x32
    inputs, 1600 for 84x84.
    """

    def __init__(self, num_classes=1000, in_chans=3, img_size=32, width=64):
        channels = [in_chans, width, width, width, width]
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in itertools.pairwise(channels)
        ]
        super().__init__(nn.Sequential(*blocks), width, num_classes, img_size, 16)


class InkMap(nn.Module):
    """Colour image [B, 3, H, W] to ink map [B, 1, H, W]: distance to the border's median colour, at most 1.

    A drawing's colours and polarity say nothing about its class; the map forgets them.
    """

    def forward(self, x):
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)
        median = border.sort(2).values[:, :, (border.shape[2] - 1) // 2]  # `median` has no deterministic form on GPUs
        distance = ((x - median[..., None, None]) ** 2).sum(1, keepdim=True).add(1e-6).sqrt()
        return distance / distance.amax((1, 2, 3), keepdim=True).clamp_min(0.1)


class InkLite(FlatHead):
    """The embedded teacher: the first five of EfficientNet-Lite0's seven stages (Tan and Le, 1905.11946, in the edition
    without squeeze-and-excitation), on the ink map. 0.7 million parameters without the head, which sees
    112 * (img_size / 16)^2 features: 1792 for 64x64 inputs.
    """

    def __init__(self, num_classes=1000, in_chans=3, img_size=64):
        whole = timm.create_model("tf_efficientnet_lite0", in_chans=1)
        blocks = nn.Sequential(InkMap(), whole.conv_stem, whole.bn1, *whole.blocks[:5])
        super().__init__(blocks, 112, num_classes, img_size, 16)


class DropBlock(nn.Module):
    """DropBlock (Ghiasi et al., 1810.12890, algorithm 1): in training, squares of `size` positions, of each channel by
    itself, become zero, and the rest grows to the same sum. The squares lie within the map; on a map smaller than one
    they are 2x2, as MetaOptNet has them for 32x32 inputs."""

    def __init__(self, rate, size):
        super().__init__()
        self.rate, self.size = rate, size

    def forward(self, x):
        if not self.training:
            return x
        height, width = x.shape[-2:]
        size = min(self.size if min(height, width) >= self.size else 2, height, width)
        places = height - size + 1, width - size + 1
        gamma = self.rate / size**2 * height * width / (places[0] * places[1])
        corners = torch.full((*x.shape[:2], *places), gamma, device=x.device).bernoulli()
        kept = 1 - F.max_pool2d(F.pad(corners, [size - 1] * 4), size, stride=1)
        return x * (kept * kept.numel() / kept.sum().clamp_min(1)).to(x.dtype)


class ResNet12Block(nn.Module):
    """Three 3x3 convolutions, and a 1x1 one past them; then 2x2 max pooling, and DropBlock in training."""

    def __init__(self, in_chans, out_chans, drop_block, drop_rate):
        super().__init__()
        channels = [in_chans, out_chans, out_chans, out_chans]
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))
            for i, o in itertools.pairwise(channels)
        ]
        layers[-1] = layers[-1][:2]  # its activation comes after the addition
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(in_chans, out_chans, 1, bias=False), nn.BatchNorm2d(out_chans))
        self.pool = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))
        self.drop = DropBlock(drop_rate, 5) if drop_block else nn.Dropout(drop_rate)

    def forward(self, x):
        return self.drop(self.pool(self.convolutions(x) + self.shortcut(x)))


class ResNet12(FlatHead):
    """The residual network of the few-shot literature in the form of MetaOptNet (Lee et al., 1904.03758;
    after TADAM, 1805.10123): four blocks of 64, 160, 320 and 640 channels, leaky ReLU, dropout after the first two and
    DropBlock of 5x5 after the last two, at its full rate from the first batch on (theirs grows over 40,000); then the
    mean over positions, as in RFS (2003.11539). It has 12,424,320 parameters without the head, which sees 640 features,
    whatever the input's size.
    """

    def __init__(self, num_classes=1000, in_chans=3, img_size=84, drop_rate=0.1):
        channels = [in_chans, 64, 160, 320, 640]
        blocks = [
            ResNet12Block(i, o, depth >= 2, drop_rate) for depth, (i, o) in enumerate(itertools.pairwise(channels))
        ]
        super().__init__(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)), 640, num_classes, img_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


CONFIG = {
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 32, 32), "interpolation": "bicubic",
    "crop_pct": 1.0, "num_classes": 1000, "classifier": "head", "first_conv": "blocks.0.0",
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "conv4_32": CONFIG,
        "conv4_64": CONFIG,
        "resnet12": CONFIG | {"first_conv": "blocks.0.convolutions.0.0", "input_size": (3, 84, 84)},
        "ink_lite": CONFIG | {"first_conv": None, "input_size": (3, 64, 64)},
    }
)


@register_model
def conv4_32(pretrained=False, **kwargs):
    return build_model_with_cfg(Conv4, "conv4_32", pretrained, **{"width": 32} | kwargs)


@register_model
def conv4_64(pretrained=False, **kwargs):
    return build_model_with_cfg(Conv4, "conv4_64", pretrained, **kwargs)


@register_model
def resnet12(pretrained=False, **kwargs):
    return build_model_with_cfg(ResNet12, "resnet12", pretrained, **kwargs)


@register_model
def ink_lite(pretrained=False, **kwargs):
    return build_model_with_cfg(InkLite, "ink_lite", pretrained, **kwargs)
