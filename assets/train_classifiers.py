"""Meta-trains a backbone on base classes, so that cosine prototypes tell novel classes apart: the embedded teacher and
student on Icons-FS, or any timm model on another few-shot data set.

    loss = CE(head(f(x)), y) + w CE(10 cos(f(x) - m, p), y')

The first term is plain classification of the base classes, with smoothed labels. The second is the test itself (Snell
et al., 1703.05175, with the cosine and centring of common.models.PrototypeClassifier): each batch is an episode whose
one half of images gives the prototypes p and their centre m to classify the other half, and the other way round.

The teacher (`ink_lite`) sees an ink map and starts from ImageNet weights, those that assets/efficientnet_lite0.py
fetches; the student (`conv4_64`) sees colours and starts from random weights. Drawings are painted in fresh colours,
their strokes thickened or thinned, mirrored, turned, stretched and moved. The weights kept are an exponential moving
average. Settings were chosen on the episode pool of the val classes; nothing of val or novel classes is trained on.

    python -m assets.efficientnet_lite0 --output_dir outputs/efficientnet_lite0
    python -m assets.train_classifiers --model teacher --output_dir outputs/teacher \\
        --imagenet_model outputs/efficientnet_lite0
    python -m assets.train_classifiers --model student --output_dir outputs/student
    python -m assets.train_classifiers --model teacher --output_dir outputs/cifar_teacher --dataset cifar_fs \\
        --pretrained_model vit_small_patch14_dinov2.lvd142m --image_size 112 --learning_rate 1e-5

With --icon_web a model learns the thousands of names of assets/build_icon_web.py beside the base classes, as DINO has
seen the web; of its head the rows of the base classes are kept.

Stopped (Ctrl-C, SIGTERM) and started again, it goes on.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import timm
import torch
import torch.nn.functional as F

from assets.training import (
    Drawings,
    IconWeb,
    Pictures,
    Training,
    adamw,
    descend,
    recorded,
    rng_of_step,
    use_threads,
    warmed,
)
from common.architectures import InkMap
from common.cli import run
from common.datasets import load_dataset
from common.models import features, input_size, load_model, memory_format, save_model
from common.processes import best_device
from common.records import write_json

SETTINGS = {
    "teacher": {"architecture": "ink_lite", "max_train_steps": 600, "prototype_weight": 1.0, "augmentation": 1.4},
    "student": {"architecture": "conv4_64", "max_train_steps": 1000, "prototype_weight": 0.0, "augmentation": 1.0},
}


def batch(drawings, rows, counts, args, rng):
    """Augmented drawings of `args.ways` random classes: images [ways * shots, 3, 32, 32] in [0, 1], labels.

    Args:
        rows, counts: the drawings, class by class, and how many each class has.
    """
    labels = rng.permutation(len(counts))[: args.ways].repeat(args.shots)
    places = (rng.random(len(labels)) * counts[labels]).astype(int)
    picks = rows[(np.cumsum(counts) - counts)[labels] + places]
    if args.dataset != "icons_fs":
        return torch.stack([drawings.view(i, rng) for i in picks]), torch.tensor(labels)
    x, _ = drawings.paint(picks, rng, share=0.5)
    n, a = len(x), args.augmentation
    amount = torch.tensor(rng.uniform(-0.7 * a, 0.7 * a, (n, 1, 1, 1)), dtype=x.dtype, device=x.device)
    x = torch.lerp(x, torch.where(amount < 0, F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)), amount.abs())
    angle, shear = rng.normal(0, 0.2 * a, n), rng.normal(0, 0.15 * a, n)
    size, stretch = np.exp(rng.normal(0, 0.12 * a, n)), np.exp(rng.normal(0, 0.1 * a, n))
    mirror, shift = rng.choice([-1, 1], n), rng.uniform(-0.15 * a, 0.15 * a, (2, n))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    skew = np.array([[size * stretch * mirror, shear], [0 * shear, size / stretch]]).transpose(2, 0, 1)
    theta = torch.tensor(np.concatenate([turn @ skew, shift.T[:, :, None]], 2), dtype=x.dtype, device=x.device)
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), "bicubic", "border", align_corners=False)
    x = x.clamp(0, 1)
    return x, torch.tensor(labels)


def prototype_logits(support, query, scale=10.0):
    """Features [ways, shots, D] and [ways, queries, D] to logits [ways, queries, ways], as PrototypeClassifier's."""
    center = support.mean((0, 1))
    prototypes = F.normalize(F.normalize(support - center, dim=-1).mean(1), dim=-1)
    return scale * F.normalize(query - center, dim=-1) @ prototypes.T


