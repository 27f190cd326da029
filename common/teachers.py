"""A backbone specialised on a support set: cosine prototypes, and two ways of training on augmented supports.

Both ways start at the prototypes. Their learning rate is chosen on augmented views of supports that were held out, zero
being among the choices: views of supports that were trained on would speak for the strongest overfit.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from common.images import as_tensor, square
from common.models import PrototypeClassifier, cosine_prototypes, features, input_size, memory_format
from common.processes import generator, seeded

SPECIALISATIONS = ("prototypes", "linear_probe", "fine_tune")
LEARNING_RATES = {"linear_probe": (0, 1e-4, 1e-3, 1e-2), "fine_tune": (0, 1e-5, 1e-4, 1e-3)}


class LinearProbe(PrototypeClassifier):
    """logits = scale * (W embed(x) + b) on the frozen backbone; W starts at the prototypes and b at zero."""

    def __init__(self, model, images, labels, scale=10.0):
        super().__init__(model, images, labels, scale)
        self.linear = nn.Linear(*self.prototypes.T.shape, device=self.prototypes.device)
        with torch.no_grad():
            self.linear.weight.copy_(self.prototypes)
            self.linear.bias.zero_()

    def classify(self, embedding):
        return self.scale * self.linear(embedding)


def linear_probe(classifier, views, supports, labels, learning_rate, steps):
    """Trains the linear layer of a copy of a LinearProbe on augmented supports by cross-entropy.

    Args:
        views: function of a step's number to augmented `supports` [S, 3, H, W] in [0, 1]. labels: [S].
    """
    classifier = copy.deepcopy(classifier)
    optimizer = torch.optim.AdamW(classifier.linear.parameters(), learning_rate)
    for step in range(steps):
        with torch.no_grad():
            embedding = classifier.embed(views(step))
        F.cross_entropy(classifier.classify(embedding), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier


def fine_tune(classifier, views, supports, labels, learning_rate, steps):
    """Trains a copy of a PrototypeClassifier's whole backbone (P>M>F, Hu et al., 2204.07305): the supports
    give the prototypes, their augmented views are the queries. Normalisation layers keep their statistics.

    Args:
        As those of `linear_probe`.
    """
    model = copy.deepcopy(classifier.model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step in range(steps):
        f, queries = features(model, torch.cat([supports, views(step)])).chunk(2)
        center, prototypes = cosine_prototypes(f, labels)
        logits = classifier.scale * F.normalize(queries - center, dim=-1) @ prototypes.T
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return PrototypeClassifier(model, supports, labels, classifier.scale)


def specialise(model, supports, labels, kind, scale, augment, steps=50, held_out_views=4):
    """The teacher: a frozen classifier of images [B, 3, H, W] in [0, 1], with `embed` and `classify`.

    Args:
        model: timm backbone. supports: [S, 3, H, W] in [0, 1]. labels: [S].
        kind: "prototypes", "linear_probe" or "fine_tune"; the first where no support of a class can be held out.
        augment: function of a number to augmented supports, as [S, 3, H, W]; the same number gives the same views.
        steps: of training, each on one view of every support.
    """
    start = LinearProbe if kind == "linear_probe" else PrototypeClassifier
    labels = labels.to(supports.device)

    def trained(chosen, rate):
        """The classifier of the supports `chosen`, a mask, after training at a learning rate."""
        classifier = start(model, supports[chosen], labels[chosen], scale)
        if rate:
            train = linear_probe if kind == "linear_probe" else fine_tune
            classifier = train(
                classifier, lambda step: augment(step)[chosen], supports[chosen], labels[chosen], rate, steps
            )
        return classifier

    def errors(rate):
        """Wrong answers to views of either half of the supports by what was trained on the other."""
        wrong = 0
        for held_out in (halves, ~halves):
            classifier = trained(~held_out, rate)
            for i in range(held_out_views):
                with torch.no_grad():
                    answers = classifier(augment(steps + i)[held_out]).argmax(-1)
                wrong += (answers != labels[held_out]).sum().item()
        return wrong

    halves = torch.stack([(labels[:i] == label).sum() % 2 for i, label in enumerate(labels)]) == 1
    can_hold_out = all((labels[half] == c).any() for half in (halves, ~halves) for c in labels.unique())
    rate = min(LEARNING_RATES[kind], key=errors) if kind in LEARNING_RATES and can_hold_out else 0
    return trained(labels >= 0, rate).eval().requires_grad_(False)


def augmentation(size, args):
    """What makes a view [3, size, size] in [0, 1] of a PIL image: colours, random resized crop, mirroring."""
    jitter = args.color_jitter
    colors = v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 4))
    crop = v2.RandomResizedCrop(size, scale=(args.min_crop, 1.0), antialias=True)
    flip = v2.RandomHorizontalFlip(args.flip_probability)
    return v2.Compose([colors, crop, flip, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def for_views(image, size, args):
    """The central square of a PIL image, to make views of: as large as it is, or as the smallest crop needs it."""
    return square(image, min(math.ceil(size / math.sqrt(args.min_crop)), *image.size))


def make_teacher(model, args, pictures, labels):
    """The teacher: a timm backbone specialised on the supports, where it is: see `specialise`.

    Args:
        pictures: an iterable of the supports as PIL images. labels: their classes [S].
    """
    size, device = input_size(model)[0], next(model.parameters()).device
    augment, supports, squares = augmentation(size, args), [], []
    for picture in pictures:  # one by one: photographs are large
        supports.append(as_tensor(picture, size))
        squares.append(for_views(picture, size, args))

    def views(number):
        found = []
        for i, picture in enumerate(squares):
            with seeded(generator(args.seed, "teacher", number, i)):
                found.append(augment(picture))
        return torch.stack(found).to(device)

    supports = torch.stack(supports).to(device)
    model = model.to(memory_format=memory_format(model))
    return specialise(model, supports, labels, args.teacher_specialization, args.teacher_scale, views)
