"""Teaches a tiny student what a strong teacher knows, on generated images.

The teacher is specialised on the real support images. Teacher and student then see the same augmented view of an
image, and the student is trained towards the teacher's answer (Hinton et al., 1503.02531; one view for both, mixup, and
long schedules as in "consistent teaching", Beyer et al., 2106.05237) and, if wished, its features and the known label.

    accelerate launch distill.py --train_dir outputs/demo/generated --support_dir outputs/demo/support

It may be killed at any moment: started again, it goes on from its last checkpoint and ends the same (on a CPU).
"""

import common.passive  # noqa: F401  (before torch is loaded)

import copy
import math
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from common import cli, models
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import UserError, argument_parser, note, refuse_others, refusing, run
from common.images import find_images, list_images, load_image, open_image, require_unseen, with_labels
from common.memory import announce, batch_bytes, bytes_of
from common.processes import as_main_sees, cores_of_a_process, generator, seeded, start
from common.records import blaming, check_settings, fingerprint, read_json, settings_of, write_file, write_json
from common.report import TEMPLATES, with_interval
from common.shards import list_samples, open_samples, require_finished
from common.teachers import SPECIALISATIONS, augmentation, for_views, make_teacher

TRAIN_DIR = "outputs/demo/generated"
UNKNOWN = -1  # the label of an image that nobody has labelled
KEPT = 2**31  # bytes of views that are kept at most, where they come round again
DIVERGED = 10  # times the loss of a student that knows nothing
OUTSIDE = ("checkpointing_steps", "dataloader_num_workers", "query_dir", "support_dir", "train_dir", "unlabeled_dir")


class Views(Dataset):
    """Augmented views of supports and other images, lists of (PIL image, label) of which the second may be empty; view
    i depends on (seed, i) alone. `support_ratio`: the share of views that show a support. `augment`: torchvision's
    transform of a PIL image to a view [3, size, size] in [0, 1]."""

    def __init__(self, supports, others, num_classes, support_ratio, augment, seed):
        self.pools, self.num_classes = [supports, others], num_classes
        self.support_ratio = support_ratio if others else 1.0
        self.augment, self.seed = augment, seed

    def __getitem__(self, i):
        """A view, and its label as one-hot vector [num_classes], which is zero where the label is unknown."""
        rng = generator(self.seed, "view", i)
        pool = self.pools[int(torch.rand((), generator=rng) >= self.support_ratio)]
        image, label = pool[torch.randint(len(pool), (), generator=rng)]
        with seeded(rng):
            return self.augment(image), (torch.arange(self.num_classes) == label).float()


def mixing(args):
    """Mixup (1710.09412) or CutMix (1905.04899) of a batch and its one-hot labels, one of the two where both are on."""
    kinds = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def batch_numbers(args, first_step, rank, num_processes):
    """Which batch of views a process sees in each of its passes; with --num_views they come round again and again."""
    rounds, passes = math.ceil(args.num_views / args.train_batch_size), args.gradient_accumulation_steps
    numbers = [i * num_processes + rank for i in range(first_step * passes, args.max_train_steps * passes)]
    return [number % rounds for number in numbers] if rounds else numbers


def batches(views, numbers, args):
    """Yields the views [B, 3, H, W] in [0, 1] and labels [B, num_classes] of batches by their numbers. Those that come
    round again are made once, and kept as the bytes that they are, where there is room for all."""
    keep = 0 < args.num_views * views[0][0].numel() <= KEPT
    fresh = dict.fromkeys(numbers) if keep else numbers
    sampler = [range(n * args.train_batch_size, (n + 1) * args.train_batch_size) for n in fresh]
    on_gpu, workers = torch.cuda.is_available(), args.dataloader_num_workers
    workers = cores_of_a_process() if workers is None and on_gpu else workers or 0
    loader = iter(DataLoader(views, batch_sampler=sampler, num_workers=workers, pin_memory=on_gpu))
    kept = {}
    for number in numbers:
        x, targets = kept[number] if number in kept else next(loader)
        yield v2.functional.to_dtype(x, torch.float32, scale=True), targets  # bytes to the bit as they were
        if keep:
            kept[number] = (x if number in kept else (x * 255).round().byte()), targets


