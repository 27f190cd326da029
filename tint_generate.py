"""Makes new images of each class that tint_invert.py has inverted (TINT, Landolsi and Kahl, 2406.03146).

A support image's inverted latent is blended with noise and denoised with the learned word and that image's own
null-text embeddings, which give way to the empty prompt as alpha grows (--null_text_fade 0: they never do, as in the
paper): alpha 0 gives the image back, alpha 1 a free sample of the class.

    accelerate launch tint_generate.py --inversion_dir outputs/demo/inversion --num_images_per_class 100
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from common import diffusion
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
from common.images import load_image, save_grid, save_image


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


def plan_images(names, supports, args):
    """What each image is made of: a list of rows of metadata, class by class.

    Image i of a class takes the alphas in turn, and the supports in turn each time the alphas are through, so that a
    column of the picture grid shows one support at every alpha.
    """
    rows = []
    for name in names:
        for index in range(args.num_images_per_class):
            row = {"file_name": f"{name}/{index:05d}.png", "label": name, "index": index, "seed": args.seed}
            if args.method != "textual_inversion":
                support = index // len(args.alpha) % len(supports[name])
                alpha = args.alpha[index % len(args.alpha)]
                row |= {"support": support, "support_image": supports[name][support], "alpha": alpha}
            rows.append(row)
    return rows


def starting_point(rows, folders, pipe, prompt_embeds, empty, args):
    """Latents z [B, C, h, w], text embeddings [B, L, D] and null-text embeddings [B, T, L, D] of a batch of images."""
    channels, side = pipe.unet.config.in_channels, folders[rows[0]["label"]]["latent_side"]
    rngs = [generator(row["seed"], row["label"], row["index"]) for row in rows]
    noise = torch.stack([torch.randn(channels, side, side, generator=rng) for rng in rngs])
    prompt_embeds = torch.stack([prompt_embeds[row["label"]] for row in rows])
    if args.method == "textual_inversion":
        return noise, prompt_embeds, empty[None].expand(len(rows), -1, -1, -1)
    files = [folders[row["label"]]["null_text"] for row in rows]
    z_T = torch.stack([file.get_slice("latents")[row["support"]] for file, row in zip(files, rows)])
    offsets = torch.stack([file.get_slice("null_offsets")[row["support"]] for file, row in zip(files, rows)])
    alpha = torch.tensor([row["alpha"] for row in rows])
    share = (1 - args.null_text_fade * alpha).clamp(min=0)[:, None, None, None]
    return blend(z_T, noise, alpha), prompt_embeds, empty + share * offsets.float()


def generate(rows, folders, pipe, schedule, prompt_embeds, empty, device, args):
    """The images [B, 3, H, W] in [0, 1] of a batch of rows."""
    start_at = starting_point(rows, folders, pipe, prompt_embeds, empty, args)
    z, prompts, null = (x.to(device) for x in start_at)
    z = diffusion.denoise(pipe.unet, schedule, z, prompts, null, args.guidance_scale)
    images = diffusion.decode_latents(pipe.vae, z)
    if images.shape[-1] != args.image_size:
        images = TF.resize(images, [args.image_size] * 2, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return images


def open_inversion(record, name):
    """The facts of one class's inversion.json, with its file `name`.safetensors opened as `null_text`."""
    file = record.parent / f"{name}.safetensors"
    if name == "null_text_plain" and not file.is_file():
        raise UserError(f"{file} is missing: --method null_text needs tint_invert.py --plain_prompt.")
    try:
        facts = json.loads(record.read_text())
        facts["null_text"] = safe_open(file, "pt")
        facts["latent_side"] = facts["null_text"].get_slice("latents").get_shape()[-1]
        return facts
    except Exception as error:  # json and safetensors raise their own kinds
        raise UserError(f"{record.parent} is no inversion ({error}): delete it and invert again.") from error


def open_inversions(args):
    """{class name: facts of its inversion, with its null-text file opened}, from the folders of tint_invert.py.

    Raises:
        UserError: no inversions, unfinished or foreign files, or classes inverted with different settings.
    """
    root = Path(args.inversion_dir)
    records = sorted(root.glob("*/inversion.json"))
    if not records:
        raise UserError(f"{root} holds no <class>/inversion.json: run tint_invert.py --output_dir {root} first.")
    name = "null_text_plain" if args.method == "null_text" else "null_text"
    folders = {}
    for record in records:
        facts = open_inversion(record, name)
        folders[facts["class"]] = facts
    for record, facts in zip(records, folders.values()):
        del facts["settings"]["support_images"]
        files = [record.parent / "learned_embeds.safetensors", record.parent / f"{name}.safetensors"]
        facts["fingerprint"] = fingerprint(files)
        if facts["settings"] != next(iter(folders.values()))["settings"]:
            raise UserError(f"The classes of {root} were inverted with different settings: invert them again alike.")
    return folders


