"""Makes new images of each class that tint_invert.py has inverted (TINT, Landolsi and Kahl, 2406.03146).

A support image's inverted latent is blended with noise and denoised with the learned word and that image's own
null-text embeddings, which give way to the empty prompt as alpha grows (--null_text_fade 0: they never do, as in the
paper): alpha 0 gives the image back, alpha 1 a free sample of the class.

    accelerate launch tint_generate.py --inversion_dir outputs/demo/inversion --num_images_per_class 100
"""

import common.passive  # noqa: F401  (before torch is loaded)

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

import torch
from accelerate.utils import tqdm
from torchvision.transforms.v2 import functional as TF

from common import diffusion, models, records
from common.cli import UserError, argument_parser, below_one, non_negative, note, positive_int, refuse_others, run
from common.generated import agreement, level_of
from common.images import EXTENSIONS, as_picture, as_tensor, encode_image, load_image, save_grid, with_labels
from common.inversion import EMBEDS, open_inversions
from common.memory import announce
from common.processes import generator, peak_memory, share_out, start
from common.shards import ROWS, open_samples, write_shard

DROPPED = "dropped.jsonl"  # metadata of images that the filter dropped: in metadata.jsonl each row has its image
OUTSIDE = ("batch_size", "inversion_dir", "support_dir", "compile", "agreement")  # not which images are made
OTHERS = ("*.tar", "*.jsonl", "grid.png")  # what it writes beside class folders, and would write over
FIELDS = (("label", str, None), ("index", int, None), ("file_name", str | None, 0), ("shard", str, ""))  # of each row


def rms(z):
    """Root mean square of each latent: [B, C, h, w] to [B, 1, 1, 1]."""
    return (z**2).mean((1, 2, 3), keepdim=True).sqrt()


def blend(z_T, noise, alpha):
    """Norm-corrected alpha blending of inverted latents with noise (2406.03146, section 3.3):

    z' = (1 - alpha) z_T + alpha n
    z  = z' * ((1 - alpha) rms(z_T) + alpha rms(n)) / rms(z')

    A sum of independent latents is shorter than its parts; the second line gives back the length at which the
    network expects noise to be.

    Args:
        z_T, noise: [B, C, h, w]. alpha: [B] in [0, 1].
    """
    alpha = alpha[:, None, None, None]
    mixed = (1 - alpha) * z_T + alpha * noise
    return mixed * ((1 - alpha) * rms(z_T) + alpha * rms(noise)) / rms(mixed)