def distillation_loss(student_logits, teacher_logits, temperature):
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (1503.02531, section 2)."""
    s = F.log_softmax(student_logits.float() / temperature, -1)
    t = F.log_softmax(teacher_logits.float() / temperature, -1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def total_loss(logits, projected, teacher_logits, teacher_embedding, targets, args):
    """(1 - h) * distillation + h * cross-entropy of known labels + w * (1 - cosine) of the student's projected features
    and the teacher's (FitNets, 1412.6550, with the cosine instead of the square), means over the batch."""
    loss = (1 - args.hard_label_weight) * distillation_loss(logits, teacher_logits, args.temperature)
    if args.hard_label_weight:
        loss = loss + args.hard_label_weight * F.cross_entropy(logits.float(), targets)  # an unknown label adds 0
    if args.feature_weight:
        cosine = F.cosine_similarity(projected.float(), teacher_embedding.float(), dim=-1)
        loss = loss + args.feature_weight * (1 - cosine).mean()
    return loss


def loss_of_ignorance(num_classes, args):
    """`total_loss` of equal logits and features at right angles, where the teacher is sure and labels are known."""
    weight = (1 - args.hard_label_weight) * args.temperature**2 + args.hard_label_weight
    return weight * math.log(num_classes) + args.feature_weight


def learning_rate(step, args):
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / (args.max_train_steps / 20))
    return args.learning_rate * warmup * (1 + math.cos(math.pi * step / args.max_train_steps)) / 2


def imprint(student, supports, labels, scale):
    """Starts the student's head, where it is linear, at its own prototypes (imprinting, Qi et al., 1712.07136): with
    p_c and m of `PrototypeClassifier`, logits = W (f - m), W_c = scale * p_c / mean ||f - m||, and the same answers."""
    head = student.get_classifier()
    if not isinstance(head, nn.Linear | nn.Conv2d):
        note(f"the student's head, {type(head).__name__}, is not one linear layer: it starts from random weights")
        return
    with torch.no_grad():
        imprinted = models.PrototypeClassifier(student, supports, labels)
        weight = scale * imprinted.prototypes / imprinted.spread
        head.weight.copy_(weight.view_as(head.weight))  # a 1x1 convolution has two more axes
        head.bias.copy_(-weight @ imprinted.center)


class Learner(nn.Module):
    """The student and, for feature matching, a linear map, later thrown away, from its features to the teacher's."""

    def __init__(self, student, teacher_width=None):
        super().__init__()
        self.student, self.projection = student, None
        if teacher_width:
            with torch.no_grad(), models.classifier_inputs(student.eval()) as seen:
                student(torch.zeros(1, 3, *models.input_size(student)))
            self.projection = nn.Linear(torch.cat(seen, -1).shape[-1], teacher_width)

    def forward(self, views):
        """Views [B, 3, H, W] in [0, 1] to logits [B, C] and projected features [B, D], or None."""
        x = models.normalize(self.student, views)
        if not self.projection:
            return self.student(x), None
        with models.classifier_inputs(self.student) as seen:
            logits = self.student(x)
        return logits, self.projection(torch.cat(seen, -1))


