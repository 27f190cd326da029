"""Inverts a few images per class into a text-to-image diffusion model.

Per class, textual inversion (Gal et al., 2208.01618) learns a new word. Per image, null-text inversion (Mokady et al.,
2211.09794) finds the latent and the unconditional embeddings from which the model, guided by the prompt with that
word, gives the image back. Together they are TINT (Landolsi and Kahl, 2406.03146), the input of tint_generate.py.

    accelerate launch tint_invert.py --support_dir outputs/demo/support --output_dir outputs/demo/inversion
"""

import unicodedata
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import SchedulerType, get_scheduler
from safetensors.torch import save_file
from tqdm.auto import tqdm

from common import diffusion
from common.cli import (
    UserError,
    argument_parser,
    check_settings,
    fingerprint,
    generator,
    natural_int,
    parse_with_model_defaults,
    positive_int,
    run,
    settings_of,
    start,
    whole_file,
    write_json,
)
from common.images import list_images, load_image, open_image, save_grid

HOW = ("support_dir", "class_batch_size", "null_text_batch_size", "gradient_checkpointing")  # not what is computed


@contextmanager
def new_words(text_encoder, first_id, vectors):
    """Lets the text encoder see `vectors` [K, D] as the embeddings of the tokens first_id, first_id + 1, ...

    Only these rows enter the graph: the gradient and the optimiser never touch the rest of the embedding matrix.
    """

    def replace_rows(module, inputs, embeddings):
        new = inputs[0] - first_id
        rows = vectors[new.clamp(0, len(vectors) - 1)]
        return torch.where((new >= 0)[..., None], rows, embeddings)

    handle = text_encoder.get_input_embeddings().register_forward_hook(replace_rows)
    try:
        yield
    finally:
        handle.remove()


def draw_noisy_latents(latents, scheduler, batch_size, min_timestep, rng):
    """A batch of one class's latents with noise: indices [B], timesteps [B], noise [B, C, h, w].

    Timesteps are uniform on [min_timestep, T), one from each of B equal parts, which lowers the gradient's variance.
    """
    indices = torch.randint(len(latents), (batch_size,), generator=rng)
    u = (torch.arange(batch_size) + torch.rand(batch_size, generator=rng)) / batch_size
    t_max = scheduler.config.num_train_timesteps
    timesteps = (min_timestep + u * (t_max - min_timestep)).long().clamp(max=t_max - 1)
    return indices, timesteps, torch.randn(batch_size, *latents.shape[1:], generator=rng)


def diffusion_loss(pipe, z0, timesteps, noise, prompt_embeds):
    """|| eps - eps_theta(z_t, t, tau) ||^2 per sample [B]; a velocity model is held to its velocity instead."""
    z_t = pipe.scheduler.add_noise(z0, noise, timesteps)
    is_v = pipe.scheduler.config.prediction_type == "v_prediction"
    target = pipe.scheduler.get_velocity(z0, noise, timesteps) if is_v else noise
    dtype = pipe.unet.dtype
    prediction = pipe.unet(z_t.to(dtype), timesteps, prompt_embeds.to(dtype)).sample.float()
    return F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))


def gradient(loss, variable):
    """d loss / d variable. The scaling keeps small float16 gradients on the way through the network from vanishing."""
    scale = 1024.0
    return torch.autograd.grad(scale * loss, variable)[0] / scale