def prototype_loss(f):
    """Cross-entropy of an episode of features [ways, shots, D], its halves being supports and queries in turn."""
    halves = f.chunk(2, 1)
    logits = torch.cat([prototype_logits(*halves), prototype_logits(*halves[::-1])], 1)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(len(f), device=f.device).repeat_interleave(f.shape[1]))


@torch.no_grad()
def accuracies(model, drawings, ways, shots, num_episodes, queries=15, seed=0):
    """Accuracy in percent of cosine prototypes over random episodes: {"mean", "interval": half the 95% one}."""
    device = next(model.parameters()).device
    f = torch.cat([features(model.eval(), x.to(device)).cpu() for x in drawings.images.split(256)])
    members = [np.flatnonzero(drawings.labels.numpy() == c) for c in range(len(drawings.classes))]
    reached = []
    for episode in range(num_episodes):
        rng = np.random.default_rng([seed, episode])
        chosen = rng.choice(len(members), ways, replace=False)
        rows = np.stack([rng.choice(members[c], shots + queries, replace=False) for c in chosen])
        answers = prototype_logits(f[rows[:, :shots]], f[rows[:, shots:]]).argmax(-1)
        reached.append(100 * (answers == torch.arange(ways)[:, None]).float().mean().item())
    return {
        "mean": float(np.mean(reached)),
        "interval": float(1.96 * np.std(reached, ddof=1) / math.sqrt(num_episodes)),
    }


def build(args, num_classes):
    """The model to train: with the weights of --pretrained_model, an `ink_lite` of the EfficientNet-Lite0 of
    --imagenet_model, or with random ones."""
    if args.pretrained_model:
        return load_model(args.pretrained_model, image_size=args.image_size, num_classes=num_classes)
    model = load_model(args.architecture, pretrained=False, image_size=args.image_size, num_classes=num_classes)
    if args.imagenet_model:
        state = load_model(args.imagenet_model).state_dict()
        # ink 0 to 1 is as white to black, the photos' 1 to -1 in all channels
        state["conv_stem.weight"] = -2 * state["conv_stem.weight"].sum(1, keepdim=True)
        whole = timm.create_model("tf_efficientnet_lite0", in_chans=1)
        whole.load_state_dict(state)
        stem = [InkMap(), whole.conv_stem, whole.bn1]
        stages = whole.blocks[: len(model.blocks) - len(stem)]
        model.blocks.load_state_dict(torch.nn.Sequential(*stem, *stages).state_dict())
    return model


def load_split(split, args, size):
    """The images of base classes, or those of other classes that episodes draw from."""
    if args.dataset == "icons_fs":
        return Drawings(["base"] if split == "base" else ["episode"], [split])
    return Pictures(args.dataset, split, args.dataset_dir, size)