def needs(teacher, student, num_supports, num_classes, args):
    """Passes forward and back on noise with a copy of the student. Returns the modules that training holds, as often as
    it does, and {what is done: the bytes of activations at its peak} of a batch of views. A UserError tells of an input
    size that the student's layers cannot take, batch normalisation of one view, ..."""
    size = models.input_size(student)
    views = f"{args.train_batch_size} views a batch of {size[0]}x{size[1]} pixels"
    with refusing(f"--student {args.student} cannot be trained on {views} ({{error}}): give another "
                  "--student_image_size, --train_batch_size or --student."):  # fmt: skip
        learner = Learner(copy.deepcopy(student), 1 if args.feature_weight else None).train()
        for parameter in learner.parameters():
            parameter.grad = torch.zeros_like(parameter)  # no activation

        def learn(count):
            logits, features = learner(torch.rand(count, 3, *size))
            if logits.shape[1:] != (num_classes,):
                raise ValueError(f"its answers have the shape {list(logits.shape)}")
            (logits.sum() + (features.sum() if args.feature_weight else 0)).backward()

        parts = {"training (--train_batch_size)": batch_bytes(learn, args.train_batch_size)}
    parts["the teacher (--train_batch_size)"] = models.answering_bytes(teacher, args.train_batch_size)
    if args.teacher_specialization == "fine_tune":  # of a copy, with AdamW's two moments, on supports and views of them
        parts["its training"] = 3 * bytes_of(teacher) + models.answering_bytes(teacher, 2 * num_supports, trained=True)
    return [teacher, *[student] * (5 if args.ema_decay else 4)], parts  # gradients, AdamW's two moments, the average


def list_others(args):
    """The folder of labelled images and the files of unlabelled ones that are to be trained on beside the supports."""
    others = args.train_dir or args.unlabeled_dir
    if args.supports_only:
        if others:
            note(f"--supports_only: {others} is left out")
        return None, []
    if args.unlabeled_dir:
        require_finished(args.unlabeled_dir)
    train_dir = args.train_dir or (None if others else TRAIN_DIR)
    return train_dir, find_images(args.unlabeled_dir) if args.unlabeled_dir else []


def open_others(unlabeled, classes, size, args):
    """(PIL image, label) of --train_dir and of files of unlabelled images, ready to make views of."""
    others = []
    for row, image in open_samples(args.train_dir) if args.train_dir else []:
        if row.get("label") not in classes:
            raise UserError(f"{args.train_dir} has an image of {row.get('label')}, and --support_dir has none.")
        others.append((for_views(image, size, args), classes.index(row["label"])))
    return others + [(for_views(open_image(path), size, args), UNKNOWN) for path in unlabeled]


def answering(teacher, args):
    """Function of a batch's number and its views to the teacher's logits and, for feature matching, its embedding.
    Where batches come round again (--num_views), each is answered once only."""
    answers = {}

    @torch.no_grad()
    def answer(number, views):
        if not args.num_views or number not in answers:
            embedding = teacher.embed(views)
            answers[number if args.num_views else 0] = teacher.classify(embedding), embedding
        return answers[number if args.num_views else 0]

    return answer


