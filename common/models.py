"""Classifiers: the embedded student and teacher as timm models, loading, and cosine prototypes.

Every classifier here is a timm model, also our own two: `timm.create_model("conv4_64")` works once this module is
imported, and a trained model is a folder in the Hugging Face hub's timm format (`config.json`,
`model.safetensors`). Images are float [B, 3, H, W] in [0, 1], of any size: `normalize` makes of them what a model
wants.
"""

import itertools
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._hub import save_config_for_hf
from timm.models._input import update_model_input_size
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.cli import UserError
from common.records import fingerprint, save_tensors, whole_file


class FlatHead(nn.Module):
    """timm's interface to a network that ends in a flattened feature map and one linear layer.

    A subclass gives `blocks`, whose output on [B, 3, img_size, img_size] flattens to `num_features` numbers.
    """

    def __init__(self, blocks, num_features, num_classes):
        super().__init__()
        self.blocks = blocks
        self.num_features = self.head_hidden_size = num_features
        self.reset_classifier(num_classes)

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


class FlatMap(FlatHead):
    """A FlatHead whose `blocks` end in a map of `channels` and a sixteenth of the input's side: the head's width
    depends on it."""

    def __init__(self, blocks, channels, img_size, num_classes):
        self.channels = channels
        super().__init__(blocks, self.width(img_size), num_classes)

    def width(self, img_size):
        height, width = to_2tuple(img_size)
        return self.channels * (height // 16) * (width // 16)

    def set_input_size(self, img_size):
        """As timm's transformers: takes another input side, or height and width. The head starts anew where its width
        changes."""
        if self.width(img_size) != self.num_features:
            self.num_features = self.head_hidden_size = self.width(img_size)
            self.reset_classifier(self.num_classes)
        update_model_input_size(self, img_size)


class Conv4(FlatMap):
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
        super().__init__(nn.Sequential(*blocks), width, img_size, num_classes)


class InkMap(nn.Module):
    """Colour image [B, 3, H, W] to ink map [B, 1, H, W]: distance to the border's median colour, at most 1.

    A drawing's colours and polarity say nothing about its class; the map forgets them.
    """

    def forward(self, x):
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
        distance = ((x - border[..., None, None]) ** 2).sum(1, keepdim=True).add(1e-6).sqrt()
        return distance / distance.amax((1, 2, 3), keepdim=True).clamp_min(0.1)


class InkLite(FlatMap):
    """The embedded teacher: the first five of EfficientNet-Lite0's seven stages (Tan and Le, 1905.11946, in the edition
    without squeeze-and-excitation), on the ink map. 0.7 million parameters without the head, which sees
    112 * (img_size / 16)^2 features: 1792 for 64x64 inputs.
    """

    def __init__(self, num_classes=1000, in_chans=3, img_size=64):
        whole = timm.create_model("tf_efficientnet_lite0", in_chans=1)
        blocks = nn.Sequential(InkMap(), whole.conv_stem, whole.bn1, *whole.blocks[:5])
        super().__init__(blocks, 112, img_size, num_classes)


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

    def __init__(self, num_classes=1000, in_chans=3, drop_rate=0.1):
        channels = [in_chans, 64, 160, 320, 640]
        blocks = [
            ResNet12Block(i, o, depth >= 2, drop_rate) for depth, (i, o) in enumerate(itertools.pairwise(channels))
        ]
        super().__init__(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)), 640, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


CONFIG = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "num_classes": 1000,
    "classifier": "head",
    "first_conv": "blocks.0.0",
}
default_cfgs = generate_default_cfgs(
    {
        "conv4_64": CONFIG,
        "resnet12": CONFIG | {"first_conv": "blocks.0.convolutions.0.0", "input_size": (3, 84, 84)},
        "ink_lite": CONFIG | {"first_conv": None, "input_size": (3, 64, 64)},
    }
)


@register_model
def conv4_64(pretrained=False, **kwargs):
    return build_model_with_cfg(Conv4, "conv4_64", pretrained, **kwargs)


