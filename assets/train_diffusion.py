"""Trains mini-SD's UNet and text encoder on the latents of its VAE (Rombach et al., 2112.10752, section 3.3).

    loss = E min(SNR_t, gamma) / SNR_t || eps - eps_theta(z_t, t, tau(caption)) ||^2,   SNR_t = abar_t / (1 - abar_t)

(min-SNR weighting, Hang et al., 2303.09556) over the base classes and the web pool, in fresh colours. A caption names
the class and, each at random, style and colours: "a filled red icon of a camera on white"; one in ten is empty, for
classifier-free guidance. The learning rate is constant, then falls to zero over the last fifth of the steps; what is
kept is an exponential moving average of the weights.

    python -m assets.train_diffusion --vae outputs/vae --output_dir outputs/mini-sd

Stopped (Ctrl-C, SIGTERM) and started again, it goes on.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.colours import BACKGROUNDS, FOREGROUNDS
from assets.training import Checkpoint, Drawings, moving_average, rng_of_step, use_threads
from common.cli import run
from common.records import digest, fingerprint, save_tensors, write_json

MAX_TOKENS = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(fact, rng, keep=0.55):
    """What the drawing shows, its style and colours each named with probability `keep`."""
    words = [fact[key] for key in ("style", "foreground") if fact[key] and rng.random() < keep]
    ground = f" on {fact['background']}" if rng.random() < keep else ""
    return f"{article(' '.join([*words, 'icon']))} of {article(fact['class'].replace('-', ' '))}{ground}"


def train_tokenizer(classes):
    """A CLIP tokenizer whose byte-pair encoding has one token for each word of the captions."""
    words = " ".join(["an a icon of on filled outline duotone colour", *FOREGROUNDS, *BACKGROUNDS, *classes])
    words = sorted(set(words.replace("-", " ").split()))
    tokenizer = CLIPTokenizer(model_max_length=MAX_TOKENS).train_new_from_iterator([words], vocab_size=10_000)
    several = [w for w in words if len(tokenizer.tokenize(w)) > 1]
    if several:
        raise ValueError(f"these words have several tokens: {several}")
    return tokenizer


def build(tokenizer, channels, layers):
    """UNet and text encoder with random weights. Attention from 4x4 down: at 8x8 it costs more than it gives."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    deeper = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return unet, text_encoder


@torch.no_grad()
def encode(vae, drawings, copies, path, seed):
    """Latents of `copies` paintings of each drawing, float16 [N, copies, 4, 8, 8], and their facts; kept in a file."""
    if not path.is_file():
        rng = np.random.default_rng([seed, 1])
        painted = [
            [(drawings.images[i], drawings.facts[i])] + [drawings.paint(i, rng) for _ in range(copies - 1)]
            for i in range(len(drawings))
        ]
        images = torch.stack([image for row in painted for image, _ in row])
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode().half() for x in images.split(256)])
        latents = (latents * vae.config.scaling_factor).unflatten(0, (len(drawings), copies)).contiguous()
        save_tensors(path, {"latents": latents}, {"facts": json.dumps([[fact for _, fact in r] for r in painted])})
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["facts"])


