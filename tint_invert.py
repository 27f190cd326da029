"""Inverts a few images per class into a text-to-image diffusion model.

Per class, textual inversion (Gal et al., 2208.01618) learns a new word. Per image, null-text inversion (Mokady et al.,
2211.09794) finds the latent and the unconditional embeddings from which the model, guided by the prompt with that
word, gives the image back. Together they are TINT (Landolsi and Kahl, 2406.03146), the input of tint_generate.py.

    accelerate launch tint_invert.py --support_dir outputs/demo/support --output_dir outputs/demo/inversion
"""

import common.passive  # noqa: F401  (before torch is loaded)

import argparse
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import tqdm

from common import diffusion, inversion, records
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import UserError, argument_parser, natural_int, non_negative, positive, positive_int, run, share
from common.images import list_images, open_image, psnr
from common.memory import announce
from common.models import weights_of
from common.processes import generator, share_out, start
from common.upscaling import load_support, load_upscaler
from common.words import add_new_words, require_distinct_words

REFERENCE = {  # the paper's settings
    "max_train_steps": 5000, "train_batch_size": 1, "learning_rate": 1e-3, "patience": 0, "validation_steps": 500,
    "num_inference_steps": 25, "guidance_scale": 7.5, "fixed_point_steps": 0, "null_text_start": 0.0,
    "null_text_learning_rate": 1e-2, "null_text_steps": 10, "null_text_tolerance": 1e-5,
}  # fmt: skip
OUTSIDE = ("support_dir", "class_batch_size", "null_text_batch_size", "gradient_checkpointing")  # not what is computed


@contextmanager
def new_words(text_encoder, first_id, vectors):
    """Lets the text encoder see `vectors` [K, D] as the embeddings of the tokens first_id, first_id + 1, ... Only these
    rows enter the graph: gradient and optimiser never touch the rest of the embedding matrix."""

    def replace_rows(module, inputs, embeddings):
        new = inputs[0] - first_id
        rows = vectors[new.clamp(0, len(vectors) - 1)]
        return torch.where((new >= 0)[..., None], rows, embeddings)

    with text_encoder.get_input_embeddings().register_forward_hook(replace_rows):
        yield


def draw_noisy_latents(latents, scheduler, batch_size, min_timestep, rng):
    """A batch of one class's latents with noise: indices [B], timesteps [B], noise [B, C, h, w]. Timesteps are uniform
    on [min_timestep, T), one from each of B equal parts, which lowers the gradient's variance."""
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