@register_model
def resnet12(pretrained=False, **kwargs):
    return build_model_with_cfg(ResNet12, "resnet12", pretrained, **kwargs)


@register_model
def ink_lite(pretrained=False, **kwargs):
    return build_model_with_cfg(InkLite, "ink_lite", pretrained, **kwargs)


@contextmanager
def no_unpickling():
    """Inside, torch.load refuses: timm falls back to it where the hub has a model's weights in no safetensors file."""

    def refuse(*args, **kwargs):
        raise ValueError("its weights are a pickle file, and only safetensors are read.")

    load, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = load


def load_model(name_or_path, pretrained=True, image_size=None, checkpoint=None, **kwargs):
    """A timm model in eval mode from a model folder, a timm name, or a hub name (`hf-hub:...`).

    Args:
        image_size: input side, default the model's own.
        checkpoint: a safetensors file whose weights replace the model's, but for the classifier's.
    Raises:
        UserError: no such folder or model, a folder without a loadable model, or a checkpoint of another architecture.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} is no model folder: it needs config.json and model.safetensors.")
        source = f"local-dir:{folder}"
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{folder}: no such folder.")
    else:
        source = name_or_path
    try:
        with no_unpickling():
            model = timm.create_model(source, pretrained=pretrained and not checkpoint, **kwargs).eval()
        if image_size:
            if hasattr(model, "set_input_size"):  # position embeddings, or a head, depend on it
                model.set_input_size(img_size=(image_size, image_size))
            model.pretrained_cfg["input_size"] = (3, image_size, image_size)
    except Exception as error:  # timm, safetensors, json and the hub each raise their own kinds
        raise UserError(
            f"Cannot load the model {name_or_path}: {error}\nGive a folder with config.json and model.safetensors, "
            "or a name that timm.list_models() knows."
        ) from error
    if checkpoint:
        load_weights(model, checkpoint)
    return model


def load_student(args, num_classes):
    """The student before training, with a new head for `num_classes` classes, and whether it has been trained before.

    It has weights from a folder, the hub or --student_checkpoint, and by plain timm name random ones.
    """
    torch.manual_seed(args.seed)
    pretrained = Path(args.student).is_dir() or args.student.startswith("hf-hub:")
    size, checkpoint = args.student_image_size, args.student_checkpoint
    student = load_model(args.student, pretrained, size, checkpoint)
    student.reset_classifier(num_classes)
    return student, pretrained or bool(checkpoint)


def load_weights(model, path):
    """Replaces a timm model's weights, but for its classifier's, by those of a safetensors file. Position embeddings of
    another input size are resampled, by timm's own filter of the architecture's checkpoints."""
    heads = model.pretrained_cfg["classifier"]
    heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads or []))
    try:
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
        state = {k: v for k, v in adapt(load_file(path), model).items() if not k.startswith(heads)}
        absent, unknown = model.load_state_dict(state, strict=False)
        absent = [k for k in absent if not k.startswith(heads)]
        if absent or unknown:
            raise ValueError(f"it lacks {absent[:3]} and has {unknown[:3]} too many")
    except Exception as error:  # a filter of timm's raises any kind on what is of another architecture
        name = model.pretrained_cfg.get("architecture", type(model).__name__)
        raise UserError(f"{path} cannot be read as safetensors weights of {name}: {error}") from error


def save_model(model, folder, classes):
    """Writes `config.json` and `model.safetensors`, loadable with `timm.create_model("local-dir:FOLDER")`.

    Args:
        classes: the class names in the order of the model's outputs.
    """
    save_tensors(Path(folder) / "model.safetensors", model.state_dict())
    with whole_file(Path(folder) / "config.json") as temporary:
        save_config_for_hf(model, temporary, {"label_names": list(classes)})


def weights_of(name_or_path, checkpoint=None):
    """What tells a model's weights in a record: a fingerprint of their file, None where the name alone says it."""
    file = Path(checkpoint or Path(name_or_path) / "model.safetensors")
    return fingerprint([file]) if file.is_file() else None


