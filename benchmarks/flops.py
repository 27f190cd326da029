"""Counts the floating-point operations of inversion and generation at Stable Diffusion 1.5's shapes. Prints JSON.

    python -m benchmarks.flops

The networks are built on the `meta` device from the model's public configuration, so nothing is computed, and PyTorch's
FlopCounterMode (two operations a multiplication and addition) watches the project's own functions. Where a loop ends on
data, its mean number of iterations is that of an inversion of val classes of Icons-FS into mini-SD, done here, with the
same settings, guidance included, but mini-SD's learning rate.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tint_generate
import tint_invert
from benchmarks import write_supports
from common import datasets, diffusion
from common.cli import HelpFormatter, positive_int, run
from common.records import read_json

SHOTS = 5
DEFAULTS = "no such model has settings of its own"  # so that the script's defaults hold


def stable_diffusion_1_5(device="meta"):
    """The networks of Stable Diffusion 1.5 from their public configuration, elsewhere than on `meta` with random
    weights. The tokenizer is mini-SD's: only lengths count."""
    tokenizer = CLIPTokenizer.from_pretrained("assets/mini-sd/tokenizer", model_max_length=77)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tflop(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 1e12


def invert_into_mini_sd(args, support_dir, output_dir):
    """Runs tint_invert.py on mini-SD with the settings `args` of another model. Returns the record of each class."""
    best = read_json("assets/mini-sd/tint.json")["tint_invert"]
    own = {name: best[name] for name in ("prompt", "learning_rate", "class_batch_size", "null_text_batch_size")}
    own |= {"pretrained_model_name_or_path": "assets/mini-sd", "fallback_token": "house",
            "support_dir": str(support_dir), "output_dir": str(output_dir)}  # fmt: skip
    tint_invert.main(argparse.Namespace(**vars(args) | own))
    return [read_json(path) for path in sorted(Path(output_dir).glob("*/inversion.json"))]


def guided_levels(output_dir, args):
    """For each class, at how many levels an unconditional prediction is made: where the null-text starts as the prompt,
    those at which an image's has moved. Images of a class go together at Stable Diffusion's size."""
    for path in sorted(Path(output_dir).glob("*/null_text.safetensors")):
        null = load_file(path)["null_offsets"]
        moved = (null != null[:, :1]).any(-1).any(-1).any(0)
        yield int(moved.sum()) if args.null_text_start == 1 else null.shape[1]


def measure_iterations(args, num_episodes):
    """Mean iterations on mini-SD: steps of textual inversion and its validations a class, Adam's steps an image, and
    `guided_levels`."""
    dataset, records, levels = datasets.load_dataset("icons_fs", "val"), [], []
    for index in range(num_episodes):
        with tempfile.TemporaryDirectory() as folder:
            write_supports(dataset, 5, SHOTS, args.seed, index, Path(folder) / "support")
            records += invert_into_mini_sd(args, f"{folder}/support", f"{folder}/inversion")
            levels += guided_levels(f"{folder}/inversion", args)
    curves = [record["textual_inversion_loss"] for record in records]
    return {
        "classes": len(records),
        "textual_inversion_steps": sum(curve[-1][0] for curve in curves) / len(curves),
        "validations": sum(map(len, curves)) / len(curves),
        "null_text_steps": sum(n for r in records for n in r["null_text_steps"]) / (SHOTS * len(records)),
        "guided_levels": statistics.mean(levels),
    }


def inversion(args, iterations):
    """TFLOP of inverting a class of five images: its parts and their sum."""
    pipe = stable_diffusion_1_5()
    schedule = diffusion.make_schedule(pipe.scheduler, args.num_inference_steps)
    meta = torch.device("meta")
    images, z0 = torch.rand(1, 3, 512, 512, device=meta), torch.rand(1, 4, 64, 64, device=meta)
    prompt_embeds, null_embeds = torch.rand(2, 1, 77, 768, device=meta)
    null_embeds.requires_grad_()
    vectors = torch.rand(1, 768, device=meta, requires_grad=True)
    first_id, ids = len(pipe.tokenizer), diffusion.token_ids(pipe, ["a photo of a tree"])

    def loss_of(count):
        noisy = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long), z0.expand(count, -1, -1, -1)
        return tint_invert.class_losses(pipe, first_id, vectors, ids, [z0], [noisy]).sum()

    def validate():
        with torch.no_grad():
            loss_of(args.validation_samples)

    def guided_step():
        return tint_invert.guided_step(pipe.unet, schedule, z0, 0, z0, null_embeds[:], args.guidance_scale)

    def predict():
        with torch.no_grad():
            diffusion.predict_noise(pipe.unet, schedule, z0, 0, prompt_embeds)

    def take_step():
        with torch.no_grad():
            guided_step()

    per_image = {
        "VAE encoding": tflop(diffusion.encode_images, pipe.vae, images),
        "DDIM inversion": tflop(
            tint_invert.ddim_inversion, pipe.unet, schedule, z0, prompt_embeds, args.fixed_point_steps
        ),
        "null-text: prediction with the prompt": len(schedule.timesteps) * tflop(predict),
        "null-text: the guided steps taken": iterations["guided_levels"] * tflop(take_step),
        "null-text: optimisation": iterations["null_text_steps"]
        * tflop(lambda: tint_invert.gradient(guided_step().sum(), null_embeds)),
        "pictures for the record": 2 * tflop(diffusion.decode_latents, pipe, z0),
    }
    parts = {name: SHOTS * value for name, value in per_image.items()} | {
        "textual inversion": iterations["textual_inversion_steps"]
        * tflop(lambda: tint_invert.gradient(loss_of(args.train_batch_size), vectors)),
        "textual inversion: validation": iterations["validations"] * tflop(validate),
    }
    return {"total": sum(parts.values())} | parts