def supports_in_turn(name, facts, finished, args):
    """The index of the support from which a class's images are made, for each round of alphas: all in turn, the rarest
    first. Images that are `finished`, {(class, index): row}, keep theirs; and a support that was added later gets its
    share, beyond the number of images asked for."""
    num_rounds, num_alphas = -(-args.num_images_per_class // len(args.alpha)), len(args.alpha)
    later = facts.get("added", []) if args.method != "textual_inversion" else []  # which takes no support
    added = [k for k, image in enumerate(facts["images"]) if image in later]
    rounds, count = [], Counter(dict.fromkeys(range(len(facts["images"])), 0))
    while len(rounds) < num_rounds or any(count[k] < max(1, num_rounds // len(count)) for k in added):
        made = [finished.get((name, len(rounds) * num_alphas + k), {}).get("support") for k in range(num_alphas)]
        known = [support for support in made if support in count]
        rounds.append(known[0] if known else min(count, key=lambda k: (count[k], k)))
        count[rounds[-1]] += 1
    return rounds


def plan_images(folders, finished, args):
    """What each image is made of: a list of rows of metadata for each class. Its images take the alphas in turn, and
    the supports each time the alphas are through, so that a column of grid.png shows one support at every alpha."""
    plans = []
    for name, facts in folders.items():
        rows, rounds, asked = [], supports_in_turn(name, facts, finished, args), args.num_images_per_class
        for index in range(asked if (len(rounds) - 1) * len(args.alpha) < asked else len(rounds) * len(args.alpha)):
            turn, k = divmod(index, len(args.alpha))
            row = {"label": name, "index": index, "seed": args.seed}
            row["guidance_scale"] = args.guidance_scale[k % len(args.guidance_scale)]
            if args.method != "textual_inversion":
                support, alpha = rounds[turn], args.alpha[k]
                if alpha == "uniform":
                    alpha = torch.rand((), generator=generator(args.seed, name, index, "alpha")).item()
                row |= {"support": support, "support_image": facts["images"][support], "alpha": alpha}
            rows.append(row)
        plans.append(rows)
    return plans


def starting_point(rows, folders, schedule, prompt_embeds, empty, args):
    """How the walk of a batch of images begins, and what leads it.

    Returns:
        latents z [B, C, h, w]; text embeddings [B, L, D]; null-text embeddings [B, T, L, D], or [B, 1, L, D] for all
        steps; the step at which each image's walk begins [B]. All on the CPU.
    """
    files = [folders[row["label"]]["null_text"] for row in rows]
    shape = files[0].get_slice("latents").get_shape()[1:]
    rngs = [generator(row["seed"], row["label"], row["index"]) for row in rows]
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
    prompt_embeds = torch.stack([prompt_embeds[row["label"]] for row in rows])
    first_step = torch.zeros(len(rows), dtype=torch.long)
    null = empty[None].expand(len(rows), -1, -1, -1)
    if args.method == "textual_inversion":
        return noise, prompt_embeds, null, first_step

    def of_supports(tensor):
        return torch.stack([file.get_slice(tensor)[row["support"]] for file, row in zip(files, rows)]).float()

    alpha = torch.tensor([row["alpha"] for row in rows])
    if args.method == "img2img":  # noised to the share alpha of the way (SDEdit, 2108.01073; DA-Fusion, 2302.07944)
        num_steps = len(schedule.timesteps)
        first_step = num_steps - (alpha * num_steps).round().long()
        abar = torch.tensor(schedule.abar)[first_step][:, None, None, None]
        return abar.sqrt() * of_supports("image_latents") + (1 - abar).sqrt() * noise, prompt_embeds, null, first_step
    kept = (1 - args.null_text_fade * alpha).clamp(min=0)[:, None, None, None]
    null = empty + kept * of_supports("null_offsets")
    return blend(of_supports("latents"), noise, alpha), prompt_embeds, null, first_step


def walk(inverted_steps, first, alpha, args):
    """Which of the inversion's steps an image takes, spread evenly from its `first` on: --num_inference_steps, of a
    walk that begins late its share; all, where more than half of a support's null-text leads, fitted to each of them.
    """
    follows = args.method in ("tint", "null_text") and args.null_text_fade * alpha < 0.5
    left = inverted_steps - first
    count = left if follows else min(left, -(-args.num_inference_steps * left // inverted_steps))
    return tuple(first + k * left // count for k in range(count))


def generate(rows, folders, pipe, schedule, prompt_embeds, empty, device, args, progress):
    """The images [B, 3, H, W] in [0, 1], on the CPU, of a batch of rows."""
    z, prompts, null, first_step = starting_point(rows, folders, schedule, prompt_embeds, empty, args)
    w = torch.tensor([row["guidance_scale"] for row in rows])
    num_steps = len(schedule.timesteps)
    walks = [walk(num_steps, k, row.get("alpha"), args) for row, k in zip(rows, first_step.tolist())]
    for steps in sorted({*walks}):
        on = torch.tensor([walked == steps for walked in walks])
        parts = (x[on].to(device, non_blocking=True) for x in (z, prompts, null, w))
        z[on] = diffusion.denoise(pipe.unet, schedule, *parts, steps, progress).to(z)
        progress.update((num_steps - len(steps)) * int(on.sum()))
    images = diffusion.decode_latents(pipe, z.to(device))
    if images.shape[-1] != args.image_size:
        images = TF.resize(images, [args.image_size] * 2, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return images.cpu()


def load_teacher(folders, args, device):
    """The teacher, specialised by cosine prototypes on the support images of the classes in `folders`, and the share of
    them that it gets right when each is held out, or None. A UserError where there is one class only, or none."""
    roots = {name: Path(facts["support_dir"]) / name for name, facts in folders.items()}
    paths, labels = with_labels({name: [root / k for k in folders[name]["images"]] for name, root in roots.items()})
    missing = [path for path in paths if not path.is_file()]
    if missing or len(folders) < 2:
        why = f"{missing[0]} is missing: say where with --support_dir" if missing else "there is one class only"
        raise UserError(f"The teacher needs the support images of two classes or more, and {why}.")
    model = models.load_model(args.teacher, image_size=args.teacher_image_size).to(device)
    supports = torch.stack([load_image(path, models.input_size(model)[0]) for path in paths]).to(device)
    teacher = models.PrototypeClassifier(model, supports, labels)
    answers = models.held_out_answers(teacher.support_features.cpu(), labels)
    known = answers >= 0
    return teacher, (answers == labels)[known].double().mean().item() if known.any() else None


@torch.no_grad()
def drop_strangers(rows, images, teacher, names, threshold):
    """Notes in the rows of a batch of images which of them, as they will be written, the teacher gives to another class
    with a confidence above the threshold: these are dropped."""
    size = models.input_size(teacher)[0]
    pictures = torch.stack([as_tensor(as_picture(x), size) for x in images])
    confidences, answers = teacher(pictures.to(teacher.center.device)).softmax(-1).max(-1)
    for row, confidence, answer in zip(rows, confidences.tolist(), answers.tolist()):
        if names[answer] != row["label"] and confidence > threshold:
            row |= {"file_name": None, "dropped": f"the teacher calls it {names[answer]}, confidence {confidence:.3f}"}


def save_overview(rows, folders, args, columns=24):
    """grid.png: the supports of each class side by side on top, then a row of generated images of each alpha, or fifth
    of alphas drawn at random. Classes and alphas stand beside them."""
    names = list(folders)[:columns]
    per_class = min(columns // len(names), *(len(folders[name]["images"]) for name in names))
    grid, titles, blank, groups = [], [], torch.ones(3, args.image_size, args.image_size), {}
    if args.method != "textual_inversion":
        paths = [Path(folders[n]["support_dir"]) / n / s for n in names for s in folders[n]["images"][:per_class]]
        if all(path.is_file() for path in paths):
            grid.append([load_image(path, args.image_size) for path in paths])
            titles.append("supports")
    for row in rows:
        level = level_of(row.get("alpha"), args.alpha == ["uniform"])
        groups.setdefault(level, {name: [] for name in names}).get(row["label"], []).append(row["file_name"])
    shown = {level: [files[:per_class] for files in of_class.values()] for level, of_class in sorted(groups.items())}
    wanted = {file for line in shown.values() for files in line for file in files}
    pictures = {row["file_name"]: as_tensor(image) for row, image in open_samples(args.output_dir, wanted=wanted)}
    for level, line in shown.items():
        grid.append([pictures[k] if k else blank for files in line for k in (files + [None] * per_class)[:per_class]])
        titles.append("no support" if level is None else f"alpha {level:g}")
    save_grid(grid, Path(args.output_dir) / "grid.png", titles, names)


def check_arguments(args):
    """Raises UserError for options that cannot be."""
    numbers = [alpha for alpha in args.alpha if alpha != "uniform"]
    if any(not 0 <= alpha <= 1 for alpha in numbers) or (numbers and "uniform" in args.alpha):
        raise UserError(f"--alpha {args.alpha}: give numbers between 0 and 1, or the word uniform alone.")
    if args.guidance_scale and len(args.guidance_scale) not in (1, len(args.alpha)):
        raise UserError(f"--guidance_scale {args.guidance_scale}: give one number, or one for each --alpha.")


def recorded_settings(args):
    """The options that decide which images are made."""
    # Images can be added to folders; in shards, more would fall into other files.
    outside = ["num_images_per_class", "shard_size"] if args.format == "folder" else []
    outside += ["teacher", "teacher_image_size"] if args.filter_threshold is None else []
    return records.settings_of(args, *OUTSIDE, *outside)


def read_rows(path):
    """The rows of a file of metadata; none where it is missing, or another run that ends takes it away."""
    with suppress(FileNotFoundError):
        rows = [row for row in records.read_json_lines(path) if isinstance(row, dict)]
        return [row for row in rows if all(isinstance(row.get(k, default), kind) for k, kind, default in FIELDS)]
    return []


def read_finished(args):
    """{(label, index): row} of the images made so far, of this and earlier runs."""
    folder = Path(args.output_dir)
    files = [*(folder / ROWS).glob("*.jsonl"), folder / "metadata.jsonl", folder / DROPPED]  # in the order of writing
    return {
        (row["label"], row["index"]): row
        for row in (row for file in files for row in read_rows(file))
        if row["file_name"] is None
        or (row["file_name"] == file_name(row, args) and (folder / row.get("shard", row["file_name"])).is_file())
    }


def file_name(row, args):
    return f"{row['label']}/{row['index']:05}.{args.image_format}"


def write_images(k, rows, images, finished, args):
    """Writes chunk `k`: its `images`, of each row the bytes of its file, but for those dropped, as files or as a shard;
    then its rows, which mark it. Files of `finished` rows stay: in a chunk that grew, their last bits would change."""
    output_dir = Path(args.output_dir)
    rows = [{"file_name": file_name(row, args)} | row for row in rows]
    if args.format == "webdataset":
        rows = [row | {"shard": f"{k:06d}.tar"} for row in rows]
        write_shard(output_dir / f"{k:06d}.tar", rows, images)
    else:
        rows = [finished.get((row["label"], row["index"]), row) for row in rows]
        for row, image in zip(rows, images):
            if row["file_name"] and (row["label"], row["index"]) not in finished:
                records.write_file(output_dir / row["file_name"], image)
    mark = records.digest([(row["label"], row["index"]) for row in rows])  # other batches later have other marks
    records.write_json_lines(output_dir / ROWS / f"{mark}.jsonl", rows)


def activations(pipe, resolution, count):
    """{what is done: the bytes of activations at its peak} of `count` images that are made together."""
    denoising = 2 * count * diffusion.bytes_of_a_latent(pipe, resolution)
    return {"denoising (--batch_size)": denoising, "decoding": diffusion.decoding_bytes(pipe, resolution, count)}


def main(args):
    check_arguments(args)
    accelerator = start(args)
    folders = open_inversions(args)
    inverted = next(iter(folders.values()))["settings"]
    model = args.pretrained_model_name_or_path or inverted["pretrained_model_name_or_path"]
    if args.guidance_scale is None:
        args.guidance_scale = [inverted["guidance_scale"]]
    if args.format == "webdataset" and (hidden := [k for k in folders if k.startswith("__") and k.endswith("__")]):
        raise UserError(f"Readers of WebDataset leave {hidden[0]} out: rename that class, or use --format folder.")
    output_dir, device = Path(args.output_dir), accelerator.device
    record = output_dir / "generation.json"
    if args.image_size is None and record.is_file():  # a smaller photo that was added since changes nothing
        with records.blaming(record):
            args.image_size = int(records.read_json(record)["settings"]["image_size"])
    elif args.image_size is None:
        args.image_size = min(facts["image_size"] for facts in folders.values())
    elif args.image_size > inverted["resolution"]:
        note(f"--image_size {args.image_size}: images are drawn at {inverted['resolution']} pixels, then enlarged.")
    if args.num_inference_steps > inverted["num_inference_steps"]:
        args.num_inference_steps = inverted["num_inference_steps"]
        note(f"--num_inference_steps: the inversion has {args.num_inference_steps}, all of which are taken.")
    if not args.pretrained_model_name_or_path:
        args.revision, args.variant = args.revision or inverted["revision"], args.variant or inverted["variant"]
    pipe = diffusion.load_stable_diffusion(model, device, accelerator.mixed_precision, args.revision, args.variant)
    width = next(iter(folders.values()))["null_text"].get_slice("null_offsets").get_shape()[-1]
    if width != pipe.text_encoder.config.hidden_size:
        raise UserError(f"{model} is another kind of model than the one that {args.inversion_dir} was inverted into.")
    if pipe.fingerprint != inverted["model_weights"] and not args.pretrained_model_name_or_path:
        raise UserError(f"The weights of {model} are not those that {args.inversion_dir} was inverted into: invert "
                        "again, or, if meant so, name the model with --pretrained_model_name_or_path.")  # fmt: skip
    settings = recorded_settings(args)
    settings |= {"model_weights": pipe.fingerprint, "mixed_precision": accelerator.mixed_precision}
    settings["teacher_weights"] = None if args.filter_threshold is None else models.weights_of(args.teacher)
    settings["inversions"] = {k: v for facts in folders.values() for k, v in facts["fingerprints"].items()}
    may_grow = ("inversions",) if args.format == "folder" else ()
    there = [path for path in output_dir.glob("*/*") if path.suffix.lower() in EXTENSIONS]
    if not records.check_settings(record, settings, may_grow):
        refuse_others(*there, *(p for k in OTHERS for p in output_dir.glob(k)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        records.write_json(record, {"settings": settings})

    schedule = diffusion.make_schedule(pipe.scheduler, inverted["num_inference_steps"])
    for name in folders:
        pipe.load_textual_inversion(str(Path(args.inversion_dir) / name / EMBEDS))
    with torch.no_grad():
        empty = diffusion.encode_prompts(pipe, [""]).cpu()
        texts = [inverted["prompt"].replace("{}", facts["placeholder_token"]) for facts in folders.values()]
        prompt_embeds = dict(zip(folders, torch.cat([diffusion.encode_prompts(pipe, [t]) for t in texts]).cpu()))
    teacher, held_out = (None, None) if args.filter_threshold is None else load_teacher(folders, args, device)
    finished = read_finished(args)
    plans = plan_images(folders, finished, args)
    rows = [row for plan in plans for row in plan]
    planned = {file_name(row, args) for row in rows}
    if others := {str(p.relative_to(output_dir)) for p in there} - planned:
        raise UserError(f"{output_dir} holds images of no use here, as {min(others)}: give another --output_dir.")
    # Chunks are the same in every run, so that an image is always computed in the same company, to the same bits; those
    # of class folders are of one class, so that others can be added.
    groups, size = (plans, args.batch_size) if args.format == "folder" else ([rows], args.shard_size)
    chunks = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    left = [k for k, chunk in enumerate(chunks) if any((row["label"], row["index"]) not in finished for row in chunk)]
    mine = [(k, chunks[k]) for k in share_out(left, accelerator)]
    new = sum((row["label"], row["index"]) not in finished for _, chunk in mine for row in chunk)
    steps = len(schedule.timesteps) * sum(len(chunk) for _, chunk in mine)
    bar = tqdm(total=steps, desc=f"generating {new} images", unit="step")
    if mine:
        parts = activations(pipe, inverted["resolution"], min(args.batch_size, max(len(chunk) for _, chunk in mine)))
        if teacher:
            parts["the filter (--batch_size)"] = models.answering_bytes(teacher.model, args.batch_size)
        announce([pipe.unet, pipe.vae, pipe.text_encoder, *([teacher.model] if teacher else [])], parts, device)
    if args.compile:
        pipe.unet = torch.compile(pipe.unet)
    with ThreadPoolExecutor(4) as pool:  # files are encoded and written while the next images are made
        writing = pool.submit(list)
        for k, chunk in mine:
            images = []
            for i in range(0, len(chunk), args.batch_size):
                batch = chunk[i : i + args.batch_size]
                x = generate(batch, folders, pipe, schedule, prompt_embeds, empty, device, args, bar)
                if not x.isfinite().all():
                    raise UserError(f"{file_name(batch[0], args)} came out as NaN: use --mixed_precision bf16 or no.")
                if teacher is not None:
                    drop_strangers(batch, x, teacher, list(folders), args.filter_threshold)
                images.append(pool.map(encode_image, x, repeat(args.image_format)))
            writing.result()  # raises what has gone wrong
            writing = pool.submit(write_images, k, chunk, chain.from_iterable(images), finished, args)
        writing.result()
    bar.close()
    new = accelerator.gather(torch.tensor([new], device=device)).sum().item()
    if accelerator.is_main_process:
        finished = read_finished(args)
        made = {(row["label"], row["index"]): finished[row["label"], row["index"]] for row in rows}
        kept, dropped = ([r for r in made.values() if bool(r["file_name"]) == whole] for whole in (True, False))
        records.write_json_lines(output_dir / "metadata.jsonl", kept)
        if dropped:
            records.write_json_lines(output_dir / DROPPED, dropped)
        for path in (output_dir / ROWS).glob("*.jsonl"):  # but not those of others that are at work here
            if {(row["label"], row["index"]) for row in read_rows(path)} <= made.keys():
                path.unlink(missing_ok=True)
        with suppress(OSError):
            (output_dir / ROWS).rmdir()
        if kept:
            save_overview(kept, folders, args)
        if args.agreement and kept:
            try:
                if teacher is None:
                    teacher, held_out = load_teacher(folders, args, device)
                found = agreement(output_dir, teacher, held_out, list(folders), args.alpha == ["uniform"])
                print(*found, sep="\n")
            except UserError as error:  # the images are there all the same
                print(f"How often the teacher agrees is not known: {error}")
        print(f"{len(kept)} images in {output_dir}, {new} made now, {len(dropped)} dropped; see {output_dir}/grid.png")
        print(f"peak memory of a process: {peak_memory(device) / 2**30:.2f} GiB")
    accelerator.end_training()


def number_or_uniform(text):
    return text if text == "uniform" else float(text)


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/generated")
    add = parser.add_argument
    add("--inversion_dir", default="outputs/demo/inversion", help="what tint_invert.py wrote")
    add("--pretrained_model_name_or_path", help="the Stable Diffusion model; default: the one inverted with")
    add("--revision", help="its revision on the hub; default: the one inverted with, or its latest")
    add("--variant", help="its weight files' variant; default: likewise")
    add("--num_images_per_class", type=positive_int, default=100, help="images to make of each class")
    add("--method", choices=["tint", "textual_inversion", "null_text", "img2img"], default="tint",
        help="tint: the paper; textual_inversion: learned word, fresh noise; null_text: no learned word; img2img: "
        "learned word, supports noised to the share alpha of the steps, no inverted latents")  # fmt: skip
    add("--alpha", type=number_or_uniform, nargs="+", default=[0.6, 0.8, 1.0], metavar="ALPHA|uniform",
        help="blending factors, taken in turn: 0 copies, 1 is free; uniform: drawn for each image")  # fmt: skip
    add("--null_text_fade", type=non_negative, default=1.0, help="how fast a support's null-text gives way to the "
        "empty prompt, its share being 1 - fade * alpha, at least 0; 0: it never does (the paper)")  # fmt: skip
    add("--guidance_scale", type=non_negative, nargs="+", help="scale w, or one for each --alpha; default: inversion's")
    add("--num_inference_steps", type=positive_int, default=4, help="steps to take, evenly spread over those of the "
        "inversion; all, where an image keeps more than half of its support's null-text")  # fmt: skip
    add("--filter_threshold", type=below_one, help="drop what the teacher gives another class with more confidence")
    add("--teacher", default="assets/teacher", help="the filter's backbone: model folder, timm name or hf-hub:name")
    add("--teacher_image_size", type=positive_int, help="the teacher's input side; default: its own")
    add("--support_dir", help="support images, for the teacher; default: where they were inverted from")
    add("--agreement", action=argparse.BooleanOptionalAction, default=True, help="say how often the teacher agrees")
    group = parser.add_argument_group("output").add_argument
    group("--image_size", type=positive_int, help="side of the images written; default: the support images' side")
    group("--image_format", choices=["png", "webp"], default="png", help="both without loss; webp is smaller")
    group("--format", choices=["folder", "webdataset"], default="folder",
          help="class folders, or tar files of many images each (pip install webdataset)")  # fmt: skip
    group("--shard_size", type=positive_int, default=1000, help="images in a tar file")
    group = parser.add_argument_group("speed and memory").add_argument
    group("--batch_size", type=positive_int, default=50, help="images denoised together; they are decoded as many at a "
          f"time as take {diffusion.VAE_BYTES / 2**30:.0f} GiB")  # fmt: skip
    group("--compile", action="store_true", help="compile the UNet: slow to start, then faster")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
