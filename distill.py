"""Teaches a tiny student what a strong teacher knows, on generated images.

The teacher is specialised on the real support images by cosine prototypes. Teacher and student then see the same
augmented view of an image, real or generated, and the student is trained towards the teacher's answer (Hinton et al.,
1503.02531; one view for both and mixup as in "consistent teaching", Beyer et al., 2106.05237).

    accelerate launch distill.py --train_dir outputs/demo/generated --support_dir outputs/demo/support
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from common import models
from common.cli import (
    UserError,
    argument_parser,
    check_settings,
    fingerprint,
    generator,
    positive_int,
    run,
    settings_of,
    start,
    whole_file,
    write_json,
)
from common.images import list_images, load_folder, open_image
from common.shards import list_samples, open_samples


class Views(Dataset):
    """Augmented views of support and generated images; view i depends on (seed, i) alone.

    Args:
        supports, generated: PIL images, on which torchvision's colour transforms are fast; generated may be empty.
        support_ratio: the share of views that show a support image.
        augment: torchvision transform of one image.
        count: number of views.
    """

    def __init__(self, supports, generated, support_ratio, augment, seed, count):
        self.pools = [supports, generated]
        self.support_ratio = support_ratio if len(generated) else 1.0
        self.augment, self.seed, self.count = augment, seed, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = generator(self.seed, "view", i)
        pool = self.pools[int(torch.rand((), generator=rng) >= self.support_ratio)]
        image = pool[torch.randint(len(pool), (), generator=rng)]
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.random.default_generator.set_state(rng.get_state())
            return self.augment(image)


def augmentation(size, args):
    """What makes a view [3, size, size] in [0, 1] of a PIL image: random resized crop, mirroring, colours."""
    jitter = args.color_jitter
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(args.min_crop, 1.0), antialias=True),
            v2.RandomHorizontalFlip(args.flip_probability),
            v2.ColorJitter(jitter, jitter, jitter, jitter / 4),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def mixup(views, strength, rng):
    """lam * x + (1 - lam) * x', with lam ~ Beta(strength, strength) and x' the batch in reverse (1710.09412)."""
    if not strength:
        return views
    lam = rng.beta(strength, strength)
    return lam * views + (1 - lam) * views.flip(0)


def distillation_loss(student_logits, teacher_logits, temperature):
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (1503.02531, section 2)."""
    s = F.log_softmax(student_logits.float() / temperature, -1)
    t = F.log_softmax(teacher_logits.float() / temperature, -1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def imprint(student, supports, labels, scale):
    """Starts the student's head, where it is linear, at its own prototypes (imprinting, Qi et al., 1712.07136).

    With prototypes p_c and centre m of `PrototypeClassifier`: logits = W (f - m), W_c = scale * p_c / mean ||f - m||;
    its answers are those of the prototype classifier.
    """
    head = student.get_classifier()
    if not isinstance(head, torch.nn.Linear):
        return
    with torch.no_grad():
        imprinted = models.PrototypeClassifier(student, supports, labels)
        head.weight.copy_(scale * imprinted.prototypes / imprinted.spread)
        head.bias.copy_(-head.weight @ imprinted.center)


def is_trained(student):
    """A student from a folder or the hub starts with its weights, one by plain timm name with random ones."""
    return Path(student).is_dir() or student.startswith("hf-hub:")


def load_student(args, num_classes):
    """The student before training, with a new head for `num_classes` classes."""
    torch.manual_seed(args.seed)
    student = models.load_model(args.student, pretrained=is_trained(args.student), image_size=args.student_image_size)
    student.reset_classifier(num_classes)
    return student


def write_card(path, args, classes, counts, losses):
    """README.md of the student: what it is, what it was trained on, how to load it."""
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, few-shot, distillation]",
        "---",
        f"# {Path(args.output_dir).name}: {args.student} for {len(classes)} classes",
        "",
        f"Classes: {', '.join(classes)}.",
        "",
        f"Distilled from `{args.teacher}`, specialised by cosine prototypes on {counts[0]} support images, in "
        f"{args.max_train_steps} steps of {args.train_batch_size} views of these and of {counts[1]} generated images. "
        f"Mean distillation loss at the end: {losses[-1][1]:.4f}.",
        "",
        "```python",
        "import common.models  # knows this project's own architectures",
        "import timm",
        f'model = timm.create_model("local-dir:{args.output_dir}", pretrained=True)',
        "```",
    ]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def main(args):
    accelerator = start(args)
    output_dir = Path(args.output_dir)
    classes = list_images(args.support_dir)
    if len(classes) < 2:
        raise UserError(f"{args.support_dir} holds one class only: there is nothing to tell apart.")
    generated = [] if args.supports_only else list_samples(args.train_dir, classes)
    settings = settings_of(args, "dataloader_num_workers", "support_dir", "train_dir") | {
        "support_images": fingerprint(path for group in classes.values() for path in group),
        "generated_images": fingerprint(generated),
    }
    if check_settings(output_dir / "distill.json", settings):
        accelerator.print(f"{output_dir} is already there, with the same settings")
        return

    teacher = models.load_model(args.teacher, image_size=args.teacher_image_size)
    student = load_student(args, len(classes))
    size = max(models.input_size(teacher) + models.input_size(student))
    supports, labels, classes, paths = load_folder(args.support_dir, size, classes)
    device = accelerator.device
    teacher = models.PrototypeClassifier(teacher.to(device), supports.to(device), labels, args.teacher_scale)
    if is_trained(args.student):
        imprint(student, supports, labels, args.teacher_scale)

    generated = [image for _, image in open_samples(args.train_dir, size)] if generated else []
    views = Views(
        [open_image(path, size) for path in paths],
        generated,
        args.support_ratio,
        augmentation(size, args),
        args.seed,
        args.max_train_steps * args.train_batch_size * accelerator.num_processes,
    )
    loader = DataLoader(views, args.train_batch_size, num_workers=args.dataloader_num_workers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    mix = np.random.default_rng(args.seed)
    student.train()

    losses, recent = [], []
    progress = tqdm(loader, desc="distilling", disable=not accelerator.is_local_main_process)
    for step, x in enumerate(progress):
        for group in optimizer.param_groups:  # linear warm-up over a twentieth of the steps, then a cosine to zero
            warmup = min(1.0, (step + 1) / (args.max_train_steps / 20))
            group["lr"] = args.learning_rate * warmup * (1 + math.cos(math.pi * step / args.max_train_steps)) / 2
        x = mixup(x, args.mixup, mix)
        with accelerator.autocast():
            with torch.no_grad():
                teacher_logits = teacher(x)
            student_logits = student(models.normalize(accelerator.unwrap_model(student), x))
        loss = distillation_loss(student_logits, teacher_logits, args.temperature)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise UserError(f"the loss is {recent[-1]} at step {step}: use a smaller --learning_rate, or no fp16.")
        if len(recent) == max(1, args.max_train_steps // 10) or step + 1 == args.max_train_steps:
            losses.append((step + 1, float(np.mean(recent))))
            progress.set_postfix(loss=f"{losses[-1][1]:.4f}")
            accelerator.log({"distillation/loss": losses[-1][1]}, step + 1)
            recent.clear()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        models.save_model(accelerator.unwrap_model(student).eval(), output_dir, classes)
        counts = (len(supports), len(generated))
        write_card(output_dir / "README.md", args, classes, counts, losses)
        facts = {"settings": settings, "classes": classes, "images": counts, "loss": losses}
        write_json(output_dir / "distill.json", facts)  # last: it marks the student as done
    accelerator.end_training()
    accelerator.print(f"{output_dir}: final distillation loss {losses[-1][1]:.4f}")


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/student")
    add = parser.add_argument
    add("--support_dir", default="outputs/demo/support", help="the real images: one folder per class")
    add("--train_dir", default="outputs/demo/generated", help="generated images: one folder per class, or tar shards")
    add("--supports_only", action="store_true", help="train on the supports alone, without --train_dir")
    add("--teacher", default="assets/teacher", help="timm backbone: model folder, timm name or hf-hub:name")
    add("--teacher_scale", type=float, default=10.0, help="inverse softmax temperature of cosine similarities")
    add("--teacher_image_size", type=positive_int, help="the teacher's input side; default: its own")
    add("--student", default="assets/student", help="model folder to start from, or timm name for random weights")
    add("--student_image_size", type=positive_int, help="the student's input side; default: its own")
    add("--support_ratio", type=float, default=0.5, help="share of the views that show supports")
    add("--max_train_steps", type=positive_int, default=300, help="steps of optimisation")
    add("--train_batch_size", type=positive_int, default=50, help="views a step and process")
    add("--learning_rate", type=float, default=1e-3, help="AdamW's highest learning rate")
    add("--weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    add("--temperature", type=float, default=1.0, help="softmax temperature of the distillation loss")
    add("--mixup", type=float, default=0.0, help="mixup's Beta parameter; 0 is off")
    add("--min_crop", type=float, default=0.6, help="smallest area of a random crop")
    add("--flip_probability", type=float, default=0.5, help="of mirroring; 0 where mirror images are wrong")
    add("--color_jitter", type=float, default=0.4, help="strength of brightness, contrast and saturation changes")
    add("--dataloader_num_workers", type=int, default=0, help="processes that make views")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
