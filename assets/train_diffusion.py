"""Trains mini-SD's UNet and text encoder on the latents of its VAE (Rombach et al., 2112.10752, section 3.3).

    loss = E min(SNR_t, gamma) / SNR_t || eps - eps_theta(z_t, t, tau(caption)) ||^2,   SNR_t = abar_t / (1 - abar_t)

(min-SNR weighting, Hang et al., 2303.09556) over the base classes, the web pool and, with --icon_web, the icon web, in
fresh colours. A caption names the class and, each at random, style and colours: "a filled red icon of a camera on
white"; one in ten is empty, for classifier-free guidance. The learning rate is constant, then falls to zero over the
last fifth of the steps; what is kept is an exponential moving average of the weights.

    python -m assets.train_diffusion --vae outputs/vae --output_dir outputs/mini-sd

Stopped (Ctrl-C, SIGTERM) and started again, it goes on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.colours import BACKGROUNDS, FOREGROUNDS
from assets.training import (
    Drawings,
    Training,
    adamw,
    descend,
    recorded,
    rng_of_step,
    seen_drawings,
    use_threads,
)
from common.cli import run
from common.icons_fs import load_splits
from common.processes import best_device
from common.records import digest, fingerprint, read_json, save_tensors, whole_folder, write_json

MAX_TOKENS = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(fact, rng, keep=0.55):
    """What the drawing shows, its style and colours each named with probability `keep`."""
    words = [fact[key] for key in ("style", "foreground") if fact[key] and rng.random() < keep]
    ground = f" on {fact['background']}" if rng.random() < keep else ""
    return f"{article(' '.join([*words, 'icon']))} of {article(fact['class'].replace('-', ' '))}{ground}"


def train_tokenizer(classes, folder):
    """A CLIP tokenizer whose byte-pair encoding has one token for each word of the captions. It is kept in `folder` for
    a training that goes on: another one would number its tokens otherwise."""
    words = " ".join(["an a icon of on filled outline duotone colour", *FOREGROUNDS, *BACKGROUNDS, *classes])
    words = sorted(set(words.replace("-", " ").split()))
    if not folder.is_dir():
        made = CLIPTokenizer(model_max_length=MAX_TOKENS).train_new_from_iterator([words], vocab_size=20_000)
        if several := [w for w in words if w.isalpha() and len(made.tokenize(w)) > 1]:
            raise ValueError(f"these words have several tokens: {several}")
        with whole_folder(folder) as temporary:
            made.save_pretrained(temporary)
    return CLIPTokenizer.from_pretrained(folder)


def forget(folder, words):
    """Takes from a tokenizer what makes one token of any of the words, which was learned as a piece of another name
    ("fish" of jellyfish) or means something else alone ("bank"). Ids stay what they are."""
    path = folder / "tokenizer.json"
    tokenizer, gone = read_json(path), {f"{word}</w>" for word in words}
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair) not in gone and not gone & set(pair)]
    write_json(path, tokenizer)


def build(tokenizer, channels, layers, text_width):
    """UNet and text encoder with random weights. Attention from 4x4 down: at 8x8 it costs more than it gives."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            projection_dim=text_width,
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
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return unet, text_encoder