def textual_inversion(pipe, names, words, latents, first_id, vectors, args, accelerator):
    """Learns the vectors of several classes' new words, one minimisation per class, side by side in one batch:

        v_c = argmin_v  E_{z0 in class c, t, eps}  || eps - eps_theta(z_t, t, tau(prompt(v))) ||^2

    Args:
        names: class names, keys of the randomness. words: their new words in a prompt.
        latents: per class z_0 [S_c, C, h, w]. vectors: start values [num_classes, num_vectors, D].
    Returns:
        vectors [num_classes, num_vectors, D] and the curve [(step, [loss per class])] on fixed noise and timesteps.
    """
    device = vectors.device
    vectors = vectors.clone().requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    random = [generator(args.seed, name, "textual_inversion") for name in names]

    def losses(draws, templates):
        """Loss per class [num_classes] of one draw (indices, timesteps, noise) and one prompt template for each."""
        z0 = torch.cat([latents[c][indices.to(device)] for c, (indices, _, _) in enumerate(draws)])
        timesteps, noise = (torch.cat([draw[i] for draw in draws]).to(device) for i in (1, 2))
        with new_words(pipe.text_encoder, first_id, vectors.flatten(0, 1)):
            prompts = [template.replace("{}", word) for template, word in zip(templates, words)]
            prompt_embeds = diffusion.encode_prompts(pipe, prompts)
        prompt_embeds = prompt_embeds.repeat_interleave(len(z0) // len(names), 0)
        return diffusion_loss(pipe, z0, timesteps, noise, prompt_embeds).view(len(names), -1).mean(1)

    fixed = [
        draw_noisy_latents(
            z0, pipe.scheduler, args.validation_samples, args.min_timestep, generator(args.seed, name, "validation")
        )
        for name, z0 in zip(names, latents)
    ]
    curve = []
    progress = tqdm(
        range(args.max_train_steps + 1), desc="textual inversion", disable=not accelerator.is_local_main_process
    )
    for step in progress:
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            with torch.no_grad():
                loss = losses(fixed, [args.prompt] * len(names))
            if not loss.isfinite().all():
                raise UserError(
                    f"textual inversion diverged at step {step}: use a smaller --learning_rate than "
                    f"{args.learning_rate}, or --mixed_precision bf16 or no."
                )
            curve.append((step, loss.tolist()))
            progress.set_postfix(loss=f"{loss.mean().item():.4f}")
            accelerator.log({f"textual_inversion_loss/{n}": x for n, x in zip(names, loss.tolist())}, step)
        if step == args.max_train_steps:
            break
        draws = [
            draw_noisy_latents(z0, pipe.scheduler, args.train_batch_size, args.min_timestep, rng)
            for z0, rng in zip(latents, random)
        ]
        templates = [
            args.prompt_templates[torch.randint(len(args.prompt_templates), (), generator=rng)] for rng in random
        ]
        # The classes' losses share no parameter, so the sum trains each as if it were alone.
        vectors.grad = gradient(losses(draws, templates).sum(), vectors)
        optimizer.step()
        lr_scheduler.step()
    return vectors.detach(), curve


@torch.no_grad()
def ddim_inversion(unet, schedule, z0, prompt_embeds):
    """Walks z_0 up to noise at guidance 1, the network evaluated at the time moved to (as in the null-text paper).

    Returns:
        the trajectory z* [T + 1, B, C, h, w] in the schedule's order: z*_T first, z_0 last.
    """
    trajectory = [z0]
    for i in reversed(range(len(schedule.timesteps))):
        eps = diffusion.predict_noise(unet, schedule, trajectory[0], i, prompt_embeds)
        trajectory.insert(0, diffusion.ddim_step(trajectory[0], eps, schedule.abar[i + 1], schedule.abar[i]))
    return torch.stack(trajectory)


def null_text_inversion(unet, schedule, trajectory, prompt_embeds, null_embeds, args, progress):
    """Finds the unconditional embeddings with which guided denoising follows `trajectory` (2211.09794, equation 3):

        null_t = argmin_null || z*_(t-1) - ddim_step(zbar_t, eps_u(null) + w (eps_c - eps_u(null))) ||^2

    by Adam from the previous step's result. An image whose loss is below the tolerance is left as it is.

    Args:
        trajectory: z* [T + 1, B, C, h, w]. prompt_embeds: [B, L, D]. null_embeds: start value [B, L, D].
    Returns:
        null-text embeddings [B, T, L, D]; the latents z_0 [B, C, h, w] that denoising with them reaches.
    """
    z, results = trajectory[0], []
    for i in range(len(schedule.timesteps)):
        with torch.no_grad():
            eps_cond = diffusion.predict_noise(unet, schedule, z, i, prompt_embeds)
        null_embeds = null_embeds.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([null_embeds], lr=args.null_text_learning_rate)
        active = torch.arange(len(z), device=z.device)  # the images not yet within the tolerance
        for _ in range(args.null_text_steps):
            eps_uncond = diffusion.predict_noise(unet, schedule, z[active], i, null_embeds[active])
            eps = diffusion.guide(eps_uncond, eps_cond[active], args.guidance_scale)
            reached = diffusion.ddim_step(z[active], eps, schedule.abar[i], schedule.abar[i + 1])
            loss = ((reached - trajectory[i + 1, active]) ** 2).mean((1, 2, 3))
            if not loss.isfinite().all():
                raise UserError("null-text inversion came to NaN: use --mixed_precision bf16 or no.")
            far = loss.detach() >= args.null_text_tolerance
            if not far.any():
                break
            null_embeds.grad = gradient(loss[far].sum(), null_embeds)
            before = null_embeds.detach().clone()
            optimizer.step()
            active = active[far]
            done = torch.ones(len(z), dtype=torch.bool, device=z.device).index_fill(0, active, False)
            null_embeds.data[done] = before[done]  # Adam's momentum would move them on
        with torch.no_grad():
            results.append(null_embeds.detach())
            eps_uncond = diffusion.predict_noise(unet, schedule, z, i, null_embeds)
            eps = diffusion.guide(eps_uncond, eps_cond, args.guidance_scale)
            z = diffusion.ddim_step(z, eps, schedule.abar[i], schedule.abar[i + 1])
        progress.update(len(z))
    return torch.stack(results, 1), z


def invert_images(images_per_class, latents, texts, pipe, schedule, args, accelerator):
    """DDIM and null-text inversion of several classes' images, in batches across classes.

    Args:
        latents: per class z_0 [S_c, C, h, w]. texts: the prompt of each class.
    Returns:
        per class z_T [S_c, C, h, w], null-text embeddings [S_c, T, L, D], and the z_0 that guided denoising reaches
        from there with the empty prompt ("ddim") and with the null-text.
    """
    counts = torch.tensor(images_per_class)
    with torch.no_grad():
        empty = diffusion.encode_prompts(pipe, [""])
        prompt_embeds = diffusion.encode_prompts(pipe, texts).repeat_interleave(counts.to(empty.device), 0)
    size, hidden = args.null_text_batch_size, not accelerator.is_local_main_process
    total = sum(images_per_class) * len(schedule.timesteps)
    batches = []
    with tqdm(total=total, desc="null-text inversion", disable=hidden) as progress:
        for z0, c in zip(torch.cat(latents).split(size), prompt_embeds.split(size)):
            trajectory = ddim_inversion(pipe.unet, schedule, z0, c)
            null = empty.expand(len(z0), -1, -1)
            ddim = diffusion.denoise(pipe.unet, schedule, trajectory[0], c, null[:, None], args.guidance_scale)
            null, reached = null_text_inversion(pipe.unet, schedule, trajectory, c, null, args, progress)
            batches.append((trajectory[0], null, ddim, reached))
    return zip(*(torch.cat(parts).split(images_per_class) for parts in zip(*batches)))


def add_new_words(pipe, names, args):
    """Adds the classes' new words to the vocabulary, `<name>`, `<name>_1`, ... as diffusers loads them.

    Returns:
        the words, the id of the first new token, start vectors [num_classes, num_vectors, D], initialiser words
    """
    starts, initializers = zip(*(initial_vector(pipe, name, args) for name in names))
    words = [placeholder_token(name) for name in names]
    tokens = [word if k == 0 else f"{word}_{k}" for word in words for k in range(args.num_vectors)]
    first_id = len(pipe.tokenizer)
    if pipe.tokenizer.add_tokens(tokens) != len(tokens):
        raise UserError(f"The tokenizer already knows some of {', '.join(tokens)}: rename those class folders.")
    expected = list(range(first_id, first_id + len(tokens)))
    if [i for t in tokens for i in pipe.tokenizer(t, add_special_tokens=False).input_ids] != expected:
        raise UserError(f"The tokenizer does not keep {', '.join(words)} apart: rename those class folders.")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    return words, first_id, torch.stack(starts)[:, None].repeat(1, args.num_vectors, 1), initializers


def placeholder_token(name):
    """The new word of a class. Lower case and without spaces, since CLIP's tokenizer knows no other."""
    return "<" + "-".join(unicodedata.normalize("NFC", name).lower().split()) + ">"


def psnr(images, references):
    """Peak signal-to-noise ratio in dB of each image [B, 3, H, W] in [0, 1]."""
    return -10 * ((images - references) ** 2).mean((1, 2, 3)).log10()


def invert_classes(names, paths, pipe, schedule, args, accelerator):
    """Inverts the images of several classes together, and writes each class's folder."""
    device = accelerator.device
    images = [torch.stack([load_image(path, args.resolution) for path in paths[name]]).to(device) for name in names]
    latents = [torch.cat([diffusion.encode_images(pipe.vae, x[None]) for x in batch]) for batch in images]
    counts = [len(batch) for batch in images]

    words, first_id, vectors, initializers = add_new_words(pipe, names, args)
    vectors, curve = textual_inversion(pipe, names, words, latents, first_id, vectors, args, accelerator)
    pipe.text_encoder.get_input_embeddings().weight.data[first_id:] = vectors.flatten(0, 1)

    texts = [args.prompt.replace("{}", word) for word in words]
    inverted = list(invert_images(counts, latents, texts, pipe, schedule, args, accelerator))
    plain = [None] * len(names)
    if args.plain_prompt is not None:
        texts = [args.plain_prompt] * len(names)
        plain = list(invert_images(counts, latents, texts, pipe, schedule, args, accelerator))

    for c, name in enumerate(names):
        folder = Path(args.output_dir) / name
        save_tensors(folder / "learned_embeds.safetensors", {words[c]: vectors[c]})
        for file, result in (("null_text", inverted[c]), ("null_text_plain", plain[c])):
            if result:
                tensors = {"latents": result[0], "null_embeddings": result[1]}
                save_tensors(folder / f"{file}.safetensors", tensors)
        decoded = {
            kind: torch.cat([diffusion.decode_latents(pipe.vae, z[None]) for z in batch])
            for kind, batch in {"vae": latents[c], "ddim": inverted[c][2], "null_text": inverted[c][3]}.items()
        }
        save_grid([images[c], *decoded.values()], folder / "reconstruction.png")
        facts = {
            "settings": settings_of(args, *HOW) | {"support_images": fingerprint(paths[name])},
            "class": name,
            "support_dir": str(Path(args.support_dir).resolve()),
            "placeholder_token": words[c],
            "initializer_token": initializers[c],
            "images": [path.name for path in paths[name]],
            "image_size": min([args.resolution, *(open_image(path).width for path in paths[name])]),
            "textual_inversion_loss": [[step, loss[c]] for step, loss in curve],
            "reconstruction_psnr_db": {kind: psnr(x, images[c]).tolist() for kind, x in decoded.items()},
        }
        write_json(folder / "inversion.json", facts)  # last: it marks the class as done


def save_tensors(path, tensors):
    with whole_file(path) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)


