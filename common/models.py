"""Classifiers: loading and saving timm models, what they see of an image, and cosine prototypes.

Every classifier here is a timm model, also those of common/architectures.py, and a trained one is a folder in the
Hugging Face hub's timm format (`config.json`, `model.safetensors`). Images are float [B, 3, H, W] in [0, 1], of any
size: `normalize` makes of them what a model wants.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from common import architectures, statistics
from common.cli import UserError, refusing
from common.images import load_folder
from common.memory import batch_bytes
from common.records import blaming, fingerprint, read_json, save_tensors, whole_file, write_file

PICKLE = ValueError("its weights are a pickle file, and only safetensors are read.")


def load_model(name_or_path, pretrained=True, image_size=None, checkpoint=None, **kwargs):
    """A timm model in eval mode from a model folder, a timm name, or a hub name (`hf-hub:...`), of its own input side
    or `image_size`. The weights of a safetensors file `checkpoint` replace the model's, but for the classifier's. A
    UserError says that it cannot be loaded, or takes no images of that side."""
    folder = Path(name_or_path)
    if str(name_or_path).startswith(("local-dir:", "hf_hub:")):  # timm's: no record would see the files
        raise UserError(f"{name_or_path}: give a folder without a prefix, or a name of the hub as hf-hub:NAME.")
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} is no model folder: it needs config.json and model.safetensors.")
        source = f"local-dir:{folder}"
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{folder}: no such folder.")
    else:
        source = name_or_path
    wanted = "a folder with config.json and model.safetensors, or a name that timm.list_models() knows"
    # timm unpickles where the hub has a model's weights in no safetensors file.
    with refusing(f"Cannot load {name_or_path} ({{error}}): give {wanted}."), patch("torch.load", side_effect=PICKLE):
        kwargs["pretrained"] = pretrained and not checkpoint
        model = timm.create_model(source, **kwargs)
        if image_size and hasattr(model, "set_input_size"):  # position embeddings, or a head, depend on it
            model.set_input_size(img_size=(image_size, image_size))
        elif image_size and get_model_input_config(model)["fixed_input_size"]:  # more than these does
            model = timm.create_model(source, img_size=image_size, **kwargs)
        if image_size:
            model.pretrained_cfg["input_size"] = (3, image_size, image_size)
    if checkpoint:
        load_weights(model, checkpoint)
    model.eval()
    size = model.pretrained_cfg.get("input_size")
    with torch.no_grad(), refusing(f"{name_or_path} takes no images of {size} ({{error}}): give another size."):
        with_head(model)(torch.zeros(1, 3, *input_size(model)))
    return model


def load_student(args, classes):
    """The student before training, with a new head for the classes, and whether it has been trained before.

    It has weights from a folder, the hub or --student_checkpoint, and by plain timm name random ones. Some networks do
    not come out of their file as timm makes them, FBNet with another epsilon of batch normalisation: what is trained is
    what comes out. A student that no file can hold as it is raises a UserError.
    """
    torch.manual_seed(args.seed)
    pretrained = Path(args.student).is_dir() or args.student.startswith("hf-hub:")
    size, checkpoint = args.student_image_size, args.student_checkpoint
    student = load_model(args.student, pretrained, size, checkpoint)
    student.reset_classifier(len(classes))
    with TemporaryDirectory() as folder:
        student = save_model(student, folder, classes, as_it_is=False)
        save_model(student, folder, classes)
    return student, pretrained or bool(checkpoint)


def load_weights(model, path):
    """Replaces a timm model's weights, but for its classifier's, by those of a safetensors file. Position embeddings of
    another input size are resampled, by timm's own filter of the architecture's checkpoints."""
    heads = model.pretrained_cfg["classifier"] or ()  # a name, or several
    heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
    name = model.pretrained_cfg.get("architecture", type(model).__name__)
    with refusing(f"{path} cannot be read as safetensors weights of {name} ({{error}})."):
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
        state = {k: v for k, v in adapt(load_file(path), model).items() if not k.startswith(heads)}
        absent, unknown = model.load_state_dict(state, strict=False)
        absent = [k for k in absent if not k.startswith(heads)]
        if absent or unknown:
            raise ValueError(f"it lacks {absent[:3]} and has {unknown[:3]} too many")


def is_ours(model):
    """Whether timm alone does not know the architecture: a copy of common/architectures.py then lies in its folder."""
    return type(model).__module__ == architectures.__name__


@torch.no_grad()
def save_model(model, folder, classes, as_it_is=True):
    """Writes `config.json` and `model.safetensors`, and returns what `timm.create_model("local-dir:FOLDER")` makes of
    them. A UserError says that it cannot, or, where the model is to come out `as_it_is`, that answers differ.

    Args:
        model: in eval mode, on the CPU. classes: the class names in the order of its outputs.
    """
    # What timm's own transform would cut away at the border, this project's models have learned from.
    config = {"input_size": (3, *input_size(model)), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
    with refusing(
        f"{model.pretrained_cfg['architecture']} at {input_size(model)[0]} pixels cannot be used, or not be saved as "
        "it is ({error}): choose another student or --student_image_size."
    ):
        with whole_file(Path(folder) / "config.json") as temporary:  # first: it says whose weights they are
            save_config_for_hf(model, temporary, {"label_names": list(classes)}, data_config=config)
        if is_ours(model):
            write_file(Path(folder) / "architectures.py", Path(architectures.__file__).read_bytes())
        save_tensors(Path(folder) / "model.safetensors", model.state_dict())
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if as_it_is:
            x = torch.randn(2, 3, *input_size(model), generator=torch.Generator().manual_seed(0))
            ours, theirs = model(x), loaded(x)
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item(), equal_nan=True)
            if input_size(loaded) != input_size(model):
                raise ValueError(f"its input would be of {input_size(loaded)} pixels")
    return loaded


def weights_of(name_or_path, checkpoint=None):
    """What tells a model in a record: a fingerprint of its files, None where the name alone says it."""
    files = [Path(name_or_path) / name for name in ("config.json", "model.safetensors")] + [Path(checkpoint or "")]
    files = [file for file in files if file.is_file()]
    return fingerprint(files) if files else None


def class_names(name_or_path):
    """The class names in a model folder's `config.json`, or None. A UserError says that the file is damaged."""
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        return None
    with blaming(path):
        config = read_json(path, dict)
        names = config.get("label_names")
        if names is not None and ([str(name) for name in names] != names or len(set(names)) < len(names)):
            raise ValueError("label_names should be a list of different words")
        if names is not None and config.get("num_classes", len(names)) != len(names):
            raise ValueError(f"it has {len(names)} label_names and {config['num_classes']} classes")
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
    weights = {name: x.detach() for name, x in model.named_parameters()}  # the counter takes no leaf as an input
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, weights, torch.zeros(1, 3, *input_size(model), device=next(model.parameters()).device))
    return counter.get_total_flops()


