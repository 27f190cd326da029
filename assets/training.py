"""What the training scripts of the embedded models share: drawings in fresh colours, and checkpoints.

The scripts are run from the repository's root, `python -m assets.train_vae`, and go on from their last checkpoint.
"""

import json
import os
import signal
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import safe_open

import distill
from assets.colours import draw_colours
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import load_dataset
from common.icons_fs import load_class, load_drawings, load_ink, load_splits
from common.images import as_tensor
from common.plots import write_beside
from common.processes import seeded
from common.records import settings_of
from common.teachers import augmentation


class Drawings:
    """The drawings of some pools of Icons-FS, which can be painted in other colours.

    Args:
        pools: of "base", "web" (of val and novel classes) and "episode", which no model is ever trained on.
        splits: the splits whose classes count.
    """

    def __init__(self, pools, splits=("base", "val", "novel")):
        facts, self.classes = load_drawings(), sorted(c for s in splits for c in load_splits()[s])
        self.facts, images, inks = [], [], []
        for label, name in enumerate(self.classes):
            rows = [i for i, fact in enumerate(facts[name]) if fact["pool"] in pools]
            self.facts += [{"class": name, "label": label} | facts[name][i] for i in rows]
            images.append(load_class(name)[rows])
            inks.append(load_ink(name)[rows])
        self.images, self.inks = torch.cat(images), torch.cat(inks)
        self.labels = torch.tensor([fact["label"] for fact in self.facts])

    def __len__(self):
        return len(self.facts)

    def paint(self, i, rng):
        """Drawing `i` in fresh colours, where it is of one colour: (image [3, 32, 32] in [0, 1], its facts)."""
        if self.facts[i]["style"] == "colour":
            return self.images[i], self.facts[i]
        front_word, ground_word, front, ground = draw_colours(rng)
        front, ground = (torch.tensor(c / 255, dtype=torch.float32)[:, None, None] for c in (front, ground))
        image = ground + (front - ground) * self.inks[i]
        return image, self.facts[i] | {"foreground": front_word, "background": ground_word}


class IconWeb(Drawings):
    """The drawings of base classes and, after them, those of the file that assets/build_icon_web.py writes."""

    def __init__(self, path):
        super().__init__(["base"], ["base"])
        with safe_open(path, "pt") as file:
            names, facts = (json.loads(file.metadata()[key]) for key in ("names", "facts"))
            images, inks, labels = (file.get_tensor(key) for key in ("images", "inks", "labels"))
        self.labels = torch.cat([self.labels, labels + len(self.classes)])
        self.classes, self.facts = self.classes + names, self.facts + facts
        self.images = torch.cat([self.images, images.permute(0, 3, 1, 2) / 255])
        self.inks = torch.cat([self.inks, inks[:, None] / 255])


class Pictures:
    """The images of a split of any few-shot data set, square, of side `size`; `view` gives one augmented."""

    def __init__(self, name, split, folder, size):
        data = load_dataset(name, split, folder)
        self.classes, self.size = list(data.classes), size
        references = [(label, c, r) for label, (c, group) in enumerate(data.classes.items()) for r in group]
        self.pictures = [
            ImageOps.fit(data.open(c, r), (size, size), Image.Resampling.BICUBIC) for _, c, r in references
        ]
        self.labels = torch.tensor([label for label, _, _ in references])
        self.augment = augmentation(size, distill.parse_args([]))

    @property
    def images(self):
        return torch.stack([as_tensor(picture) for picture in self.pictures])

    def view(self, i, rng):
        with seeded(torch.Generator().manual_seed(int(rng.integers(2**62)))):
            return self.augment(self.pictures[i])


class Checkpoint:
    """Everything that a training needs to go on, written every few minutes and when told to stop.

    Args:
        path: the file.
        args: the settings; a training does not go on with others.
        stateful: {name: module or AdamW optimizer}.
    """

    def __init__(self, path, args, **stateful):
        self.path, self.stateful, self.stopping = Path(path), stateful, False
        self.settings = settings_of(args, "num_threads")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, *_):
        self.stopping = True

    def save(self, **facts):
        save_checkpoint(self.path, {"settings": self.settings, **facts}, **self.stateful)

    def load(self):
        """Restores what was saved and returns its facts, {} where there is nothing.

        Raises:
            UserError: it was begun with other settings.
        """
        return load_checkpoint(self.path, self.settings, **self.stateful)


@matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tint", "font.size": 12})
def save_plot(path, x_title, y_title, lines, logarithmic=False):
    """An SVG picture of lines {name: [(x, y)]}, always the same for the same lines; logarithmic in x if wished."""
    figure, labels = Figure(figsize=(8, 4), layout="constrained"), []
    axes = figure.add_subplot(xlabel=x_title, ylabel=y_title, xscale="log" if logarithmic else "linear")
    for name, line in lines.items():
        (drawn,) = axes.plot(*zip(*line))
        labels.append((*line[-1], name, drawn.get_color()))
    if logarithmic:
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.minorticks_off()
    write_beside(axes, labels)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def use_threads(count):
    """Computes with `count` threads that sleep while they wait, so that a training can run beside other work."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(count)


def rng_of_step(seed, step):
    """numpy's generator of one training step: a training that goes on sees what it would have seen undisturbed."""
    return np.random.default_rng([seed, step])


def moving_average(decay):
    """The update of torch's AveragedModel to an exponential moving average, which forgets faster at the beginning."""

    def update(averaged, current, number):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + float(number)) / (10 + float(number))))

    return update