def generation(inverted_steps, alpha, args):
    """TFLOP of generating one image at an alpha, with the options of tint_generate.py."""
    first = inverted_steps - round(alpha * inverted_steps) if args.method == "img2img" else 0
    return walking(inverted_steps, tint_generate.walk(inverted_steps, first, alpha, args))


@cache
def walking(inverted_steps, steps):
    pipe = stable_diffusion_1_5()
    schedule = diffusion.make_schedule(pipe.scheduler, inverted_steps)
    z, embeds = torch.rand(1, 4, 64, 64, device="meta"), torch.rand(1, 77, 768, device="meta")
    denoising = tflop(diffusion.denoise, pipe.unet, schedule, z, embeds, embeds[:, None], 7.5, steps)
    return denoising + tflop(diffusion.decode_latents, pipe, z)


def main(args):
    torch.set_num_threads(args.num_threads)
    settings = {
        preset: tint_invert.parse_args(["--preset", preset, "--pretrained_model_name_or_path", DEFAULTS])
        for preset in ("fast", "reference")
    }
    with redirect_stdout(sys.stderr):
        measured = measure_iterations(settings["fast"], args.num_episodes)
    spent = inversion(settings["fast"], measured)
    ours, papers = tint_generate.parse_args([]), tint_generate.parse_args(["--null_text_fade", "0"])
    made = statistics.mean(generation(settings["fast"].num_inference_steps, alpha, ours) for alpha in ours.alpha)
    reference = settings["reference"]
    certain = {  # no loop ends on data: the tolerance is never reached on mini-SD
        "textual_inversion_steps": reference.max_train_steps,
        "validations": reference.max_train_steps // reference.validation_steps + 1,
        "null_text_steps": reference.null_text_steps * reference.num_inference_steps,
        "guided_levels": reference.num_inference_steps,
    }
    print(json.dumps({
        "iterations_measured_on_mini_sd": measured,
        "inversion_tflop_per_class": spent,
        "reference_preset": {"iterations": certain, "inversion_tflop_per_class": inversion(reference, certain)},
        "generation_tflop_per_image": made,
        "tflop_per_class_with_200_images": spent["total"] + 200 * made,
        "reference_generation_tflop_per_image": generation(reference.num_inference_steps, 1.0, papers),
    }, indent=2))  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--num_episodes", type=positive_int, default=2, help="episodes of five classes to measure on")
    add("--num_threads", type=positive_int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