def resize(model, images):
    """Images [B, 3, H, W] in [0, 1] to the model's input size, antialiased, without timm's cropping by `crop_pct`."""
    if images.shape[-2:] == input_size(model):
        return images
    mode = "bilinear" if model.pretrained_cfg.get("interpolation") == "bilinear" else "bicubic"
    return F.interpolate(images, input_size(model), mode=mode, antialias=True).clamp(0, 1)


def normalize(model, images):
    """Images [B, 3, H, W] in [0, 1] to what the model's data configuration asks for: resized, minus mean, over std."""
    mean, std = (  # filled where the images are: numbers that are copied there would wait for a GPU
        torch.stack([images.new_full((1, 1), x) for x in model.pretrained_cfg[key]]) for key in ("mean", "std")
    )
    return (resize(model, images) - mean) / std


def features(model, images):
    """Images [B, 3, H, W] in [0, 1] to the features [B, D] that the model's classifier sees."""
    return model.forward_head(model.forward_features(normalize(model, images)), pre_logits=True)


@contextmanager
def classifier_inputs(model):
    """Inside, a list collects the features [B, D] that the model's classifier sees: of each, where it has several."""
    heads, seen = model.get_classifier(), []
    heads = heads if isinstance(heads, tuple | list | nn.ModuleList) else [heads]
    hooks = [head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1))) for head in heads]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def with_head(model):
    """Function of images [B, 3, H, W] in [0, 1] to the logits of the model's own head."""
    return lambda images: model(normalize(model, images))