def class_losses(pipe, first_id, vectors, ids, latents, draws):
    """The diffusion loss of several classes, each a mean over its draw: [num_classes].

    Args:
        vectors: [num_words, D], the embeddings of the tokens first_id, first_id + 1, ... ids: a prompt's token ids per
            class [num_classes, L]. latents: per class z_0 [S_c, C, h, w]. draws: per class `draw_noisy_latents`.
    """
    starts = [sum(map(len, latents[:c])) for c in range(len(latents))]
    indices = torch.cat([draw[0] + start for draw, start in zip(draws, starts)])
    drawn = indices, *(torch.cat([draw[i] for draw in draws]) for i in (1, 2))
    indices, timesteps, noise = (x.to(vectors.device, non_blocking=True) for x in drawn)
    with new_words(pipe.text_encoder, first_id, vectors):
        prompt_embeds = pipe.text_encoder(ids)[0].repeat_interleave(len(noise) // len(ids), 0)
    losses = diffusion_loss(pipe, torch.cat(latents)[indices], timesteps, noise, prompt_embeds)
    return losses.view(len(ids), -1).mean(1)


def goes_on(curve, args):
    """Whether a class's loss on fixed noise [(step, loss), ...] still falls: in its last `patience` validations the
    least loss has fallen by more than the share `min_improvement`. Without patience it always goes on."""
    losses = [loss for _, loss in curve]
    if not args.patience or len(losses) <= args.patience:
        return True
    return min(losses) < (1 - args.min_improvement) * min(losses[: -args.patience])


def textual_inversion(pipe, names, words, latents, first_id, vectors, args, partial):
    """Learns the vectors of several classes' new words, one minimisation per class, side by side in one batch:

        v_c = argmin_v  E_{z0 in class c, t, eps}  || eps - eps_theta(z_t, t, tau(prompt(v))) ||^2

    The loss on fixed noise and timesteps says when a class is done, and which of its vectors are the best.

    Args:
        names: class names, keys of the randomness. words: their new words in a prompt.
        latents: per class z_0 [S_c, C, h, w]. vectors: start values [num_classes, num_vectors, D].
        partial: folder of what an interrupted run has done.
    Returns:
        vectors [num_classes, num_vectors, D] and per class the curve [(step, loss)] on fixed noise and timesteps.
    """
    learned = torch.nn.ParameterDict({"vectors": vectors.clone(), "best": vectors.clone()})
    vectors, best = learned["vectors"], learned["best"].data
    optimizer = torch.optim.AdamW([vectors], lr=args.learning_rate, weight_decay=args.adam_weight_decay)

    def draw(c, count, *key):
        rng = generator(args.seed, names[c], *key)
        noisy = draw_noisy_latents(latents[c], pipe.scheduler, count, args.min_timestep, rng)
        return noisy, args.prompt_templates[torch.randint(len(args.prompt_templates), (), generator=rng)]

    def losses(classes, draws, templates):
        ids = torch.cat([tokens[c, template] for c, template in zip(classes, templates)])
        return class_losses(pipe, first_id, vectors.flatten(0, 1), ids, [latents[c] for c in classes], draws)

    tokens = {
        (c, template): diffusion.token_ids(pipe, [template.replace("{}", word)])
        for c, word in enumerate(words) for template in {args.prompt, *args.prompt_templates}
    }  # fmt: skip
    fixed = [draw(c, args.validation_samples, "validation")[0] for c in range(len(names))]
    state, checkpoint = {"learned": learned, "optimizer": optimizer}, partial / "textual_inversion.safetensors"
    first_step, curves = load_checkpoint(checkpoint, {}, **state).get("progress", (0, [[] for _ in names]))
    bar = tqdm(total=args.max_train_steps, initial=first_step, desc="textual inversion", unit="step")
    active = [c for c in range(len(names)) if goes_on(curves[c], args)]
    for step in range(first_step, args.max_train_steps + 1):
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            save_checkpoint(checkpoint, {"progress": [step, curves]}, **state)
            with torch.no_grad():
                found = losses(active, [fixed[c] for c in active], [args.prompt] * len(active))
            if not found.isfinite().all():
                raise UserError(f"textual inversion diverged at step {step}: use a smaller --learning_rate than "
                                f"{args.learning_rate}, or --mixed_precision bf16 or no.")  # fmt: skip
            for c, loss in zip(active, found.tolist()):
                if not args.patience or loss < min([x for _, x in curves[c]], default=float("inf")):
                    best[c] = vectors[c].detach()
                curves[c].append((step, loss))
            bar.set_postfix(loss=f"{found.mean().item():.4f}", classes=len(active))
            active = [c for c in active if goes_on(curves[c], args)]
        if step == args.max_train_steps or not active:
            break
        draws, templates = zip(*(draw(c, args.train_batch_size, "textual_inversion", step) for c in active))
        # The classes' losses share no parameter, so the sum trains each as if it were alone.
        vectors.grad = gradient(losses(active, draws, templates).sum(), vectors)
        optimizer.step()
        bar.update()
    bar.total = bar.n  # what is left is not needed
    bar.close()
    return best, curves


@torch.no_grad()
def ddim_inversion(unet, schedule, z0, prompt_embeds, fixed_point_steps=0):
    """Walks z_0 up to noise at guidance 1, the network evaluated at the time moved to (as in the null-text paper).

    What the network is asked about, at that time, is the latent moved from; each fixed-point step asks again about the
    latent that the last answer led to (Pan et al., 2309.04907, equation 5), which inverts the way down more exactly.

    Returns:
        the trajectory z* [T + 1, B, C, h, w] in the schedule's order: z*_T first, z_0 last.
    """
    trajectory = [z0]
    for i in reversed(range(len(schedule.timesteps))):
        z = trajectory[0]
        for _ in range(1 + fixed_point_steps):
            eps = diffusion.predict_noise(unet, schedule, z, i, prompt_embeds)
            z = diffusion.ddim_step(trajectory[0], eps, schedule.abar[i + 1], schedule.abar[i])
        trajectory.insert(0, z)
    return torch.stack(trajectory)


def guided_step(unet, schedule, z, i, eps_cond, null_embeds, guidance_scale):
    """Where a guided DDIM move from z [B, C, h, w] at the schedule's level i leads, the noise eps_cond being known."""
    eps_uncond = diffusion.predict_noise(unet, schedule, z, i, null_embeds)
    eps = diffusion.guide(eps_uncond, eps_cond, guidance_scale)
    return diffusion.ddim_step(z, eps, schedule.abar[i], schedule.abar[i + 1])


def null_text_inversion(unet, schedule, trajectory, prompt_embeds, null_embeds, args, progress):
    """Finds the unconditional embeddings with which guided denoising follows `trajectory` (2211.09794, equation 3):

        null_t = argmin_null || z*_(t-1) - ddim_step(zbar_t, eps_u(null) + w (eps_c - eps_u(null))) ||^2

    by Adam from the previous step's result. An image whose loss is below the tolerance is left as it is.

    Args:
        trajectory: z* [T + 1, B, C, h, w]. prompt_embeds: [B, L, D]. null_embeds: start value [B, L, D].
    Returns:
        null-text [B, T, L, D]; the z_0 [B, C, h, w] that denoising with it reaches; Adam's steps of each image [B].
    """
    z, results, is_prompt = trajectory[0], [], args.null_text_start == 1
    num_steps = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for i in range(len(schedule.timesteps)):
        with torch.no_grad():
            eps_cond = diffusion.predict_noise(unet, schedule, z, i, prompt_embeds)
        reached = diffusion.ddim_step(z, eps_cond, schedule.abar[i], schedule.abar[i + 1])
        if is_prompt:  # the unconditional prediction is the same, and guidance changes nothing
            loss = ((reached - trajectory[i + 1]) ** 2).mean((1, 2, 3))
            is_prompt = bool((loss < args.null_text_tolerance).all())
        null_embeds = null_embeds.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([null_embeds], lr=args.null_text_learning_rate)
        active = torch.arange(len(z), device=z.device)  # the images not yet within the tolerance
        for step in range(0 if is_prompt else args.null_text_steps + 1):
            is_last = step == args.null_text_steps
            with torch.set_grad_enabled(not is_last):
                at = z[active], i, eps_cond[active], null_embeds[active]
                now = guided_step(unet, schedule, *at, args.guidance_scale)
                loss = ((now - trajectory[i + 1, active]) ** 2).mean((1, 2, 3))
            reached[active] = now.detach()
            losses = loss.tolist()  # the one wait for the device
            if not all(map(math.isfinite, losses)):
                raise UserError("null-text inversion came to NaN: use --mixed_precision bf16 or no.")
            num_far = sum(x >= args.null_text_tolerance for x in losses)
            if is_last or not num_far:
                break
            far = loss.detach() >= args.null_text_tolerance
            null_embeds.grad = gradient((loss * far).sum(), null_embeds)
            before = null_embeds.detach().clone()
            optimizer.step()
            active = active[torch.nonzero_static(far, size=num_far)[:, 0]]
            num_steps[active] += 1
            done = torch.ones(len(z), 1, 1, dtype=torch.bool, device=z.device).index_fill(0, active, False)
            null_embeds.data = torch.where(done, before, null_embeds.data)  # Adam's momentum would move them on
        results.append(null_embeds.detach())
        z = reached
        progress.update(len(z))
    return torch.stack(results, 1), z, num_steps


def invert_images(counts, latents, texts, pipe, schedule, args, accelerator, partial):
    """DDIM and null-text inversion of several classes' images, in batches across classes.

    Args:
        counts: images per class. latents: per class z_0 [S_c, C, h, w]. texts: the prompt of each class.
        partial: folder of the batches that an interrupted run has done.
    Returns:
        per class {"latents": z_T [S_c, C, h, w], "null_offsets": the null-text less the empty prompt [S_c, T, L, D],
        float16, "null_text": the z_0 that guided denoising reaches with it, "num_steps": Adam's steps [S_c], and with
        --compare_ddim "ddim": the z_0 that it reaches with the empty prompt}.
    """
    with torch.no_grad():
        empty = diffusion.encode_prompts(pipe, [""])
        prompt_embeds = diffusion.encode_prompts(pipe, texts)
        prompt_embeds = torch.cat([c.expand(count, -1, -1) for c, count in zip(prompt_embeds, counts)])
    size, results = args.null_text_batch_size, []
    progress = tqdm(total=sum(counts) * len(schedule.timesteps), desc="null-text inversion", unit="image step")
    for k, (z0, c) in enumerate(zip(torch.cat(latents).split(size), prompt_embeds.split(size))):
        done = partial / f"images-{k}.safetensors"
        if done.is_file():
            results.append(inversion.load(done, z0.device))
            progress.update(len(z0) * len(schedule.timesteps))
        else:
            trajectory = ddim_inversion(pipe.unet, schedule, z0, c, args.fixed_point_steps)
            null = torch.lerp(empty.expand_as(c), c, args.null_text_start)
            null, reached, num_steps = null_text_inversion(pipe.unet, schedule, trajectory, c, null, args, progress)
            result = {"latents": trajectory[0], "null_offsets": (null - empty).half(), "null_text": reached,
                      "num_steps": num_steps}  # fmt: skip
            if args.compare_ddim:
                null = empty[None].expand(len(z0), -1, -1, -1)
                result["ddim"] = diffusion.denoise(pipe.unet, schedule, trajectory[0], c, null, args.guidance_scale)
            records.save_tensors(done, result)
            results.append(result)
    progress.close()
    parts = {name: torch.cat([result[name] for result in results]).split(counts) for name in results[0]}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


def invert_classes(names, paths, known, settings, pipe, schedule, upscaler, args, accelerator):
    """Inverts images of several classes together, {class name: paths}, and writes each class's folder with its
    settings, {class name: settings}. `known`: the record of one class that the images are added to, or None."""
    added, device, root = paths[names[0]] if known else (), accelerator.device, Path(args.output_dir)
    partial = inversion.begin(names, settings, args, added)
    images = [[load_support(path, args.resolution, upscaler) for path in paths[name]] for name in names]
    images = [torch.stack(batch).to(device) for batch in images]
    latents = [torch.cat([diffusion.encode_images(pipe.vae, x[None]) for x in batch]) for batch in images]
    words, first_id, vectors, initializers = add_new_words(pipe, names, args)
    if known:
        curves, path = [[]], root / names[0] / inversion.EMBEDS
        with records.blaming(path):
            vectors = inversion.load(path, device)[words[0]][None]
    else:
        vectors, curves = textual_inversion(pipe, names, words, latents, first_id, vectors, args, partial)
    pipe.text_encoder.get_input_embeddings().weight.data[first_id:] = vectors.flatten(0, 1)

    counts, texts = [len(batch) for batch in images], [args.prompt.replace("{}", word) for word in words]
    inverted = invert_images(counts, latents, texts, pipe, schedule, args, accelerator, partial)
    for c, name in enumerate(names):
        result = {"vae": latents[c]} | inverted[c]
        kinds = [kind for kind in ("vae", "ddim", "null_text") if kind in result]
        decoded = {k: torch.cat([diffusion.decode_latents(pipe, z[None]) for z in result[k]]) for k in kinds}
        sides = [min(open_image(path).size) for path in paths[name]]
        facts = {
            "settings": settings[name], "class": name, "support_dir": str(Path(args.support_dir).resolve()),
            "placeholder_token": words[c], "initializer_token": initializers[c],
            "images": [inversion.name_of(path, name, args) for path in paths[name]], "original_size": min(sides),
            "image_size": min([args.resolution, *sides]), "textual_inversion_loss": curves[c],
            "null_text_steps": result["num_steps"].tolist(),
            "reconstruction_psnr_db": {kind: psnr(x, images[c]).tolist() for kind, x in decoded.items()},
        }  # fmt: skip
        tensors = {k: result[k] for k in ("latents", "null_offsets")} | {"image_latents": latents[c].half()}
        inversion.write_inversion(root / name, facts, vectors[c], tensors, [images[c], *decoded.values()], known)
    records.remove_folder(partial)


def read_templates(args):
    """The prompt templates of textual inversion: the lines of --prompt_templates, by default --prompt alone."""
    if args.prompt.count("{}") != 1 and (args.max_train_steps or "{}" in args.prompt):
        raise UserError(f"--prompt {args.prompt!r} must hold {{}} once, where the learned word goes, or not at all and "
                        "with --max_train_steps 0.")  # fmt: skip
    if args.prompt_templates is None:
        return [args.prompt]
    path = Path(args.prompt_templates)
    lines = path.read_text("utf-8-sig", "replace").splitlines() if path.is_file() else []
    lines = [line.strip() for line in lines if line.strip()]
    if not lines or any(line.count("{}") != 1 or "\ufffd" in line for line in lines):
        raise UserError(f"--prompt_templates {path}: no such file, no UTF-8, or not {{}} once in each of its lines.")
    return lines


def load_model(args, device, precision):
    """The model to invert into; --resolution is its own unless given."""
    model = args.pretrained_model_name_or_path
    pipe = diffusion.load_stable_diffusion(model, device, precision, args.revision, args.variant)
    switch = "enable" if args.gradient_checkpointing else "disable"
    getattr(pipe.unet, f"{switch}_gradient_checkpointing")()
    if args.resolution is None:
        args.resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if args.resolution % pipe.vae_scale_factor:
        raise UserError(f"--resolution {args.resolution}: this model takes multiples of {pipe.vae_scale_factor}.")
    return pipe


def activations(pipe, num_classes, num_images, args):
    """{what is done: the bytes of activations at its peak}, so many classes of so many images in all together."""
    asked, trained = (diffusion.bytes_of_a_latent(pipe, args.resolution, grad) for grad in (False, True))
    return {
        "textual inversion (--train_batch_size)": num_classes * args.train_batch_size * trained,
        "its validation (--validation_samples)": num_classes * args.validation_samples * asked,
        "null-text inversion (--null_text_batch_size)": min(args.null_text_batch_size, num_images) * trained,
        "the VAE": diffusion.decoding_bytes(pipe, args.resolution),
    }


def main(args):
    accelerator = start(args)
    classes = list_images(args.support_dir)
    require_distinct_words(classes)
    args.prompt_templates = read_templates(args)
    pipe = load_model(args, accelerator.device, accelerator.mixed_precision)
    upscaler = None if args.upscaler == "bicubic" else load_upscaler(args.upscaler, accelerator.device)
    schedule = diffusion.make_schedule(pipe.scheduler, args.num_inference_steps)
    if args.min_timestep >= pipe.scheduler.config.num_train_timesteps:
        raise UserError(f"--min_timestep {args.min_timestep}: the model's timesteps end before.")
    root = Path(args.output_dir)
    shared = records.settings_of(args, *OUTSIDE)
    shared |= {"model_weights": pipe.fingerprint, "mixed_precision": accelerator.mixed_precision}
    shared["upscaler_weights"] = None if upscaler is None else weights_of(args.upscaler, args.upscaler)
    settings, kind = {}, "support_images"  # of which a class may grow
    for name, paths in classes.items():
        settings[name] = shared | {kind: records.fingerprints(paths, args.support_dir)}
    done = [k for k in classes if records.check_settings(root / k / inversion.RECORD, settings[k], (kind,))]
    new = [name for name in classes if name not in done]
    groups = share_out(inversion.batches(root, new, settings, args, accelerator.num_processes), accelerator)
    done, here = share_out(done, accelerator), str(Path(args.support_dir).resolve())
    if groups:
        parts = activations(pipe, max(map(len, groups)), max(sum(len(classes[n]) for n in g) for g in groups), args)
        announce([pipe.unet, pipe.vae, pipe.text_encoder], parts, accelerator.device)
    for names in groups:
        invert_classes(names, classes, None, settings, pipe, schedule, upscaler, args, accelerator)
    for name in done:
        known = inversion.read_inversion(root / name)
        if known["support_dir"] != here:
            records.write_json(root / name / inversion.RECORD, known | {"support_dir": here})
        added = [path for path in classes[name] if inversion.name_of(path, name, args) not in known["images"]]
        if added:
            print("; ".join(records.changed_files(known["settings"][kind], settings[name][kind])))
            invert_classes([name], {name: added}, known, settings, pipe, schedule, upscaler, args, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        inversion.tidy(root)
        curves = {name: dict(inversion.read_inversion(root / name)["textual_inversion_loss"]) for name in new}
        for step in sorted({step for curve in curves.values() for step in curve}):  # trackers take no step twice
            found = {f"textual_inversion_loss/{name}": curve[step] for name, curve in curves.items() if step in curve}
            accelerator.log(found, step)
        print(*inversion.describe(root, classes, args), sep="\n")
        print(f"{len(classes)} classes in {root}, of which {len(new)} new")
    accelerator.end_training()


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/inversion")
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--pretrained_model_name_or_path", default="assets/mini-sd", help="Stable Diffusion 1.x/2.x: folder, hub name")
    add("--revision", help="the hub model's revision")
    add("--variant", help="the weight files' variant, e.g. fp16")
    add("--support_dir", default="outputs/demo/support", help="images to invert: one folder per class")
    add("--resolution", type=positive_int, help="side that images, cut square, are resized to; default: the model's")
    add("--upscaler", default="bicubic", help="for smaller images: a safetensors checkpoint that spandrel knows")
    add("--preset", choices=["fast", "reference"], default="fast", help="reference: the paper's settings for the below")
    add("--prompt", default="a photo of a {}", help="prompt of inversion and generation; {} is the learned word, which "
        "a plain prompt lacks (generation's null_text method): with --max_train_steps 0")  # fmt: skip
    add("--prompt_templates", help="file with a prompt a line for textual inversion; default: --prompt alone")
    group = parser.add_argument_group("textual inversion").add_argument
    group("--num_vectors", type=positive_int, default=1, help="vectors of a learned word")
    group("--initializer_token", help="word or words to start from; default: those of the class name")
    group("--fallback_token", default="object", help="the same where the tokenizer knows none of them")
    group("--max_train_steps", type=natural_int, default=500, help="steps of optimisation, at most")
    group("--train_batch_size", type=positive_int, default=3, help="noisy latents a class and step")
    group("--learning_rate", type=positive, default=5e-3, help="AdamW's learning rate")
    group("--adam_weight_decay", type=non_negative, default=1e-2, help="AdamW's weight decay")
    group("--min_timestep", type=natural_int, default=250, help="smallest t of training: below is no class's detail")
    group("--validation_steps", type=positive_int, default=10, help="steps between losses on fixed noise")
    group("--validation_samples", type=positive_int, default=16, help="fixed noisy latents a class")
    group("--patience", type=natural_int, default=3, help="validations without gain until a class is done; 0: never")
    group("--min_improvement", type=non_negative, default=0.002, help="share of the loss that counts as a gain")
    group("--class_batch_size", type=positive_int, default=1, help="classes that are inverted together")
    group("--gradient_checkpointing", action=flag, default=False, help="recompute activations: less memory, more time")
    group = parser.add_argument_group("null-text inversion").add_argument
    group("--num_inference_steps", type=positive_int, default=16, help="DDIM steps")
    group("--guidance_scale", type=non_negative, default=7.5, help="guidance scale w")
    group("--null_text_learning_rate", type=positive, default=1e-2, help="Adam's learning rate")
    group("--null_text_steps", type=natural_int, default=5, help="at most so many Adam steps a DDIM step")
    group("--null_text_tolerance", type=non_negative, default=1e-3, help="mean squared error that is close enough")
    group("--fixed_point_steps", type=natural_int, default=1, help="more evaluations a step of DDIM inversion")
    group("--null_text_start", type=share, default=1.0, help="from the empty prompt, 0 (the paper), to the prompt, 1, "
          "with which nothing is guided and few steps are needed (negative-prompt inversion, 2305.16807)")  # fmt: skip
    group("--compare_ddim", action=flag, default=False, help="also reconstruct with the empty prompt")
    group("--null_text_batch_size", type=positive_int, default=5, help="images that are inverted together")
    return diffusion.parse_with_model_defaults(parser, "tint_invert", argv, {"reference": REFERENCE})


if __name__ == "__main__":
    run(main, parse_args)