def train(student, teacher, views, args, accelerator, settings):
    """Distils the teacher into the student. Returns it, and a curve [[step, mean loss, agreement with the teacher]]."""
    device, checkpoint = accelerator.device, Path(args.output_dir) / "checkpoint.safetensors"
    learner = Learner(student, teacher.prototypes.shape[1] if args.feature_weight else None)
    learner = learner.to(device, memory_format=models.memory_format(student))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    state = {"learner": learner, "optimizer": optimizer}
    if args.ema_decay:
        state["average"] = average = ModelEmaV3(student, args.ema_decay)
    facts = load_checkpoint(checkpoint, settings, accelerator, **state)
    facts = facts or {"step": 0, "sums": [0, 0], "first": 0, "curve": []}
    with blaming(checkpoint):  # which may be of a version with facts of another form
        first_step, sums, first = int(facts["step"]), [float(x) for x in facts["sums"]], float(facts["first"])
        curve = [[int(step), float(loss), float(same)] for step, loss, same in facts["curve"]]
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    # All is where it should be: AdamW counts its steps on the CPU, for on a GPU it would wait for each parameter's.
    model, prepared = accelerator.prepare(learner, optimizer, device_placement=[False, False])
    if accelerator.scaler and facts.get("scaler"):  # of fp16's gradients
        accelerator.scaler.load_state_dict(facts["scaler"])

    numbers = batch_numbers(args, first_step, accelerator.process_index, accelerator.num_processes)
    lessons, mix, answer = zip(numbers, batches(views, numbers, args)), mixing(args), answering(teacher, args)
    interval, ignorance = max(1, args.max_train_steps // 10), loss_of_ignorance(views.num_classes, args)
    sums = torch.tensor(sums).to(device)  # of the loss, and of agreement with the teacher
    progress = tqdm(total=args.max_train_steps, initial=first_step, desc="distilling")
    model.train()
    for step in range(first_step, args.max_train_steps):
        for group in prepared.param_groups:
            group["lr"] = learning_rate(step, args)
        for number, (x, targets) in islice(lessons, args.gradient_accumulation_steps):
            x, targets = x.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mix:
                with seeded(generator(args.seed, "mix", number)):
                    x, targets = mix(x, targets)
            torch.manual_seed(generator(args.seed, "dropout", step, number).initial_seed())
            teacher_logits, embedding = answer(number, x)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    logits, projected = model(x)
                    loss = total_loss(logits, projected, teacher_logits, embedding, targets, args)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
            agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
            sums += torch.stack([loss.detach(), agreement]) / args.gradient_accumulation_steps
        if args.ema_decay:
            average.update(student, step + 1)
        if step == 0:  # an imprinted student may answer images that are unlike the supports worse than by guessing
            first = accelerator.reduce(loss.detach(), "mean").item()

        saves = (step + 1) % args.checkpointing_steps == 0 and step + 1 < args.max_train_steps
        shows = (step + 1) % interval == 0 or step + 1 == args.max_train_steps
        if saves or shows:  # else nothing waits for the device
            sums = accelerator.reduce(sums, "mean")
            loss, agreement = (sums / (step % interval + 1)).tolist()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} by step {step}: use a smaller --learning_rate, or no fp16.")
        if shows:
            curve.append([step + 1, loss, agreement])
            sums.zero_()
            progress.set_postfix(loss=f"{loss:.4f}", as_teacher=f"{agreement:.1%}")
            values = {"distillation/loss": loss, "distillation/agreement": agreement}
            accelerator.log(values | {"learning_rate": learning_rate(step, args)}, step + 1)
            if loss > DIVERGED * max(ignorance, first):
                raise UserError(f"the loss is {loss:.3g} by step {step}, {first:.3g} at first, {ignorance:.3g} where a "
                                "student knows nothing: it diverges. Use a smaller --learning_rate.")  # fmt: skip
        progress.update()
        if saves:
            if accelerator.is_main_process:
                facts = {"settings": settings, "step": step + 1, "sums": sums.tolist(), "first": first, "curve": curve}
                facts["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
                save_checkpoint(checkpoint, facts, **state)
            accelerator.wait_for_everyone()
    return (average.module if args.ema_decay else student), curve


def write_card(student, classes, paths, facts, args):
    """README.md of the student's folder, its manual: what it knows, learned from and is worth, and how to run it."""
    text = TEMPLATES.get_template("model_card.md").render(
        facts, args=args, classes=classes, folder=Path(args.output_dir).resolve(), image=str(paths[0].resolve()),
        size=models.input_size(student), parameters=sum(p.numel() for p in student.parameters()),
        architecture=student.pretrained_cfg["architecture"], ours=models.is_ours(student),
    )  # fmt: skip
    write_file(Path(args.output_dir) / "README.md", text.encode(errors="backslashreplace"))  # names may be no UTF-8


def finish(student, classes, paths, facts, args):
    """Measures the student where there are test images, writes its card and its record, and says how good it is."""
    if args.query_dir:
        facts["accuracy"] = models.accuracy_on(args.query_dir, student, models.with_head(student), classes)
    write_card(student, classes, paths, facts, args)
    write_json(Path(args.output_dir) / "distill.json", facts)  # last: it marks the student as done
    loss, ignorance = facts["loss"][-1][1], facts["loss_of_ignorance"]
    print(f"{args.output_dir}: loss {loss:.4f}; a student that knows nothing has {ignorance:.4f}")
    print(f"  its answer is the teacher's for {facts['agreement'][-1][1]:.1%} of the last views")
    if args.query_dir:
        print(f"  accuracy on {facts['accuracy']['count']} test images: {with_interval(facts['accuracy'])} %")
    else:
        print("  how accurate it is, test images say: give some as --query_dir, or to evaluate.py")


def main(args):
    args.train_dir, unlabeled = list_others(args)
    accelerator, output_dir = start(args), Path(args.output_dir)
    by_class = list_images(args.support_dir)
    if len(by_class) < 2:
        raise UserError(f"{args.support_dir} holds one class only: there is nothing to tell apart.")
    classes, (paths, labels) = list(by_class), with_labels(by_class)
    if (card := output_dir / "README.md").is_file() and b"library_name: timm" not in card.read_bytes():
        refuse_others(card)
    samples = list_samples(args.train_dir, classes) if args.train_dir else {}
    if args.query_dir:  # a mistake is better known now than after the training
        queries = chain(*list_images(args.query_dir, classes).values())
        require_unseen(queries, [*paths, *chain(*samples.values()), *unlabeled])
    settings = settings_of(args, *OUTSIDE) | {
        "support_images": {name: fingerprint(group) for name, group in by_class.items()},
        "train_images": {name: fingerprint(group) for name, group in samples.items()},
        "unlabeled_images": fingerprint(unlabeled),
        "teacher_weights": models.weights_of(args.teacher, args.teacher_checkpoint),
        "student_weights": models.weights_of(args.student, args.student_checkpoint),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if as_main_sees(lambda: check_settings(output_dir / "distill.json", settings), accelerator):
        accelerator.print(f"{output_dir} is already there, with the same settings")
        if args.query_dir and accelerator.is_main_process:
            finish(models.load_model(output_dir), classes, paths, read_json(output_dir / "distill.json"), args)
        return
    if models.class_names(output_dir) != classes:
        refuse_others(*(output_dir / name for name in ("model.safetensors", "config.json", "architectures.py")))

    backbone = models.load_model(args.teacher, True, args.teacher_image_size, args.teacher_checkpoint)
    student, is_trained = models.load_student(args, classes)
    announce(*needs(backbone, student, len(paths), len(classes), args), accelerator.device)
    teacher = make_teacher(backbone.to(accelerator.device), args, map(open_image, paths), labels)
    if not is_trained:
        note(f"{args.student} starts from random weights")
    else:
        supports = torch.stack([load_image(path, models.input_size(student)[0]) for path in paths])
        imprint(student, supports, labels, args.teacher_scale)

    size = max(models.input_size(teacher) + models.input_size(student))
    supports = [(for_views(open_image(path), size, args), label) for path, label in zip(paths, labels.tolist())]
    others = open_others(unlabeled, classes, size, args)
    views = Views(supports, others, len(classes), args.support_ratio, augmentation(size, args), args.seed)
    student, curve = train(student, teacher, views, args, accelerator, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student = student.to("cpu", memory_format=torch.contiguous_format).eval()
        models.save_model(student, output_dir, classes)
        facts = {"settings": settings, "classes": classes, "images": [len(supports), len(others)]}
        facts |= {"loss": [row[:2] for row in curve], "agreement": [row[::2] for row in curve]}
        facts["loss_of_ignorance"] = loss_of_ignorance(len(classes), args)
        facts["starts_from"] = is_trained and (args.student_checkpoint or args.student)
        finish(student, classes, paths, facts, args)
        (output_dir / "checkpoint.safetensors").unlink(missing_ok=True)
    accelerator.end_training()


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/student")
    add = parser.add_argument
    add("--support_dir", default="outputs/demo/support", help="the real images: one folder per class")
    add("--train_dir", help="generated or other images of the classes, in a folder for each or in tar shards; default: "
        f"{TRAIN_DIR}, unless --unlabeled_dir is given")  # fmt: skip
    add("--unlabeled_dir", help="images of anything, in folders or not, which the teacher alone labels")
    add("--supports_only", action="store_true", help="train on the supports alone")
    add("--query_dir", help="test images of the classes, never trained on: the model card tells the accuracy on them")
    add("--support_ratio", type=cli.share, default=0.25, help="share of the views that show supports")
    teacher = parser.add_argument_group("teacher").add_argument
    teacher("--teacher", default="assets/teacher", help="timm backbone: model folder, timm name or hf-hub:name")
    teacher("--teacher_checkpoint", help="safetensors file of weights for it, as of a meta-trained one")
    teacher("--teacher_image_size", type=cli.positive_int, help="the teacher's input side; default: its own")
    teacher("--teacher_specialization", choices=SPECIALISATIONS, default="prototypes", help="of the teacher on the "
            "supports: cosine prototypes, a linear layer on them, or the whole backbone as in P>M>F")  # fmt: skip
    teacher("--teacher_scale", type=cli.positive, default=10.0, help="inverse softmax temperature of the cosines")
    student = parser.add_argument_group("student").add_argument
    student("--student", default="assets/student",
            help="model folder or hf-hub:name to start from, or timm name for random weights")  # fmt: skip
    student("--student_checkpoint", help="safetensors file of weights to start from")
    student("--student_image_size", type=cli.positive_int, help="the student's input side; default: its own")
    loss = parser.add_argument_group("loss").add_argument
    loss("--temperature", type=cli.positive, default=1.0, help="softmax temperature of the distillation loss")
    loss("--hard_label_weight", type=cli.share, default=0.0, help="share of the cross-entropy of labels in the loss")
    loss("--feature_weight", type=cli.non_negative, default=0.0, help="weight of matching the teacher's features")
    views = parser.add_argument_group("views").add_argument
    views("--min_crop", type=cli.positive_share, default=0.6, help="smallest area of a random crop")
    views("--flip_probability", type=cli.share, default=0.5, help="of mirroring; 0 where mirror images are wrong")
    views("--color_jitter", type=cli.non_negative, default=0.4, help="strength, of brightness, contrast and colour")
    views("--mixup", type=cli.non_negative, default=0.0, help="mixup's Beta parameter; 0 is off")
    views("--cutmix", type=cli.non_negative, default=0.0, help="CutMix's Beta parameter; 0 is off")
    views("--num_views", type=cli.natural_int, default=0, help="views in all, in whole batches, which are made "
          "and answered by the teacher once, and then come round again; 0: always new ones")  # fmt: skip
    views("--dataloader_num_workers", type=cli.natural_int, help="processes that make views; default: as many as "
          "there are cores for each GPU, none on a CPU")  # fmt: skip
    training = parser.add_argument_group("training").add_argument
    training("--max_train_steps", type=cli.positive_int, default=300, help="steps of optimisation")
    training("--train_batch_size", type=cli.positive_int, default=50, help="views a pass and process")
    training("--gradient_accumulation_steps", type=cli.positive_int, default=1, help="passes a step")
    training("--learning_rate", type=cli.positive, default=1e-3, help="AdamW's highest learning rate")
    training("--weight_decay", type=cli.non_negative, default=1e-2, help="AdamW's weight decay")
    training("--ema_decay", type=cli.share, default=0.0, help="of an average of the weights, kept instead; 0 is off")
    training("--checkpointing_steps", type=cli.positive_int, default=100, help="steps between checkpoints")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