def tokenize(tokenizer, captions):
    """Token numbers [n, MAX_TOKENS] of captions."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def encode(vae, tokenizer, drawings, copies, path, rng, keep=0.55):
    """Latents [N, copies, 4, 8, 8] in float16 of `copies` paintings of each drawing, the first as it is, and the token
    numbers [N, copies, MAX_TOKENS] of their captions; kept in a file."""
    if not path.is_file():
        chunks = {"latents": [], "ids": []}
        for rows in np.array_split(np.arange(len(drawings)), -(-len(drawings) // 512)):
            painted = [drawings.paint(rows, rng, share=float(copy > 0)) for copy in range(copies)]
            latents = [vae.encode(x * 2 - 1).latent_dist.mode().half().cpu() for x, _ in painted]
            ids = [tokenize(tokenizer, [caption(fact, rng, keep) for fact in facts]).short() for _, facts in painted]
            chunks["latents"].append(torch.stack(latents, 1) * vae.config.scaling_factor)
            chunks["ids"].append(torch.stack(ids, 1))
        save_tensors(path, {k: torch.cat(v) for k, v in chunks.items()}, {})
    found = load_file(path)
    return found["latents"], found["ids"].long()


def main(args):
    use_threads(args.num_threads)
    torch.manual_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    vae_dir = Path(args.initial_model, "vae") if args.initial_model else Path(args.vae)
    device = best_device()
    vae = AutoencoderKL.from_pretrained(vae_dir, use_safetensors=True).eval().requires_grad_(False).to(device)
    drawings = seen_drawings(args.icon_web)
    held_out = Drawings(["episode"], ["val"]).to(device)
    if args.initial_model:
        start = StableDiffusionPipeline.from_pretrained(args.initial_model, safety_checker=None, use_safetensors=True)
        tokenizer, unet, text_encoder = start.tokenizer, start.unet, start.text_encoder
    else:
        tokenizer = train_tokenizer(drawings.classes, output_dir / "tokenizer")
        unet, text_encoder = build(tokenizer, args.channels, args.layers, args.text_width)
    read = [*vae_dir.glob("*.safetensors"), *([args.icon_web] if args.icon_web else [])]
    key = digest(fingerprint(read), tokenizer.get_vocab(), args.copies, args.seed)
    rng = np.random.default_rng([args.seed, 1])
    files = [output_dir / f"{name}-{key}.safetensors" for name in ("latents", "val")]
    latents, ids = encode(vae, tokenizer, drawings.to(device), args.copies, files[0], rng)
    val_latents, val_ids = (x[:, 0].to(device) for x in encode(vae, tokenizer, held_out, 1, files[1], rng, keep=1))
    size, no_caption = args.train_batch_size, tokenize(tokenizer, [""]).to(device)
    latents, ids = latents.to(device), ids.to(device)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    abar = scheduler.alphas_cumprod.to(device)
    snr = abar / (1 - abar)
    weight = snr.clamp(max=args.snr_gamma) / snr

    def weighted_loss(networks, z, ids, t, eps):
        unet, text_encoder = networks
        a = abar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * eps
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            predicted = unet(z_t, t, text_encoder(ids)[0]).sample
        return (weight[t] * (predicted.float() - eps).square().mean((1, 2, 3))).mean()

    @torch.no_grad()
    def validate(networks):
        """The loss on unseen drawings of val classes, at fixed timesteps, noise and full captions, and epochs done."""
        fixed, total, z = torch.Generator().manual_seed(0), 0.0, val_latents.float()
        t, eps = torch.randint(1000, (len(z),), generator=fixed), torch.randn(z.shape, generator=fixed)
        parts = (x.split(256) for x in (z, val_ids, t.to(device), eps.to(device)))
        for part in zip(*parts):
            total += weighted_loss(networks, *part).item() * len(part[0])
        return {"val_loss": total / len(z), "epoch": training.step * size / len(drawings)}

    networks = torch.nn.ModuleList([unet.to(memory_format=torch.channels_last), text_encoder]).to(device)
    weights, epoch = list(networks.parameters()), -1
    adam = adamw(weights, (0.9, 0.99), 0.01, device)
    training = Training(args, networks, adam)

    def train(z, ids, t, eps):
        return descend(weighted_loss(networks, z, ids, t, eps), weights, adam, 1.0)

    train = recorded(train, device)
    for step in training.steps(lambda step, progress: min(1, (step + 1) / 200, 5 * (1 - progress))):
        noise = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        if epoch != step * size // len(drawings):  # each drawing once an epoch
            epoch = step * size // len(drawings)
            order = [rng_of_step(args.seed + 1, e).permutation(len(drawings)) for e in (epoch, epoch + 1)]
            order = torch.from_numpy(np.concatenate(order)).to(device)
        rows = order[step * size - epoch * len(drawings) :][:size]
        copies = torch.randint(args.copies, (size,), generator=noise, device=device)
        unnamed = torch.rand(size, 1, generator=noise, device=device) < 0.1
        t = torch.arange(size, device=device) + torch.rand(size, generator=noise, device=device)
        t = (t * 1000 / size).long().clamp(max=999)  # stratified; the last sum may round up
        z, eps = latents[rows, copies].float(), torch.randn(latents[rows, 0].shape, generator=noise, device=device)
        loss = train(z, torch.where(unnamed, no_caption, ids[rows, copies]), t, eps)
        training.finish_step(loss, validate)
    if training.stopping:
        return

    unet, text_encoder = training.ema.cpu()
    unet = unet.to(torch.float16 if args.float16 else torch.float32, memory_format=torch.contiguous_format)
    StableDiffusionPipeline(
        vae=vae.cpu(),
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output_dir)
    splits = load_splits()
    forget(output_dir / "tokenizer", {w for name in splits["unseen_val"] + splits["unseen"] for w in name.split("-")})
    facts = {"settings": vars(args), "seconds": training.seconds, "curve": training.curve}
    write_json(output_dir / "training.json", facts)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vae", default="outputs/vae")
    add("--initial_model", help="folder of a model to train further, with its own VAE; default: random weights")
    add("--output_dir", default="outputs/mini-sd")
    add("--channels", type=int, nargs="+", default=[64, 128, 128], help="of the UNet's levels")
    add("--layers", type=int, default=1, help="layers of a level")
    add("--text_width", type=int, default=128, help="of the text encoder")
    add("--icon_web", help="file of assets/build_icon_web.py: learn its names, too")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--float16", action="store_true", help="write the UNet's weights in half precision")
    add("--copies", type=int, default=8, help="paintings of each drawing")
    add("--max_train_steps", type=int, default=16600, help="100 epochs of 10,568 drawings in batches of 64")
    add("--max_minutes", type=float, help="end by then, the learning rate with it")
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