def initial_vector(pipe, name, args):
    """The embedding [D] that a class's vectors start from, and its words: those of --initializer_token, else those
    of the class name that the tokenizer knows as one token, else --fallback_token's. Of several words the mean."""
    for option in ("initializer_token", None, "fallback_token"):
        text = getattr(args, option) if option else name.replace("-", " ").replace("_", " ")
        ids = {w: pipe.tokenizer(w, add_special_tokens=False).input_ids for w in (text or "").split()}
        words = [word for word in ids if len(ids[word]) == 1]
        if option and text is not None and (not words or len(words) < len(ids)):
            raise UserError(f"--{option} {text!r}: give words that this model's tokenizer knows as one token each.")
        if words:
            rows = [ids[word][0] for word in words]
            return pipe.text_encoder.get_input_embeddings().weight[rows].detach().mean(0), " ".join(words)


def main(args):
    classes = list_images(args.support_dir)
    if args.prompt.count("{}") != 1:
        raise UserError(f"--prompt {args.prompt!r} must hold {{}} once, where the learned word goes.")
    by_word = {}
    for name in classes:
        by_word.setdefault(placeholder_token(name), []).append(name)
    for word, names in by_word.items():
        if len(names) > 1:
            raise UserError(f"The classes {' and '.join(names)} of {args.support_dir} would share the word {word}.")
    args.prompt_templates = read_templates(args)
    accelerator = start(args)
    pipe = diffusion.load_stable_diffusion(
        args.pretrained_model_name_or_path,
        accelerator.device,
        accelerator.mixed_precision,
        args.revision,
        args.variant,
    )
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if args.resolution is None:
        args.resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    schedule = diffusion.make_schedule(pipe.scheduler, args.num_inference_steps)
    if args.min_timestep >= pipe.scheduler.config.num_train_timesteps:
        raise UserError(f"--min_timestep {args.min_timestep}: the model's timesteps end before.")

    settings = settings_of(args, *HOW)
    mine = list(classes)[accelerator.process_index :: accelerator.num_processes]
    mine = [
        name
        for name in mine
        if not check_settings(
            Path(args.output_dir) / name / "inversion.json",
            settings | {"support_images": fingerprint(classes[name])},
        )
    ]
    for i in range(0, len(mine), args.class_batch_size):
        invert_classes(mine[i : i + args.class_batch_size], classes, pipe, schedule, args, accelerator)
    new = accelerator.gather(torch.tensor([len(mine)], device=accelerator.device)).sum().item()
    accelerator.print(f"{len(classes)} classes in {args.output_dir}, of which {new} new")
    accelerator.end_training()