def main(args):
    use_threads(args.num_threads)
    torch.manual_seed(args.seed)
    base = list(load_dataset(args.dataset, "base", args.dataset_dir).classes)
    web = IconWeb(args.icon_web, ["base"], ["base"]) if args.icon_web else None
    model = build(args, len(web.classes if web else base))
    drawings = web or load_split("base", args, input_size(model)[0])
    held_out = {"val": ["val"], "novel": ["novel"]}
    if args.dataset == "icons_fs":
        held_out = {"val": ["val", "unseen_val"], "novel": ["novel", "unseen"]}
    validation = {split: load_split(split, args, input_size(model)[0]) for split in held_out["val"]}
    rows = np.argsort(drawings.labels.numpy(), kind="stable")
    counts = np.bincount(drawings.labels.numpy(), minlength=len(drawings.classes))
    device = best_device()
    drawings = drawings.to(device)
    model = model.to(device, memory_format=memory_format(model))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0}]
    adam = adamw(groups, (0.9, 0.999), args.weight_decay, device)
    training = Training(args, model, adam)

    def train(images, labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            f = features(model.train(), images)
            logits = model.get_classifier()(f)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        if args.prototype_weight:
            loss = loss + args.prototype_weight * prototype_loss(f.float().unflatten(0, (-1, args.shots)))
        return descend(loss, list(model.parameters()), adam, 5.0)

    def validate(model):
        return {split: accuracies(model, data, 5, 5, 300)["mean"] for split, data in validation.items()}

    train = recorded(train, device)
    for step in training.steps(partial(warmed, 100)):
        drawn = batch(drawings, rows, counts, args, rng_of_step(args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        training.finish_step(train(*(x.to(device) for x in drawn)), validate)
    if training.stopping:
        return

    model, output_dir = training.ema.to("cpu", memory_format=torch.contiguous_format), Path(args.output_dir)
    if args.icon_web:  # whose first names are the base classes
        head = model.get_classifier()
        model.reset_classifier(len(base))
        model.get_classifier().load_state_dict({key: rows[: len(base)] for key, rows in head.state_dict().items()})
    save_model(model, output_dir, base)
    model, reached = model.to(device), {}
    for split in held_out["val"] + held_out["novel"]:
        episodes = load_split(split, args, input_size(model)[0])
        for ways, shots in ((5, 1), (5, 5), (len(episodes.classes), 5)):
            reached[f"{split}, {ways}-way {shots}-shot"] = accuracies(model, episodes, ways, shots, 500)
    size = sum(p.numel() for p in model.parameters())
    write_json(output_dir / "training.json",
               {"settings": vars(args), "parameters": size, "seconds": training.seconds,
                "curve": training.curve, "reached": reached, "names": drawings.classes})  # fmt: skip
    print(reached)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(SETTINGS), required=True, help="whose settings, in SETTINGS, are the defaults")
    add("--output_dir", required=True)
    add("--dataset", default="icons_fs", help="any that common/datasets.py knows; its base classes are learned")
    add("--dataset_dir", help="where the data set lies; default: data/<name>")
    add("--architecture", help="a timm model, from random weights")
    add("--pretrained_model", help="instead of --architecture, a timm backbone to go on from: folder or hf-hub:name")
    add("--image_size", type=int, help="the model's input side; default: its own")
    add("--imagenet_model", help="folder of the EfficientNet-Lite0 to start an ink_lite from")
    add("--icon_web", help="file of assets/build_icon_web.py: learn its names beside the base classes")
    add("--bf16", action="store_true", help="compute in bfloat16: dense networks take half as long on some CPUs")
    add("--max_train_steps", type=int)
    add("--max_minutes", type=float, help="end by then, the learning rate with it")
    add("--learning_rate", type=float, default=2e-3)
    add("--prototype_weight", type=float, help="w in the loss")
    add("--augmentation", type=float, help="how far strokes and shapes change")
    add("--ways", type=int, default=16, help="classes in a batch")
    add("--shots", type=int, default=8, help="drawings of each, an even number")
    add("--label_smoothing", type=float, default=0.1)
    add("--weight_decay", type=float, default=0.05)
    add("--ema_decay", type=float, default=0.99)
    add("--validation_steps", type=int, default=100, help="steps between validations and checkpoints")
    add("--num_threads", type=int, default=2)
    add("--seed", type=int, default=0)
    parser.set_defaults(**SETTINGS[parser.parse_known_args()[0].model])
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
