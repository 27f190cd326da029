"""Trains mini-SD's VAE: drawings of 32x32 pixels to latents [4, 8, 8] and back (Rombach et al., 2112.10752, 3.1).

    loss = ||x - D(z)||_1 / 2 + 2 ||x - D(z)||_2^2 + w KL(q(z|x) || N(0, I)),   z ~ q(z|x), means over elements

on the base classes and the web pool, in fresh colours, turned left to right and moved a little. The weights kept are
an exponential moving average. The scaling factor is set so that latents have standard deviation 1.

    python -m assets.train_vae --output_dir outputs/vae
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from assets.training import Checkpoint, Drawings, rng_of_step, use_threads
from common.cli import run
from common.records import write_json


def build():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def batch(drawings, size, rng):
    """A batch of drawings in [-1, 1]: half in fresh colours, half of them mirrored, moved by up to 2 pixels."""
    picks = [drawings.paint(i, rng)[0] if rng.random() < 0.5 else drawings.images[i]
             for i in rng.integers(len(drawings), size=size)]  # fmt: skip
    x = torch.stack([p.flip(-1) if rng.random() < 0.5 else p for p in picks])
    shift = rng.integers(0, 5, size=2)
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[..., shift[0] : shift[0] + 32, shift[1] : shift[1] + 32] * 2 - 1


@torch.no_grad()
def psnr(vae, images):
    """Mean peak signal-to-noise ratio in dB of reconstructions of images [N, 3, 32, 32] in [0, 1]."""
    errors = []
    for x in images.split(128):
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample
        errors.append(((y / 2 + 0.5).clamp(0, 1) - x).square().mean((1, 2, 3)))
    return (-10 * torch.cat(errors).log10()).mean().item()


def main(args):
    use_threads(args.num_threads)
    torch.manual_seed(args.seed)
    drawings, val = Drawings(["base", "web"]), Drawings(["episode"], ["val"]).images[::4]
    vae = build()
    if args.decoder_only:  # the latents must stay what they are: a diffusion model has learned them
        vae = AutoencoderKL.from_pretrained(args.decoder_only, use_safetensors=True)
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=1e-4)
    output_dir = Path(args.output_dir)
    checkpoint = Checkpoint(output_dir / "checkpoint.safetensors", args, vae=vae, ema=ema, optimizer=optimizer)
    facts = checkpoint.load()
    curve, start = facts.get("curve", []), facts.get("step", 0)
    clock, seconds, losses = time.time(), facts.get("seconds", 0), []

    for step in range(start, args.max_train_steps):
        for group in optimizer.param_groups:
            progress = step / args.max_train_steps
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * progress)) / 2
        x = batch(drawings, args.train_batch_size, rng_of_step(args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mode() if args.decoder_only else posterior.sample()).sample
        loss = (
            F.l1_loss(y, x) / 2
            + 2 * F.mse_loss(y, x)
            + args.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(vae)
        losses.append(loss.item())
        last = step + 1 == args.max_train_steps or checkpoint.stopping
        if (step + 1) % args.validation_steps == 0 or last:
            seconds, clock = seconds + time.time() - clock, time.time()
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses), "psnr": psnr(ema.module, val)})
            losses.clear()
            print(f"{seconds:.0f} s", curve[-1], flush=True)
            checkpoint.save(step=step + 1, seconds=seconds, curve=curve)
        if checkpoint.stopping:
            return

    vae = ema.module.eval()
    if not args.decoder_only:
        with torch.no_grad():
            latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in drawings.images.split(256)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(output_dir)
    reached = {split: psnr(vae, Drawings(["episode"], [split]).images) for split in ("val", "novel")}
    write_json(output_dir / "training.json",
               {"settings": vars(args), "seconds": seconds, "curve": curve, "psnr": reached})  # fmt: skip
    print(reached)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", default="outputs/mini-sd/vae")
    add("--decoder_only", help="a VAE's folder, whose decoder to train further")
    add("--max_train_steps", type=int, default=5000)
    add("--train_batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=2e-3)
    add("--kl_weight", type=float, default=1e-4)
    add("--ema_decay", type=float, default=0.995)
    add("--validation_steps", type=int, default=250, help="steps between validations and checkpoints")
    add("--num_threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