def class_names(name_or_path):
    """The class names in a model folder's `config.json`, or None.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        names = config.get("label_names")
        if names is not None and [str(name) for name in names] != names:
            raise ValueError("label_names should be a list of words")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): distil the student again, or copy the file anew.") from error
    return names


def input_size(model):
    """(height, width) of the model's input."""
    return tuple(model.pretrained_cfg["input_size"][1:])


def memory_format(model):
    """The memory format to train a model in: channels_last, in which convolutions are fastest, unless one of them is
    strided, 1x1 and of fewer than 8 channels, as RepVGG's first: on CPUs without AVX-512 its gradient is wrong there,
    crashes or never ends (oneDNN's issue 6035)."""
    unsafe = (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) != module.stride and module.in_channels < 8
        for module in model.modules()
    )
    return torch.contiguous_format if any(unsafe) else torch.channels_last


def count_flops(model):
    """Operations of one image, multiplications and additions, by PyTorch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *input_size(model), device=next(model.parameters()).device))
    return counter.get_total_flops()


def resize(model, images):
    """Images [B, 3, H, W] in [0, 1] to the model's input size, with antialiasing. Nothing is cropped away at the
    border, as timm's `crop_pct` would."""
    if images.shape[-2:] == input_size(model):
        return images
    mode = "bilinear" if model.pretrained_cfg.get("interpolation") == "bilinear" else "bicubic"
    return F.interpolate(images, input_size(model), mode=mode, antialias=True).clamp(0, 1)


def normalize(model, images):
    """Images [B, 3, H, W] in [0, 1] to the input that the model's data configuration asks for: resized, minus mean,
    over std."""
    mean, std = (images.new_tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (resize(model, images) - mean) / std


def features(model, images):
    """Images [B, 3, H, W] in [0, 1] to the features [B, D] that the model's classifier sees."""
    return model.forward_head(model.forward_features(normalize(model, images)), pre_logits=True)


def with_head(model):
    """Function of images [B, 3, H, W] in [0, 1] to the logits of the model's own head."""
    return lambda images: model(normalize(model, images))


def cosine_prototypes(f, labels):
    """Centre m [D] and prototypes p [C, D] of features f [S, D]: the mean feature, and of each class the mean of its
    unit-length centred features, again of unit length. Labels [S] hold each of 0..C-1 at least once."""
    center = f.mean(0)
    unit = F.normalize(f - center, dim=-1)
    members = F.one_hot(labels.to(f.device)).to(f.dtype)
    return center, F.normalize((members / members.sum(0)).T @ unit, dim=-1)


class PrototypeClassifier(nn.Module):
    """A backbone specialised on a support set by cosine prototypes (Snell et al., 1703.05175, with the cosine and
    the centring of SimpleShot, 1911.04623).

        logits_c(x) = scale * cos(f(x) - m, p_c)

    with p_c the mean of the unit-length centred features of class c, and m the mean support feature.

    Args:
        model: timm model; its classifier is not used.
        images: support images [S, 3, H, W] in [0, 1].
        labels: their classes [S], each of 0..num_classes-1 at least once.
        scale: the inverse softmax temperature of cosine similarities.
    """

    def __init__(self, model, images, labels, scale=10.0):
        super().__init__()
        self.model, self.scale = model.eval(), scale
        self.pretrained_cfg = model.pretrained_cfg
        with torch.no_grad():
            f = torch.cat([features(model, batch) for batch in images.split(64)])
            center, prototypes = cosine_prototypes(f, labels)
        self.register_buffer("center", center)
        self.register_buffer("prototypes", prototypes)
        self.spread = max((f - center).norm(dim=-1).mean().item(), 1e-6)  # equal supports have none

    def embed(self, images):
        """Images [B, 3, H, W] in [0, 1] to centred features of unit length [B, D]."""
        return F.normalize(features(self.model, images) - self.center, dim=-1)

    def classify(self, embedding):
        """What `embed` gives, [B, D], to logits [B, num_classes]."""
        return self.scale * embedding @ self.prototypes.T

    def forward(self, images):
        """Images [B, 3, H, W] in [0, 1] to logits [B, num_classes]."""
        return self.classify(self.embed(images))
