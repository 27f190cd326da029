"""A Stable Diffusion model as mathematics: latents, noise prediction, DDIM moves, guidance.

Symbols are those of the papers: latents `z_t`, cumulative alpha `abar_t`, predicted noise `eps`, guidance scale `w`.
Latents are float32 [B, C, h, w] whatever the precision of the UNet.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from common.cli import UserError, refusing
from common.memory import peak_bytes
from common.records import digest, fingerprint_tensors, read_json

for logging in (diffusers_logging, transformers_logging):
    logging.disable_progress_bar()
    logging.set_verbosity_error()

ROOT = Path(__file__).resolve().parent.parent
WEIGHT_DTYPE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VAE_BYTES = 2 * 2**30  # of activations: as many images are decoded at once as do with that


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a walk of T steps, from noise (index 0) to image (index T)."""

    timesteps: tuple  # T descending integers: the network's time at index i
    abar: tuple  # T + 1 ascending numbers: the cumulative alpha at index i, the last that of a finished latent
    prediction_type: str  # what the network predicts, "epsilon" or "v_prediction"


def load_stable_diffusion(name_or_path, device, mixed_precision="no", revision=None, variant=None):
    """A frozen `StableDiffusionPipeline` with a DDIM scheduler, from a folder or the hub, from safetensors only.

    The UNet gets the working precision. The text encoder and the VAE stay in float32: they cost little, the learned
    vectors need it, and reconstruction is judged on what the VAE returns. `pipe.fingerprint` tells the weights and the
    noise, whatever the precision, since a path or a name says nothing of what lies there. The model last loaded is
    kept, for the next arm of a benchmark: text encoder and tokenizer, which learn words, are copies of its own. A
    UserError tells of no such folder, or no Stable Diffusion 1.x or 2.x model.
    """
    folder = Path(name_or_path)
    if folder.is_file():
        raise UserError(f"{folder} is a single file: make a folder of it with diffusers, "
                        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER).")  # fmt: skip
    if str(name_or_path).startswith((".", "/", "assets/", "outputs/")) and not folder.is_dir():
        ours = f" There is {ROOT / folder}: give that, or start in {ROOT}." if (ROOT / folder).is_dir() else ""
        raise UserError(f"--pretrained_model_name_or_path {name_or_path}: no such folder.{ours}")
    stamps = tuple((path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file())
    kept = load_networks(str(name_or_path), device, mixed_precision, revision, variant, stamps)
    pipe = copy.copy(kept)
    pipe.tokenizer, pipe.text_encoder = copy.deepcopy(kept.tokenizer), copy.deepcopy(kept.text_encoder).to(device)
    return pipe


@lru_cache(maxsize=1)
def load_networks(name_or_path, device, mixed_precision, revision, variant, stamps):
    """The pipeline of `load_stable_diffusion`, its text encoder on the CPU. `stamps`: of its files, on the hub none."""
    named = {path.stem.split(".")[1].split("-")[0] for path in Path(name_or_path).glob("unet/*.*.safetensors")}
    hint = f" Its weights are a variant: add --variant {min(named)}." if named and not variant else ""
    with refusing(
        f"Cannot load {name_or_path} as a Stable Diffusion model ({{error}}).{hint} Give a folder or hub name with "
        "unet, vae, text_encoder, tokenizer and scheduler in diffusers' format, weights as safetensors."
    ):
        pipe = StableDiffusionPipeline.from_pretrained(
            name_or_path, revision=revision, variant=variant, use_safetensors=True, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False, dtype=torch.float32,
        )  # fmt: skip
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        unet, width = pipe.unet.config, pipe.text_encoder.config.hidden_size
    more = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    if any(map(unet.get, more)) or unet.cross_attention_dim != width or unet.in_channels != unet.out_channels:
        raise UserError(
            f"{name_or_path} is no Stable Diffusion 1.x or 2.x model: its UNet takes more than latents, a time and the "
            "embeddings of one text, as that of SDXL, of unCLIP or of inpainting does."
        )
    if pipe.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{name_or_path} predicts {pipe.scheduler.config.prediction_type}: not supported.")
    modules, config = (pipe.unet, pipe.vae, pipe.text_encoder), pipe.scheduler.config
    tensors = [item for module in modules for item in module.state_dict().items()]
    meaning = f"{config.prediction_type}/{config.timestep_spacing}/{pipe.vae.config.scaling_factor}"
    meaning += f"/{config.steps_offset}/{config.set_alpha_to_one}/{digest(pipe.tokenizer.get_vocab())}"
    pipe.fingerprint = fingerprint_tensors([*tensors, (meaning, pipe.scheduler.alphas_cumprod)])
    for module in modules:
        module.requires_grad_(False).eval()
    pipe.unet.to(device, WEIGHT_DTYPE[mixed_precision]), pipe.vae.to(device)
    return pipe


def make_schedule(scheduler, num_inference_steps):
    """The Schedule of a diffusers DDIM scheduler, with its timestep spacing and final alpha. A UserError tells of steps
    that miss the model's noise or go beyond it: "leading" spacing rounds T / steps down, and 501 steps of 1000 would be
    one timestep each, and begin in the middle of the image."""
    config = scheduler.config
    end, spacing, offset = config.num_train_timesteps, config.timestep_spacing, config.steps_offset

    def reaches_noise(steps):
        if spacing == "leading":
            return steps > 1 and 0.9 * end <= end // steps * steps and end // steps * (steps - 1) + offset < end
        return steps > 1 or spacing == "trailing"

    if num_inference_steps > end or not reaches_noise(num_inference_steps):
        good = [steps for steps in range(1, end + 1) if reaches_noise(steps)]
        nearest = min(good, key=lambda steps: abs(steps - num_inference_steps))
        raise UserError(f"--num_inference_steps {num_inference_steps}: with this model's {spacing} spacing of {end} "
                        f"timesteps, so many steps do not begin at its noise. Give {nearest}.")  # fmt: skip
    scheduler.set_timesteps(num_inference_steps)
    timesteps = tuple(scheduler.timesteps.tolist()[:num_inference_steps])  # "trailing" adds -1 where it rounds badly
    abar = [scheduler.alphas_cumprod[t].item() for t in timesteps] + [float(scheduler.final_alpha_cumprod)]
    if min(abar) < 1e-6:
        raise UserError("This model's schedule ends in pure noise (zero terminal SNR), from which nothing inverts.")
    return Schedule(timesteps, tuple(abar), config.prediction_type)


@torch.no_grad()
def encode_images(vae, images):
    """Images [B, 3, H, W] in [0, 1] to latents z_0 = s * mean(VAE(x)), s the VAE's scaling factor."""
    return vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe, latents):
    """Latents z_0 to images [B, 3, H, W] in [0, 1], of which as many at once as VAE_BYTES allow."""
    side = pipe.vae_scale_factor * latents.shape[-1]
    parts = latents.split(max(1, VAE_BYTES // decoding_bytes(pipe, side)))
    images = torch.cat([pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample for part in parts])
    return (images / 2 + 0.5).clamp(0, 1)


def decoding_bytes(pipe, side, count=1):
    """The bytes of activations while `count` images of `side` pixels are decoded, as many at once as VAE_BYTES allow:
    of each there are, at the peak, three maps of full size, in float32, of the channels of the last block but one."""
    one = 3 * 4 * pipe.vae.config.block_out_channels[:2][-1] * side**2
    return one * max(1, min(count, VAE_BYTES // one))


def token_ids(pipe, prompts):
    """Prompts to token ids [B, L], or a UserError where one is longer than the text encoder's context. A learned word
    of several vectors counts as its several tokens."""
    prompts = pipe.maybe_convert_prompt(list(prompts), pipe.tokenizer)
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, ids):
        if len(row) > length:
            raise UserError(f"The prompt {prompt!r} has {len(row)} tokens, the text encoder takes {length}.")
    return torch.tensor(ids).to(pipe.text_encoder.device)


def encode_prompts(pipe, prompts):
    """tau(prompt): prompts to text embeddings [B, L, D], float32."""
    return pipe.text_encoder(token_ids(pipe, prompts))[0]


def to_noise(prediction_type, prediction, z, abar):
    """The noise eps in a network's prediction at z_t. Velocity v: eps = sqrt(abar) v + sqrt(1 - abar) z_t."""
    if prediction_type == "v_prediction":
        return abar**0.5 * prediction + (1 - abar) ** 0.5 * z
    return prediction


def predict_noise(unet, schedule, z, index, prompt_embeds):
    """eps_theta(z, t, tau) at the schedule's level `index`: [B, C, h, w] from z and text embeddings [B, L, D]."""
    timestep = z.new_full((), schedule.timesteps[index], dtype=torch.long)  # a number would be copied to the device
    prediction = unet(z.to(unet.dtype), timestep, prompt_embeds.to(unet.dtype)).sample.float()
    return to_noise(schedule.prediction_type, prediction, z, schedule.abar[index])


def bytes_of_a_latent(pipe, side, trained=False):
    """The bytes of activations of one image of `side` pixels in the UNet, or in its gradient with respect to a text."""
    side //= pipe.vae_scale_factor
    with torch.set_grad_enabled(trained):
        embeds = encode_prompts(pipe, [""]).detach().to(pipe.unet.dtype).requires_grad_(trained)
        z = embeds.new_zeros(1, pipe.unet.config.in_channels, side, side)
        timestep = embeds.new_zeros((), dtype=torch.long)

        def predict():
            eps = pipe.unet(z, timestep, embeds[:]).sample  # a FlopCounterMode may watch, which takes no leaf
            if trained:
                torch.autograd.grad(eps.sum(), embeds)

        return peak_bytes(predict)


def ddim_step(z, eps, abar_from, abar_to):
    """Deterministic DDIM move between two noise levels, forward or backward (2010.02502, equation 12, sigma 0):

    x0_hat = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    z_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps
    """
    x0_hat = (z - (1 - abar_from) ** 0.5 * eps) / abar_from**0.5
    return abar_to**0.5 * x0_hat + (1 - abar_to) ** 0.5 * eps


def guide(eps_uncond, eps_cond, guidance_scale):
    """Classifier-free guidance (2207.12598): eps_u + w (eps_c - eps_u)."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def extrapolate(x0_hat, before, abars):
    """The clean latent towards which a step of second order moves: on the line through this level's prediction and the
    last level's, in the log signal-to-noise ratio (DPM-Solver++ 2M, 2211.01095, algorithm 2).

    Args:
        abars: of the level before, this one and the next.
    """
    last, now, end = (math.log(abar / (1 - abar)) / 2 for abar in abars)
    return x0_hat + (end - now) / (2 * (now - last)) * (x0_hat - before)


@torch.no_grad()
def denoise(unet, schedule, z, prompt_embeds, null_embeds, guidance_scale, steps=None, progress=None):
    """Walks latents down to z_0 with guidance.

    Args:
        z: latents [B, C, h, w] of the noise level at which the walk begins. prompt_embeds: text embeddings [B, L, D].
        null_embeds: unconditional embeddings of each step [B, T, L, D], or [B, 1, L, D] for all steps.
        guidance_scale: w, a number or one for each latent [B].
        steps: the indices of the schedule's levels that the walk passes. Default: all, by DDIM. Fewer steps are longer,
            and of second order, but for the first and the last.
        progress: a bar that counts the steps of all latents.
    """
    num_steps, before = len(schedule.timesteps), None
    steps = range(num_steps) if steps is None else steps
    null_embeds = null_embeds.expand(-1, num_steps, -1, -1)
    w = torch.as_tensor(guidance_scale).to(z.device).expand(len(z))[:, None, None, None]
    for k, i in enumerate(steps):
        abar, end = schedule.abar[i], [*steps, num_steps][k + 1]
        embeds = torch.cat([null_embeds[:, i], prompt_embeds])
        eps = guide(*predict_noise(unet, schedule, torch.cat([z, z]), i, embeds).chunk(2), w)
        if len(steps) < num_steps - steps[0]:
            x0_hat = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
            if 0 < k < len(steps) - 1:
                line = extrapolate(x0_hat, before, [schedule.abar[j] for j in (steps[k - 1], i, end)])
                eps = (z - abar**0.5 * line) / (1 - abar) ** 0.5
            before = x0_hat
        z = ddim_step(z, eps, abar, schedule.abar[end])
        if progress is not None:
            progress.update(len(z))
    return z


def parse_with_model_defaults(parser, script, argv, presets):
    """Parses the command line. A local model folder may hold `tint.json`, {script: {option: value}}, in place
    of the script's defaults, those of Stable Diffusion; one of `presets`, {name: {option: value}}, replaces both."""
    argv = sys.argv[1:] if argv is None else argv
    known = [word for word in argv if word not in ("-h", "--help")]
    model = parser.parse_known_args(known)[0]
    defaults = Path(model.pretrained_model_name_or_path) / "tint.json"
    if defaults.is_file():
        own = read_json(defaults)
        own, options = own.get(script, {}) if isinstance(own, dict) and own.keys() <= {script} else None, vars(model)
        if not isinstance(own, dict) or not own.keys() <= options.keys() or any(
            isinstance(value, bool) != isinstance(options[name], bool) for name, value in own.items()
        ):  # fmt: skip
            raise UserError(f"{defaults} should hold {{{script}: {{option: value}}}}, options being that script's own.")
        # As text they are read, and checked, as on the command line.
        parser.set_defaults(**{k: v if isinstance(v, bool | None) else str(v) for k, v in own.items()})
    parser.set_defaults(**presets.get(parser.parse_known_args(known)[0].preset, {}))
    return parser.parse_args(argv)
