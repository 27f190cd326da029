"""What the training scripts of the embedded models share: drawings in fresh colours, and the course of a training.

The scripts are run from the repository's root, `python -m assets.train_vae`, and go on from their last checkpoint.
"""

import json
import math
import os
import signal
import time
from functools import cache, cached_property
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import safe_open
from timm.utils import ModelEmaV3

import distill
from assets.colours import draw_colours
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import load_dataset
from common.icons_fs import load_class, load_drawings, load_splits
from common.images import as_tensor
from common.plots import write_beside
from common.processes import seeded
from common.records import fingerprint, settings_of
from common.teachers import augmentation


@cache
def palette(size=20_000):
    """Pairs of colours to paint in, the same in every training: words [(foreground, background)] and colours
    [size, 2, 3] in [0, 1]."""
    rng = np.random.default_rng(0)
    pairs = [draw_colours(rng) for _ in range(size)]
    colours = np.array([pair[2:] for pair in pairs]) / 255
    return [pair[:2] for pair in pairs], torch.tensor(colours, dtype=torch.float32)


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
            inks.append(load_class(name, kind="ink")[rows])
        self.images, self.inks = torch.cat(images), torch.cat(inks)
        self.labels = torch.tensor([fact["label"] for fact in self.facts])

    def __len__(self):
        return len(self.facts)

    def to(self, device):
        self.images, self.inks = self.images.to(device), self.inks.to(device)
        return self

    @cached_property
    def paintable(self):
        """Which drawings are of one colour, bool [N, 1, 1, 1]."""
        one_colour = [fact["style"] != "colour" for fact in self.facts]
        return torch.tensor(one_colour, device=self.images.device).view(-1, 1, 1, 1)

    def paint(self, rows, rng, share=1.0):
        """Drawings `rows`, of which a random `share` is painted in fresh colours where they are of one colour: images
        [n, 3, 32, 32] in [0, 1], and an iterator of their facts."""
        (words, colours), device = palette(), self.images.device
        picks, fresh = rng.integers(len(words), size=len(rows)), rng.random(len(rows)) < share
        front, ground = colours[picks].to(device)[..., None, None].unbind(1)
        rows_there = torch.as_tensor(rows, device=device)
        painted = ground + (front - ground) * self.inks[rows_there]
        chosen = self.paintable[rows_there] & torch.as_tensor(fresh, device=device).view(-1, 1, 1, 1)
        named = (self.facts[i] if self.facts[i]["style"] == "colour" or not new else
                 self.facts[i] | dict(zip(("foreground", "background"), words[k]))
                 for i, k, new in zip(rows, picks, fresh))  # fmt: skip
        return torch.where(chosen, painted, self.images[rows_there]), named


class IconWeb(Drawings):
    """Drawings of Icons-FS and, after them, those of the file that assets/build_icon_web.py writes."""

    def __init__(self, path, *pools_and_splits):
        super().__init__(*pools_and_splits)
        with safe_open(path, "pt") as file:
            names, facts = (json.loads(file.metadata()[key]) for key in ("names", "facts"))
            images, inks, labels = (file.get_tensor(key) for key in ("images", "inks", "labels"))
        self.facts += [fact | {"class": names[label]} for fact, label in zip(facts, labels.tolist())]
        self.labels = torch.cat([self.labels, labels + len(self.classes)])
        self.classes = self.classes + names
        self.images = torch.cat([self.images, images.permute(0, 3, 1, 2) / 255])
        self.inks = torch.cat([self.inks, inks[:, None] / 255])


def seen_drawings(icon_web=None):
    """What mini-SD learns from: base classes, the web pool and, if given, the file of the icon web."""
    pools = ["base", "web"]
    return IconWeb(icon_web, pools) if icon_web else Drawings(pools)


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

    def to(self, device):
        return self  # opened and augmented on the CPU

    @property
    def images(self):
        return torch.stack([as_tensor(picture) for picture in self.pictures])

    def view(self, i, rng):
        with seeded(torch.Generator().manual_seed(int(rng.integers(2**62)))):
            return self.augment(self.pictures[i])