def main(args):
    use_threads(args.num_threads)
    torch.manual_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    vae_dir = Path(args.initial_model, "vae") if args.initial_model else Path(args.vae)
    vae = AutoencoderKL.from_pretrained(vae_dir, use_safetensors=True).eval().requires_grad_(False)
    drawings, held_out = Drawings(["base", "web"]), Drawings(["episode"], ["val"])
    if args.initial_model:
        start = StableDiffusionPipeline.from_pretrained(args.initial_model, safety_checker=None, use_safetensors=True)
        tokenizer, unet, text_encoder = start.tokenizer, start.unet, start.text_encoder
    else:
        tokenizer = train_tokenizer(drawings.classes)
        unet, text_encoder = build(tokenizer, args.channels, args.layers)
    key = digest(fingerprint(vae_dir.glob("*.safetensors")), args.copies, args.seed)  # what latents depend on
    latents, facts = encode(vae, drawings, args.copies, output_dir / f"latents-{key}.safetensors", args.seed)
    val_latents, val_facts = encode(vae, held_out, 1, output_dir / f"val-{key}.safetensors", args.seed)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    weight = snr.clamp(max=args.snr_gamma) / snr

    def weighted_loss(networks, z, captions, t, eps):
        unet, text_encoder = networks
        a = abar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * eps
        ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        error = (unet(z_t, t, text_encoder(ids)[0]).sample - eps).square().mean((1, 2, 3))
        return (weight[t] * error).mean()

    @torch.no_grad()
    def validate(networks):
        """The loss on unseen drawings of val classes, at fixed timesteps, noise and full captions."""
        fixed, total, z = torch.Generator().manual_seed(0), 0.0, val_latents[:, 0].float()
        captions = [caption(rows[0], np.random.default_rng(0), keep=1) for rows in val_facts]
        t, eps = torch.randint(1000, (len(z),), generator=fixed), torch.randn(z.shape, generator=fixed)
        for i in range(0, len(z), 256):
            part = slice(i, i + 256)
            total += weighted_loss(networks, z[part], captions[part], t[part], eps[part]).item() * len(z[part])
        return total / len(z)

    networks = torch.nn.ModuleList([unet, text_encoder])
    ema = AveragedModel(networks, multi_avg_fn=moving_average(args.ema_decay))
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint = Checkpoint(
        output_dir / "checkpoint.safetensors", args, networks=networks, ema=ema, optimizer=optimizer
    )
    past = checkpoint.load()
    curve, first, seconds = past.get("curve", []), past.get("step", 0), past.get("seconds", 0)
    size, losses, clock = args.train_batch_size, [], time.time()

    for step in range(first, args.max_train_steps):
        left = (args.max_train_steps - step) / args.max_train_steps
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200, 5 * left)
        rng, noise = rng_of_step(args.seed, step), torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        epoch, place = divmod(step * size, len(facts))  # each drawing once an epoch
        order = np.concatenate([rng_of_step(args.seed + 1, e).permutation(len(facts)) for e in (epoch, epoch + 1)])
        rows, copies = order[place : place + size], rng.integers(args.copies, size=size)
        captions = ["" if rng.random() < 0.1 else caption(facts[i][j], rng) for i, j in zip(rows, copies)]
        t = ((torch.arange(size) + torch.rand(size, generator=noise)) * 1000 / size).long()  # stratified
        t = t.clamp(max=999)  # the last sum may round up
        z = latents[torch.from_numpy(rows), torch.from_numpy(copies)].float()
        loss = weighted_loss(networks, z, captions, t, torch.randn(z.shape, generator=noise))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(networks)
        losses.append(loss.item())
        last = step + 1 == args.max_train_steps or checkpoint.stopping
        if (step + 1) % args.validation_steps == 0 or last:
            seconds, clock = seconds + time.time() - clock, time.time()
            point = {"step": step + 1, "epoch": (step + 1) * size / len(facts), "loss": float(np.mean(losses))}
            curve.append(point | {"val_loss": validate(ema.module)})
            losses.clear()
            print(f"{seconds:.0f} s", curve[-1], flush=True)
            checkpoint.save(step=step + 1, seconds=seconds, curve=curve)
        if last:
            break

    unet, text_encoder = ema.module
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output_dir)
    write_json(output_dir / "training.json", {"settings": vars(args), "seconds": seconds, "curve": curve})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vae", default="outputs/vae")
    add("--initial_model", help="folder of a model to train further, with its own VAE; default: random weights")
    add("--output_dir", default="outputs/mini-sd")
    add("--channels", type=int, nargs="+", default=[64, 128, 128], help="of the UNet's levels")
    add("--layers", type=int, default=1, help="layers of a level")
    add("--copies", type=int, default=8, help="paintings of each drawing")
    add("--max_train_steps", type=int, default=16600, help="100 epochs of 10,568 drawings in batches of 64")
    add("--train_batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=2e-3)
    add("--snr_gamma", type=float, default=5.0)
    add("--ema_decay", type=float, default=0.999)
    add("--validation_steps", type=int, default=200, help="steps between validations and checkpoints")
    add("--num_threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