def read_templates(args):
    """The prompt templates of textual inversion: the lines of --prompt_templates, by default --prompt alone."""
    if args.prompt_templates is None:
        return [args.prompt]
    path = Path(args.prompt_templates)
    if not path.is_file():
        raise UserError(f"--prompt_templates {path}: no such file.")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines or any(line.count("{}") != 1 for line in lines):
        raise UserError(f"--prompt_templates {path}: each line must hold {{}} once, where the learned word goes.")
    return lines


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/inversion")
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path", default="assets/mini-sd", help="Stable Diffusion 1.x/2.x: folder or hub name"
    )
    add("--revision", help="the hub model's revision")
    add("--variant", help="the weight files' variant, e.g. fp16")
    add("--support_dir", default="outputs/demo/support", help="images to invert: one folder per class")
    add("--resolution", type=positive_int, help="side that images, cut square, are resized to; default: the model's")
    add("--prompt", default="a photo of a {}", help="prompt of inversion and generation; {} is the learned word")
    add("--prompt_templates", help="file with a prompt a line for textual inversion; default: --prompt alone")
    add("--plain_prompt", help="also invert with this prompt, without the learned word (generation's null_text method)")
    group = parser.add_argument_group("textual inversion").add_argument
    group("--num_vectors", type=positive_int, default=1, help="vectors of a learned word")
    group("--initializer_token", help="word or words to start from; default: those of the class name")
    group("--fallback_token", default="object", help="the same where the tokenizer knows none of them")
    group("--max_train_steps", type=natural_int, default=5000, help="steps of optimisation")
    group("--train_batch_size", type=positive_int, default=1, help="noisy latents a class and step")
    group("--learning_rate", type=float, default=1e-3, help="AdamW's learning rate")
    group("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    group("--lr_scheduler", default="constant", choices=[s.value for s in SchedulerType][:6], help="its course")
    group("--lr_warmup_steps", type=natural_int, default=0, help="steps of its warm-up")
    group(
        "--min_timestep", type=natural_int, default=250, help="smallest t trained at: finer detail is not the class's"
    )
    group("--validation_steps", type=positive_int, default=100, help="steps between losses on fixed noise")
    group("--validation_samples", type=positive_int, default=16, help="fixed noisy latents a class")
    group("--class_batch_size", type=positive_int, default=1, help="classes that are inverted together")
    group("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    group = parser.add_argument_group("null-text inversion").add_argument
    group("--num_inference_steps", type=positive_int, default=25, help="DDIM steps")
    group("--guidance_scale", type=float, default=7.5, help="guidance scale w")
    group("--null_text_learning_rate", type=float, default=1e-2, help="Adam's learning rate")
    group("--null_text_steps", type=natural_int, default=10, help="at most so many Adam steps a DDIM step")
    group("--null_text_tolerance", type=float, default=1e-5, help="mean squared error that is close enough")
    group("--null_text_batch_size", type=positive_int, default=5, help="images that are inverted together")
    return parse_with_model_defaults(parser, "tint_invert", argv)


if __name__ == "__main__":
    run(main, parse_args)