class Training:
    """The steps of a training, with its learning rate, its curve, the moving average of its weights, and a checkpoint,
    written every few minutes and when told to stop, from which it goes on.

    Args:
        args: its settings, `output_dir`, `learning_rate`, `ema_decay`, `validation_steps`, `max_train_steps`,
            `max_minutes` and others; a training does not go on with others.
        model: the module to train, which lies on its device. optimizer: that of `adamw`.

    Attributes:
        ema: the average of the model's weights, which forgets faster at the beginning: with decay (1 + k) / (10 + k) at
            step k, but for at most `ema_decay`. A module.

    Raises:
        UserError: it was begun with other settings.
    """

    def __init__(self, args, model, optimizer):
        self.args, self.model, self.optimizer, self.stopping = args, model, optimizer, False
        self.average = ModelEmaV3(model, args.ema_decay, use_warmup=True, warmup_gamma=9, warmup_power=1)
        self.path, settings = Path(args.output_dir, "checkpoint.safetensors"), settings_of(args, "num_threads")
        inputs = [Path(value) for value in settings.values() if isinstance(value, str | Path) and Path(value).exists()]
        files = [file for path in inputs for file in [path, *sorted(path.rglob("*.safetensors"))] if file.is_file()]
        self.settings = settings | {"inputs": fingerprint(files)}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        facts = load_checkpoint(self.path, self.settings, **self.stateful())
        self.step, self.curve, self.losses = facts.get("step", 0), facts.get("curve", []), []
        self.start = time.time() - facts.get("seconds", 0)
        self.done = self.progress() == 1

    @property
    def ema(self):
        return self.average.module

    @property
    def seconds(self):
        """What it has taken in all its starts."""
        return time.time() - self.start

    def stateful(self):
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}

    def stop(self, *_):
        self.stopping = True

    def progress(self):
        """From 0 to 1, by its steps or, where it has a limit in minutes, by its time, whichever is further."""
        by_time = self.seconds / 60 / self.args.max_minutes if self.args.max_minutes else 0
        return min(1, max(self.step / self.args.max_train_steps, by_time))

    def steps(self, share):
        """The numbers of the steps that are left, each with its learning rate set: `share(step, progress)` of the
        highest."""
        while not (self.done or self.stopping):
            rate = self.args.learning_rate * share(self.step, self.progress())
            for group in self.optimizer.param_groups:
                group["lr"].fill_(rate)
            yield self.step

    def finish_step(self, loss, validate):
        """Counts a step of this loss; where it is time, adds a point to the curve, with what `validate` says of the
        average, {name: number}, and writes a checkpoint."""
        self.losses.append(loss)
        self.average.update(self.model, self.step + 2)
        self.step += 1
        self.done = self.progress() == 1
        if self.step % self.args.validation_steps == 0 or self.done or self.stopping:
            loss = torch.stack(self.losses).mean().item()
            self.curve.append({"step": self.step, "loss": loss, **validate(self.ema)})
            self.losses.clear()
            print(f"{self.seconds:.0f} s", self.curve[-1], flush=True)
            facts = {"settings": self.settings, "step": self.step, "seconds": self.seconds, "curve": self.curve}
            save_checkpoint(self.path, facts, **self.stateful())


def warmed(warmup_steps, step, progress):
    """A share of the highest learning rate: a linear rise, then half a cosine down to zero."""
    return min(1, (step + 1) / warmup_steps) * (1 + math.cos(math.pi * progress)) / 2


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
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(count)


def rng_of_step(seed, step):
    """numpy's generator of one training step: a training that goes on sees what it would have seen undisturbed."""
    return np.random.default_rng([seed, step])


def recorded(step, device):
    """`step`, a function from tensors of unchanging shapes to a tensor; on a GPU as a CUDA graph, since a step of a
    small network takes longer to launch than to compute. Before it is recorded, it runs three times."""
    if device.type != "cuda":
        return step
    graph, held, result = torch.cuda.CUDAGraph(), [], []

    def play(*tensors):
        if not held:
            held.extend(x.clone() for x in tensors)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step(*held)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                result.append(step(*held))
        for own, x in zip(held, tensors):
            own.copy_(x)
        graph.replay()
        return result[0].clone()

    return play


def adamw(groups, betas, weight_decay, device):
    """AdamW whose learning rate is a tensor, so that it can change in a recorded step."""
    rate = torch.tensor(0.0, device=device)
    return torch.optim.AdamW(
        groups, rate, betas, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
    )


def descend(loss, parameters, optimizer, max_norm):
    """One step down the gradient of `loss`, whose norm is clipped; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return loss.detach()
