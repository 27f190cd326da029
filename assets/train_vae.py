"""Trains mini-SD's VAE: drawings of 32x32 pixels to latents [4, 8, 8] and back (Rombach et al., 2112.10752, 3.1).

    loss = ||x - D(z)||_1 / 2 + 2 ||x - D(z)||_2^2 + w KL(q(z|x) || N(0, I)),   z ~ q(z|x), means over elements

on the base classes, the web pool and, with --icon_web, the icon web, in fresh colours, turned left to right and moved a
little. The weights kept are an exponential moving average. The scaling factor is set so that latents have standard
deviation 1.

    python -m assets.train_vae --output_dir outputs/vae
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from assets.training import (
    Drawings,
    Training,
    adamw,
    descend,
    recorded,
    rng_of_step,
    seen_drawings,
    use_threads,
    warmed,
)
from common.cli import run
from common.processes import best_device
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
    x, _ = drawings.paint(rng.integers(len(drawings), size=size), rng, share=0.5)
    mirrored = torch.tensor(rng.random(size) < 0.5, device=x.device).view(-1, 1, 1, 1)
    x = F.pad(torch.where(mirrored, x.flip(-1), x), (2, 2, 2, 2), mode="replicate")
    shift = rng.integers(0, 5, size=2)
    return x[..., shift[0] : shift[0] + 32, shift[1] : shift[1] + 32] * 2 - 1


@torch.no_grad()
def psnr(vae, images):
    """Mean peak signal-to-noise ratio in dB of reconstructions of images [N, 3, 32, 32] in [0, 1]."""
    errors = []
    for x in images.to(vae.device).split(256):
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample
        errors.append(((y / 2 + 0.5).clamp(0, 1) - x).square().mean((1, 2, 3)))
    return (-10 * torch.cat(errors).log10()).mean().item()


def main(args):
    use_threads(args.num_threads)
    torch.manual_seed(args.seed)
    device = best_device()
    drawings = seen_drawings(args.icon_web).to(device)
    val = Drawings(["episode"], ["val"]).images[::4]
    vae = build()
    if args.decoder_only:  # the latents must stay what they are: a diffusion model has learned them
        vae = AutoencoderKL.from_pretrained(args.decoder_only, use_safetensors=True)
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    vae = vae.to(device)
    trained = [p for p in vae.parameters() if p.requires_grad]
    adam = adamw(trained, (0.9, 0.99), 1e-4, device)
    training = Training(args, vae, adam)

    def train(x, noise):
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + (0 if args.decoder_only else posterior.std * noise)
        y = vae.decode(z).sample
        kl = posterior.kl().mean() / z[0].numel()
        return descend(F.l1_loss(y, x) / 2 + 2 * F.mse_loss(y, x) + args.kl_weight * kl, trained, adam, 1.0)

    train = recorded(train, device)
    for step in training.steps(partial(warmed, 200)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(args.train_batch_size, 4, 8, 8, device=device)
        loss = train(batch(drawings, args.train_batch_size, rng_of_step(args.seed, step)), noise)
        training.finish_step(loss, lambda vae: {"psnr": psnr(vae, val)})
    if training.stopping:
        return

    vae, output_dir = training.ema, Path(args.output_dir)
    if not args.decoder_only:
        with torch.no_grad():
            latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in drawings.images.split(256)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(output_dir)
    reached = {split: psnr(vae, Drawings(["episode"], [split]).images) for split in ("val", "novel")}
    facts = {"settings": vars(args), "seconds": training.seconds, "curve": training.curve, "psnr": reached}
    write_json(output_dir / "training.json", facts)
    print(reached)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", default="outputs/mini-sd/vae")
    add("--decoder_only", help="a VAE's folder, whose decoder to train further")
    add("--icon_web", help="file of assets/build_icon_web.py: learn its drawings, too")
    add("--max_train_steps", type=int, default=5000)
    add("--max_minutes", type=float, help="end by then, the learning rate with it")
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