def accuracy_on(folder, model, classifier, classes):
    """The accuracy, as `statistics.accuracy`, on a folder of a model, `classifier` being its function to logits."""
    images, labels, *_ = load_folder(folder, input_size(model)[0], classes)
    return statistics.accuracy(answers(classifier, images, f"classifying {folder}").argmax(-1) == labels)


def answering_bytes(model, count, trained=False):
    """The bytes of `count` images and their activations at the peak, where the model is; `trained`: gradients' too."""
    shape, parameters = (3, *input_size(model)), list(model.parameters())

    def answer(size):
        f = features(model, torch.zeros(size, *shape, device=parameters[0].device))
        if trained:
            torch.autograd.grad(f.sum(), parameters, allow_unused=True)

    with torch.set_grad_enabled(trained):
        return batch_bytes(answer, count)


@torch.inference_mode()
def answers(function, images, title, batch_size=16):
    """What a function of images [B, 3, h, w] gives for all [N, 3, h, w], with a bar of that title."""
    return torch.cat([function(batch) for batch in tqdm(images.split(batch_size), desc=title, unit="batch")])


def of_supports(model, folder, classes=None, batch_size=64):
    """A `PrototypeClassifier` of a folder of supports, and its classes."""
    supports, labels, classes, _ = load_folder(folder, input_size(model)[0], classes)
    supports = supports.to(next(model.parameters()).device)
    return PrototypeClassifier(model, supports, labels, batch_size=batch_size), classes


def cosine_prototypes(f, labels):
    """Centre m [D] and prototypes p [C, D] of features f [S, D]: the mean feature, and of each class the mean of its
    unit-length centred features, again of unit length. Labels [S] hold each of 0..C-1 at least once."""
    center = f.mean(0)
    unit = F.normalize(f - center, dim=-1)
    members = F.one_hot(labels.to(f.device)).to(f.dtype)
    return center, F.normalize((members / members.sum(0)).T @ unit, dim=-1)


@torch.no_grad()
def held_out_answers(f, labels):
    """The classes [S] that the prototypes of all others give features [S, D]; -1 where nothing else is of the class."""
    answers = torch.full_like(labels, -1)
    for i, others in enumerate(~torch.eye(len(f), dtype=torch.bool)):
        if (labels[others] == labels[i]).any():
            center, prototypes = cosine_prototypes(f[others], labels[others])
            answers[i] = (F.normalize(f[i] - center, dim=-1) @ prototypes.T).argmax()
    return answers


class PrototypeClassifier(nn.Module):
    """A backbone specialised on a support set by cosine prototypes (Snell et al., 1703.05175, with the cosine and
    the centring of SimpleShot, 1911.04623).

        logits_c(x) = scale * cos(f(x) - m, p_c)

    with p_c the mean of the unit-length centred features of class c, and m the mean support feature.

    Args:
        model: timm model; its classifier is not used.
        images, labels: supports [S, 3, H, W] in [0, 1] and their classes [S], each of 0..num_classes-1 at least once.
        scale: the inverse softmax temperature of cosine similarities. batch_size: supports that are seen together.
    """

    def __init__(self, model, images, labels, scale=10.0, batch_size=64):
        super().__init__()
        self.model, self.scale = model.eval(), scale
        self.pretrained_cfg = model.pretrained_cfg
        with torch.no_grad():
            f = torch.cat([features(model, batch) for batch in images.split(batch_size)])
            center, prototypes = cosine_prototypes(f, labels)
        self.support_features = f
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
