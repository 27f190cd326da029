"""How specific generated images are, and how diverse, in the feature space of the specialised teacher."""

from itertools import chain, islice

import torch

from common import models, statistics
from common.cli import UserError, named_paths
from common.images import as_tensor, count_supports, list_images
from common.memory import announce
from common.records import provenance
from common.shards import open_samples, require_finished, shards_of

OPTIONS = ("generated_dir", "support_dir", "data_dir", "teacher", "teacher_image_size")


def specificity_and_diversity(f, answers, labels, support_f, support_labels):
    """How well images keep to their classes, and how much they vary within them.

    Args:
        f: unit features [N, D]. answers: the teacher's classes [N], or -1. labels: what the images should be [N].
        support_f, support_labels: those of the supports; the same objects where the images are the supports.
    Returns:
        {"images": N, "agreement": share of answers that are the label, with its Wilson interval, "nearest_support":
        mean cosine distance to the nearest (other) support of the class, "pairwise": mean cosine distance of two
        images of a class, the mean over classes}; None where there is no answer or pair.
    """
    nearest, pairwise = [], []
    for c in labels.unique():
        own = f[labels == c]
        near = 1 - own @ support_f[support_labels == c].T
        if f is support_f:
            near.fill_diagonal_(float("inf"))  # to itself
        nearest.append(near.min(1).values)
        if len(own) > 1:
            pairwise.append((1 - own @ own.T).sum() / (len(own) * (len(own) - 1)))
    nearest = torch.cat(nearest)
    hits, count = int((answers == labels).sum()), int((answers >= 0).sum())
    return {
        "images": len(labels),
        "agreement": {"mean": hits / count, "ci95": statistics.wilson_interval(hits, count)} if count else None,
        "nearest_support": nearest.mean().item() if nearest.isfinite().all() else None,
        "pairwise": torch.stack(pairwise).mean().item() if pairwise else None,
    }


@torch.no_grad()
def embed(folder, teacher, classes, batch_size):
    """Unit features [N, D] of the images of a folder, the teacher's answers [N], labels [N], and alphas (list)."""
    size, device = models.input_size(teacher)[0], teacher.center.device
    samples, rows, found = open_samples(folder, size), [], []
    while batch := list(islice(samples, batch_size)):
        rows += [row for row, _ in batch]
        if strangers := {str(row.get("label")) for row, _ in batch} - set(classes):
            raise UserError(f"{folder} has images of {', '.join(sorted(strangers))}, of which there are no supports.")
        found.append(teacher.embed(torch.stack([as_tensor(image) for _, image in batch]).to(device)))
    f = torch.cat(found)
    labels = torch.tensor([classes.index(str(row["label"])) for row in rows])
    alphas = [x if isinstance(x, int | float) and 0 <= x <= 1 else None for x in (row.get("alpha") for row in rows)]
    return f.cpu(), (f @ teacher.prototypes.T).argmax(-1).cpu(), labels, alphas


def level_of(alpha, drawn):
    """What images of one alpha are grouped by: itself, or, where alphas were drawn at random, the nearest fifth."""
    return round(5 * alpha) / 5 if drawn and alpha is not None else alpha


def agreement(folder, teacher, held_out, classes, drawn):
    """Lines that say how often the teacher gives the images of a folder their class, at each alpha, and what to do
    where that is seldom. `held_out`: how often it gives the support images theirs, each held out, or None. `drawn`:
    whether alphas were drawn at random."""
    _, answers, labels, alphas = embed(folder, teacher, classes, 64)
    groups = {}
    for right, alpha in zip((answers == labels).tolist(), alphas):
        groups.setdefault(level_of(alpha, drawn), []).append(right)
    rates = {alpha: sum(hits) / len(hits) for alpha, hits in sorted(groups.items(), key=lambda group: group[0] or 0)}
    said = [f"{rate:.0%}" + ("" if alpha is None else f" at alpha {alpha:g}") for alpha, rate in rates.items()]
    yardstick = "" if held_out is None else f"; the support images, each held out, theirs: {held_out:.0%}"
    yield f"the teacher, specialised on the support images, gives images their class: {', '.join(said)}{yardstick}"
    if min(rates.values()) < (1 if held_out is None else held_out) - 0.2:
        yield (
            "Where that is far less, images have lost their class: take a smaller --alpha, and if that does not help, "
            "invert into a diffusion model that knows such images (--pretrained_model_name_or_path)."
        )


def evaluate_generated(args, accelerator):
    """Specificity and diversity of each --generated_dir at each alpha, for results.json."""
    if not args.support_dir:
        raise UserError("--generated_dir needs --support_dir, the images that they were generated from.")
    folders = named_paths(args.generated_dir)
    for folder in filter(None, (*folders.values(), args.data_dir)):
        require_finished(folder)
    model = models.load_model(args.teacher, image_size=args.teacher_image_size).to(accelerator.device)
    parts = {"the teacher (--batch_size)": models.answering_bytes(model, args.batch_size)}
    announce([model], parts, accelerator.device)
    teacher, classes = models.of_supports(model, args.support_dir, batch_size=args.batch_size)
    support_f, _, labels, _ = embed(args.support_dir, teacher, classes, args.batch_size)
    answers = models.held_out_answers(teacher.support_features.cpu(), labels)
    support = support_f, labels
    real = {"supports": specificity_and_diversity(support_f, answers, labels, *support)}
    if args.data_dir:
        if not shards_of(args.data_dir):
            count_supports([*chain(*list_images(args.data_dir).values())], args.data_dir, args.support_dir)
        f, answers, labels, _ = embed(args.data_dir, teacher, classes, args.batch_size)
        real["real images"] = specificity_and_diversity(f, answers, labels, *support)
    sets = {}
    for name, folder in folders.items():
        f, answers, labels, alphas = embed(folder, teacher, classes, args.batch_size)
        drawn = len(set(alphas)) > 12
        alphas = [level_of(alpha, drawn) for alpha in alphas]
        sets[name] = []
        for alpha in sorted(set(alphas), key=lambda a: -1 if a is None else a):
            at = torch.tensor([a == alpha for a in alphas])
            sets[name].append({"alpha": alpha} | specificity_and_diversity(f[at], answers[at], labels[at], *support))
    results = {"kind": "generated", "classes": classes, "real": real, "sets": sets}
    return results | provenance(args, OPTIONS)