def save_overview(rows, folders, args, columns=24):
    """grid.png: the supports of each class side by side on top, then one row of generated images per alpha."""
    names = list(folders)[:columns]
    per_class = min(columns // len(names), *(len(folders[name]["images"]) for name in names))
    grid = []
    if args.method != "textual_inversion":
        paths = [Path(folders[n]["support_dir"]) / n / s for n in names for s in folders[n]["images"][:per_class]]
        if all(path.is_file() for path in paths):
            grid.append([load_image(path, args.image_size) for path in paths])
    for alpha in dict.fromkeys(row.get("alpha") for row in rows):
        line = []
        for name in names:
            shown = [row for row in rows if row["label"] == name and row.get("alpha") == alpha][:per_class]
            line += [load_image(Path(args.output_dir) / row["file_name"]) for row in shown]
            line += [torch.ones(3, args.image_size, args.image_size)] * (per_class - len(shown))
        grid.append(line)
    save_grid(grid, Path(args.output_dir) / "grid.png")


def main(args):
    if any(not 0 <= alpha <= 1 for alpha in args.alpha):
        raise UserError(f"--alpha {args.alpha}: must lie between 0 and 1.")
    if args.null_text_fade < 0:
        raise UserError(f"--null_text_fade {args.null_text_fade}: must be 0 or more.")
    folders = open_inversions(args)
    inverted = next(iter(folders.values()))["settings"]
    model = args.pretrained_model_name_or_path or inverted["pretrained_model_name_or_path"]
    if args.guidance_scale is None:
        args.guidance_scale = inverted["guidance_scale"]
    if args.image_size is None:
        args.image_size = min(facts["image_size"] for facts in folders.values())
    accelerator = start(args)
    output_dir = Path(args.output_dir)
    settings = settings_of(args, "num_images_per_class", "batch_size", "inversion_dir")
    settings["inversions"] = {name: facts["fingerprint"] for name, facts in folders.items()}
    if not check_settings(output_dir / "generation.json", settings) and accelerator.is_main_process:
        write_json(output_dir / "generation.json", {"settings": settings})

    device = accelerator.device
    pipe = diffusion.load_stable_diffusion(
        model, device, accelerator.mixed_precision, inverted["revision"], inverted["variant"]
    )
    width = next(iter(folders.values()))["null_text"].get_slice("null_offsets").get_shape()[-1]
    if width != pipe.text_encoder.config.hidden_size:
        raise UserError(f"{model} is another kind of model than the one that {args.inversion_dir} was inverted into.")
    schedule = diffusion.make_schedule(pipe.scheduler, inverted["num_inference_steps"])
    for name in folders:
        pipe.load_textual_inversion(str(Path(args.inversion_dir) / name / "learned_embeds.safetensors"))
    with torch.no_grad():
        empty = diffusion.encode_prompts(pipe, [""]).cpu()
        texts = [
            inverted["plain_prompt"]
            if args.method == "null_text"
            else inverted["prompt"].replace("{}", facts["placeholder_token"])
            for facts in folders.values()
        ]
        prompt_embeds = dict(zip(folders, torch.cat([diffusion.encode_prompts(pipe, [t]) for t in texts]).cpu()))

    rows = plan_images(folders, {name: facts["images"] for name, facts in folders.items()}, args)
    others = {str(p.relative_to(output_dir)) for p in output_dir.glob("*/*.png")} - {row["file_name"] for row in rows}
    if others:
        raise UserError(f"{output_dir} holds images that this run does not make, as {min(others)}: remove them.")
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    mine = [row for row in mine if not (output_dir / row["file_name"]).is_file()]
    with tqdm(total=len(mine), desc="generating", unit="image", disable=not accelerator.is_local_main_process) as bar:
        for i in range(0, len(mine), args.batch_size):
            batch = mine[i : i + args.batch_size]
            images = generate(batch, folders, pipe, schedule, prompt_embeds, empty, device, args)
            if not images.isfinite().all():
                raise UserError(f"{batch[0]['file_name']} came out as NaN: use --mixed_precision bf16 or no.")
            for row, image in zip(batch, images.cpu()):
                save_image(image, output_dir / row["file_name"])
            bar.update(len(batch))
    new = accelerator.gather(torch.tensor([len(mine)], device=device)).sum().item()
    if accelerator.is_main_process:
        with whole_file(output_dir / "metadata.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_overview(rows, folders, args)
    accelerator.print(f"{len(rows)} images in {output_dir}, of which {new} new; see {output_dir / 'grid.png'}")
    accelerator.end_training()


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/generated")
    add = parser.add_argument
    add("--inversion_dir", default="outputs/demo/inversion", help="what tint_invert.py wrote")
    add("--pretrained_model_name_or_path", help="the Stable Diffusion model; default: the one inverted with")
    add("--num_images_per_class", type=positive_int, default=100, help="images to make of each class")
    add(
        "--alpha",
        type=float,
        nargs="+",
        default=[0.3, 0.5, 0.7],
        help="blending factors, taken in turn: 0 copies, 1 is free",
    )
    add(
        "--method",
        choices=["tint", "textual_inversion", "null_text"],
        default="tint",
        help="tint: the paper; textual_inversion: learned word, fresh noise; null_text: no learned word",
    )
    add(
        "--null_text_fade",
        type=float,
        default=2.0,
        help="how fast a support's null-text gives way to the empty prompt, its share being 1 - fade * alpha, at least "
        "0; 0: it never does (the paper)",
    )
    add("--guidance_scale", type=float, help="guidance scale w; default: the one inverted with")
    add("--image_size", type=positive_int, help="side of the images written; default: the support images' side")
    add("--batch_size", type=positive_int, default=50, help="images denoised together")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
