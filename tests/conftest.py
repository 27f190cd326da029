"""What the tests share: launching a script as a user does, and one small run of the whole path."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from filelock import FileLock
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests import ROOT, launcher

ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
PYTHON = [sys.executable]
TWO_PROCESSES, THREE_PROCESSES = (
    [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", number, "--standalone"] for number in "23"
)
TWO_NODES = ["bash", "-c", f"""  # two launches on one machine, of one process each, that meet as on a cluster
    port=$((20000 + RANDOM))
    node() {{
        {sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank $1 \\
            --master_addr 127.0.0.1 --master_port $port "${{@:2}}"
    }}
    node 1 "$@" & node 0 "$@" && wait $!""", "nodes"]  # fmt: skip


def launch(*command, code=0, by=PYTHON, cwd=ROOT, timeout=600):
    """Runs a script and returns what it printed (stdout, stderr); fails unless it exits with `code`."""
    if by == PYTHON:
        status, out, err = launcher.run([*map(str, command)], cwd, timeout)
        assert status == code, f"exit code {status}\n{out}\n{err}"
        return out, err
    result = subprocess.run([*by, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout, result.stderr


def killed_when(condition, *command, timeout=300):
    """Runs a script and kills it, without a chance to tidy up, as soon as `condition()` holds."""
    process = launcher.start([*map(str, command)], ROOT, os.devnull, os.devnull)
    end = time.monotonic() + timeout
    while not condition() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


INVERT = ("--max_train_steps", 6, "--validation_steps", 3, "--validation_samples", 4, "--num_inference_steps", 4)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A folder with a 2-way 2-shot episode of val classes, inverted, generated from, distilled: every stage in little.

    Inverted and exported through `accelerate launch`, the rest through `python`; by whichever process of the tests
    comes first, for all.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root, done = base / "run", base / "run.done"
    with FileLock(base / "run.lock"):
        if not done.is_file():
            make_run(root)
            done.touch()
    return root


def make_run(root):
    episode = ("--split", "val", "--num_ways", 2, "--num_shots", 2)
    launch("-m", "common.datasets", "--output_dir", root, *episode)
    launch("tint_invert.py", "--support_dir", root / "support", "--output_dir", root / "inversion",
           "--num_vectors", 2, *INVERT, by=ACCELERATE)  # fmt: skip
    launch("tint_generate.py", "--inversion_dir", root / "inversion", "--output_dir", root / "generated",
           "--num_images_per_class", 6, "--alpha", 0, 0.5, 1)  # fmt: skip
    launch("distill.py", "--support_dir", root / "support", "--train_dir", root / "generated",
           "--output_dir", root / "student", "--max_train_steps", 10, "--train_batch_size", 8)  # fmt: skip
    launch("export.py", "--model", root / "student", "--output_dir", root / "export", "--data_dir", root / "generated",
           "--precision", "fp32", "fp16", "int8", "--benchmark", "--teacher", "assets/teacher", "--web",
           by=ACCELERATE)  # fmt: skip


def save_tiny_stable_diffusion(folder, prediction_type, heads, width, scheduler=DDIMScheduler, **scheduler_config):
    """A Stable Diffusion model with random weights, small, in the shape of a real one: an attention head size that is
    one number (1.x) or one per block (2.x), text encoder width `width`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=width, norm_num_groups=8,
        attention_head_dim=heads, use_linear_projection=not isinstance(heads, int),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "mini-sd" / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            prediction_type=prediction_type, **scheduler_config),
    )  # fmt: skip
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory):
    """Like Stable Diffusion 1.5: noise prediction, a PNDM scheduler's configuration, a pickle-free folder."""
    folder = tmp_path_factory.mktemp("sd1")
    save_tiny_stable_diffusion(folder, "epsilon", 8, 32, PNDMScheduler, skip_prk_steps=True, steps_offset=1)
    return folder


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory):
    """Like Stable Diffusion 2.1: velocity prediction, head sizes per block, a wider text encoder."""
    folder = tmp_path_factory.mktemp("sd2")
    save_tiny_stable_diffusion(folder, "v_prediction", (4, 8), 64, timestep_spacing="trailing")
    return folder
