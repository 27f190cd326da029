"""The real images that a student can be distilled on instead of generated ones: others of the same classes, of base
classes, or mined from a web; never one that it is measured on.
"""

import hashlib
from functools import cache
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from common import datasets, models
from common.cli import UserError, note
from common.images import as_tensor
from common.processes import best_device


def other_images(method, folder, seed, supports, dataset, options, args):
    """The real images, other than supports and queries, that an arm trains on: a data set, and references to it.

    real: those held back from the queries. base: `num_unlabeled` a class of the episode, drawn from all base classes.
    mined: as many, of the images of --web_dir those whose teacher features have the largest cosine to a support's
    (the paper's third experiment; without --web_dir, those of Icons-FS that mini-SD was trained on).

    None is, pixel by pixel, a support or what is or may become a query, wherever it lies.
    """
    order = datasets.draw_episode(dataset, args.num_ways, args.num_shots, args.seed, int(folder.name))
    held = references_of({name: order[name][-args.num_real :] for name in supports}) if method == "real" else []
    tested = {pixels(dataset.open(*x)) for x in references_of(order) if x not in held}
    if method == "mined":
        pool, model, web, keys = web_features(
            args.dataset, args.web_dir, options.teacher, options.teacher_image_size, options.teacher_checkpoint
        )
        images = references_of(pool.classes)
        apart = [i for i, key in enumerate(keys) if key not in tested]
        if len(apart) < len(images):
            note(f"episode {folder.name}: {len(images) - len(apart)} images to mine from are its own, and left out")
        support_features, _ = features_of(model, dataset, references_of(supports))
        near = nearest(web[apart], support_features.unflatten(0, (args.num_ways, -1)), args.num_unlabeled)
        chosen = [images[apart[i]] for i in near]
    elif method == "base":
        pool = load_pool(method, args)
        images = references_of(pool.classes)
        drawn = (images[i] for i in np.random.default_rng(seed).permutation(len(images)))
        apart = (x for x in drawn if pixels(pool.open(*x)) not in tested)
        chosen = list(islice(apart, args.num_unlabeled * args.num_ways))
    else:
        pool, chosen = dataset, [x for x in held if pixels(dataset.open(*x)) not in tested]
    if not chosen:
        raise UserError(f"--methods {method}: episode {folder.name} leaves no image to train on but its own.")
    return pool, {name: [r for owner, r in chosen if owner == name] for name in dict(chosen)}


def pixels(image):
    """What tells a PIL image from others, whatever file it lies in."""
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()


def references_of(classes):
    """{class name: references} as a list of (class name, reference)."""
    return [(name, reference) for name, group in classes.items() for reference in group]


@torch.no_grad()
def features_of(model, dataset, references):
    """The features [N, D] of images by a teacher that is not specialised, and what `pixels` says of them [N]."""
    size, device = models.input_size(model)[0], next(model.parameters()).device
    found, keys = [], []
    rest = iter(references)
    while images := [dataset.open(*reference) for reference in islice(rest, 100)]:
        keys += map(pixels, images)
        found.append(models.features(model, torch.stack([as_tensor(image, size) for image in images]).to(device)))
    return torch.cat(found), keys


@cache
def web_features(dataset, web_dir, teacher, image_size, checkpoint):
    """The data set of --web_dir, a teacher, and `features_of` all its images."""
    web = datasets.load_web(dataset, web_dir)
    model = models.load_model(teacher, True, image_size, checkpoint).to(best_device())
    return web, model, *features_of(model, web, references_of(web.classes))


def nearest(web, supports, count):
    """Which images have the largest cosine to a support of a class, `count` a class: sorted indices without repetition.

    Args:
        web: features [N, D]. supports: features [ways, shots, D], whose mean is the centre of the angles.
    """
    center = supports.mean((0, 1))
    web, supports = F.normalize(web - center, dim=-1), F.normalize(supports - center, dim=-1)
    similarity = torch.einsum("nd,wsd->nws", web, supports).amax(-1)
    return similarity.topk(min(count, len(web)), 0).indices.unique().tolist()


def load_pool(method, args):
    """The data set that images other than those of the episode's classes are taken from."""
    if method == "base":
        return datasets.load_dataset(args.dataset, "base", args.dataset_dir)
    return datasets.load_web(args.dataset, args.web_dir)
