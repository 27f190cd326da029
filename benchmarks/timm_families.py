"""Takes a small timm model of each of many families through a student's whole way: two steps of distill.py, its folder
opened as a stranger does, with timm alone, and every precision of export.py at batches of 1, 2 and 33. Prints a table
in Markdown: the largest difference of an answer to the stranger's, relative to the standard deviation of these.

    python -m benchmarks.timm_families

A family that cannot be a student is refused by distill.py with one message, before any work. Weights are random.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too
os.environ.setdefault("TQDM_DISABLE", "1")

import distill
import export
from common import datasets, models
from common.cli import HelpFormatter, UserError, run
from common.images import load_folder
from common.runtimes import open_exported

# And the largest difference expected. Of random weights, with batch normalisation that has seen two batches, answers to
# different images differ so little that the noise of 8 bits was found to be up to 1.6 of their standard deviations.
PRECISIONS = {"fp32": 1e-3, "fp16": 0.1, "int8": 2.0, "int8_tensorrt": 2.0}
BATCH_SIZES = (1, 2, 33)
STEPS = {"fastvit_t8": 40}  # after two steps its answers to different images hardly differ: 8 bits show 5.2 of that
OUTCOMES = {
    "works": "work in all that they promise",
    "is refused": "are refused before any work",
    "diverges": "diverge in training",
    "fails": "fail",
}
FAMILIES = {  # and the side of their images, None where it cannot be chosen
    "convnext_atto": 64, "convnextv2_atto": 64, "deit_tiny_distilled_patch16_224": 64, "deit_tiny_patch16_224": 64,
    "dla46_c": 64, "edgenext_xx_small": 64, "efficientformerv2_s0": 64, "efficientvit_b0": 64, "fastvit_t8": 64,
    "fbnetc_100": 32, "ghostnet_050": 32, "hardcorenas_a": 32, "lcnet_050": 32, "levit_128s": 64, "mambaout_femto": 64,
    "mixer_s32_224": 64, "mnasnet_small": 32, "mobilenetv2_035": 32, "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small_035": 32, "mobileone_s0": 64, "mobilevit_xxs": 64, "pit_ti_224": None,
    "poolformer_s12": 64, "pvt_v2_b0": 64, "regnetx_002": 32, "repghostnet_050": 32, "repvgg_a0": 32, "repvit_m0_9": 64,
    "resmlp_12_224": 64, "resnet10t": 32, "starnet_s1": 64, "tf_efficientnet_lite0": 32, "tinynet_e": 32,
    "xcit_nano_12_p16_224": 64,
}  # fmt: skip


def prepare(folder):
    """Writes an episode of Icons-FS: `support` of 2 images of each of 2 classes, and `query` of the others."""
    dataset = datasets.load_dataset("icons_fs", "val")
    episode = datasets.draw_episode(dataset, num_ways=2, num_shots=2, seed=0, index=0)
    for part, chosen in (("support", slice(2)), ("query", slice(2, 22))):
        datasets.write_images(dataset, {name: order[chosen] for name, order in episode.items()}, folder / part)


def try_family(name, size, folder):
    """A student of the family, in `folder`, which `prepare` has filled.

    Returns:
        {"parameters", "input_size", precision: largest difference of all batch sizes}
    Raises:
        UserError: it is refused, or its training diverges.
    """
    chosen = ["--student_image_size", str(size)] if size else []
    distill.main(distill.parse_args([
        "--support_dir", str(folder / "support"), "--supports_only", "--student", name, *chosen, "--output_dir",
        str(folder / name), "--max_train_steps", str(STEPS.get(name, 2)), "--train_batch_size", "4",
        "--learning_rate", "1e-5",
    ]))  # fmt: skip
    stranger = timm.create_model(f"local-dir:{folder / name}", pretrained=True).eval()
    images = load_folder(folder / "query", models.input_size(stranger)[0])[0][: max(BATCH_SIZES)]
    with torch.inference_mode():
        expected = stranger(models.normalize(stranger, images))
    export.main(export.parse_args([
        "--model", str(folder / name), "--output_dir", str(folder / f"{name}-export"), "--precision", *PRECISIONS,
        "--support_dir", str(folder / "support"), "--query_dir", str(folder / "query"), "--runtime", "onnxruntime",
    ]))  # fmt: skip
    found = {"parameters": sum(p.numel() for p in stranger.parameters()), "input_size": models.input_size(stranger)}
    for precision in PRECISIONS:
        file = open_exported(folder / f"{name}-export" / f"student_{precision}.onnx", torch.device("cpu"))
        largest = max((file(images[:count]) - expected[:count]).abs().max().item() for count in BATCH_SIZES)
        found[precision] = largest / expected.std().clamp_min(1e-6).item()
    return found


def outcome(name, size, folder):
    """What becomes of a family, one of OUTCOMES, and the cells of its row in the table."""
    try:
        found = try_family(name, size, folder)
    except Exception as error:
        kind = "fails"
        if isinstance(error, UserError) and not (folder / name).exists():
            kind = "diverges" if str(error).startswith("the loss is") else "is refused"
        message = " ".join(f"{kind}: {type(error).__name__}: {error}".split())
        return kind, ["", str(size or "its own"), message[:300], *[""] * (len(PRECISIONS) - 1)]
    good = {precision: found[precision] <= largest for precision, largest in PRECISIONS.items()}
    cells = [f"{found[precision]:.1e}" + " TOO LARGE" * (not ok) for precision, ok in good.items()]
    sides = "x".join(map(str, found["input_size"]))
    return "works" if all(good.values()) else "fails", [f"{found['parameters']:,}", sides, *cells]


def main(args):
    print(f"| student | parameters | input | {' | '.join(PRECISIONS)} | s |\n|---|---|---|" + "---|" * 5)
    count = Counter()
    for name in args.only or FAMILIES:
        before = time.time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            prepare(Path(folder))
            kind, cells = outcome(name, FAMILIES[name], Path(folder))
        count[kind] += 1
        print("| " + " | ".join([name, *cells, f"{time.time() - before:.0f}"]) + " |", flush=True)
    print("\n" + ", ".join(f"{count[kind]} {meaning}" for kind, meaning in OUTCOMES.items()))
    sys.exit(count["fails"] > 0)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), metavar="STUDENT", help="these families alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
