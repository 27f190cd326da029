"""The scripts as a user launches them, on a small episode: what they write, and that it does not depend on how."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import timm
import torch
import torch.nn.functional as F
import webdataset
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spandrel.architectures.ESRGAN import ESRGAN
from torchvision.datasets import ImageFolder

import tint_generate
import tint_invert
from benchmarks.flops import stable_diffusion_1_5
from common import diffusion, inversion, models
from common.cli import UserError
from common.images import load_folder, load_image
from common.records import write_json_lines
from common.shards import list_samples, open_samples
from tests.conftest import (
    INVERT,
    PYTHON,
    ROOT,
    THREE_PROCESSES,
    TWO_NODES,
    TWO_PROCESSES,
    killed_when,
    launch,
)


def classes_of(root):
    return sorted(p.name for p in (root / "support").iterdir())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def generate(root, output_dir, *options, by=PYTHON):
    launch("tint_generate.py", "--inversion_dir", root / "inversion", "--output_dir", output_dir, *options, by=by)


def test_inversion_writes_what_the_contract_says(run_dir):
    for name in classes_of(run_dir):
        folder = run_dir / "inversion" / name
        assert {p.name for p in folder.iterdir()} == {
            "learned_embeds.safetensors", "null_text.safetensors", "inversion.json", "reconstruction.png",
        }  # fmt: skip
        assert {k: v.shape for k, v in load_file(folder / "learned_embeds.safetensors").items()} == {
            f"<{name}>": (2, 192)
        }
        tensors = load_file(folder / "null_text.safetensors")
        assert tensors["latents"].shape == (2, 4, 8, 8) == tensors["image_latents"].shape
        assert tensors["null_offsets"].shape == (2, 4, 16, 192) and tensors["null_offsets"].dtype == torch.float16
        facts = json.loads((folder / "inversion.json").read_text())
        assert facts["images"] == sorted(p.name for p in (run_dir / "support" / name).iterdir())
        assert [step for step, _ in facts["textual_inversion_loss"]] == [0, 3, 6]
        psnr = facts["reconstruction_psnr_db"]
        assert all(len(psnr[kind]) == 2 for kind in ("vae", "ddim", "null_text"))


def test_the_learned_word_works_in_a_stock_pipeline(run_dir):
    name = classes_of(run_dir)[0]
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "mini-sd", safety_checker=None)
    pipe.load_textual_inversion(str(run_dir / "inversion" / name / "learned_embeds.safetensors"))
    vectors = load_file(run_dir / "inversion" / name / "learned_embeds.safetensors")[f"<{name}>"]
    ids = pipe.tokenizer.convert_tokens_to_ids([f"<{name}>", f"<{name}>_1"])
    torch.testing.assert_close(pipe.text_encoder.get_input_embeddings().weight[ids], vectors)
    pipe.set_progress_bar_config(disable=True)
    draw = [
        pipe(prompt, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for prompt in (f"an icon of a <{name}>", "an icon of a")
    ]
    assert draw[0].shape == (1, 3, 32, 32) and (draw[0] - draw[1]).abs().max() > 0.01


def test_generation_writes_what_the_contract_says(run_dir):
    rows = rows_of(run_dir / "generated")
    names = classes_of(run_dir)
    assert [row["file_name"] for row in rows] == [f"{name}/{i:05d}.png" for name in names for i in range(6)]
    assert [row["alpha"] for row in rows[:6]] == [0, 0.5, 1] * 2
    assert len({row["support_image"] for row in rows[:6]}) == 2
    dataset = ImageFolder(run_dir / "generated")
    assert dataset.classes == names and len(dataset) == 12 and dataset[0][0].size == (32, 32)
    grid = pixels(run_dir / "generated" / "grid.png")
    last = pixels(run_dir / "generated" / names[1] / "00005.png")
    assert np.array_equal(grid[-128::4, -128::4], last) and np.array_equal(grid[-127::4, -125::4], last)
    assert [grid.shape[k] // 130 for k in (0, 1)] == [4, 5]  # supports and three alphas; two supports of two classes
    assert (grid[:30] < 99).any() and all((grid[-130 * k :, :90][:128] < 99).any() for k in range(1, 5))  # words
    for name in names:
        grid = pixels(run_dir / "inversion" / name / "reconstruction.png")
        image = json.loads((run_dir / "inversion" / name / "inversion.json").read_text())["images"][1]
        assert np.array_equal(grid[-4 * 130 + 2 :, -128:][:128][::4, ::4], pixels(run_dir / "support" / name / image))


def test_alpha_zero_gives_the_null_text_reconstruction_back(run_dir):
    for name in classes_of(run_dir):
        facts = json.loads((run_dir / "inversion" / name / "inversion.json").read_text())
        for k, (image, expected) in enumerate(zip(facts["images"], facts["reconstruction_psnr_db"]["null_text"])):
            original = load_image(run_dir / "support" / name / image)
            made = load_image(run_dir / "generated" / name / f"{3 * k:05d}.png")  # alpha 0 of support k
            psnr = -10 * ((made - original) ** 2).mean().log10().item()
            assert psnr == pytest.approx(expected, abs=0.1)


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_are_the_same_to_the_byte_whatever_the_processes_and_interruptions(run_dir, tmp_path):
    options = ("--num_images_per_class", 6, "--alpha", 0, 0.5, 1, "--batch_size", 4)
    generate(run_dir, tmp_path / "one", *options)
    expected = files_below(tmp_path / "one")
    generate(run_dir, tmp_path / "two", *options, by=TWO_NODES)
    assert files_below(tmp_path / "two") == expected
    killed = ("--inversion_dir", run_dir / "inversion", "--output_dir", tmp_path / "killed", *options)
    killed_when(lambda: list((tmp_path / "killed").glob(".rows/*.jsonl")), "tint_generate.py", *killed)
    made = files_below(tmp_path / "killed")
    assert 4 <= sum(path.suffix == ".png" for path in made) < 12 and not (tmp_path / "killed" / "grid.png").exists()
    generate(run_dir, tmp_path / "killed", *options)
    assert files_below(tmp_path / "killed") == expected
    removed = sorted((tmp_path / "killed").glob("*/*.png"))[1::3]
    for path in removed:
        path.unlink()
    generate(run_dir, tmp_path / "killed", *options)
    assert files_below(tmp_path / "killed") == expected
    killed_when(lambda: list((tmp_path / "more").glob(".rows/*.jsonl")), "tint_generate.py", "--inversion_dir",
                run_dir / "inversion", "--output_dir", tmp_path / "more", *options[2:], "--num_images_per_class", 4,
                "--batch_size", 3)  # fmt: skip
    generate(run_dir, tmp_path / "more", *options)  # goes on with more images in other batches
    assert (tmp_path / "more" / "metadata.jsonl").read_bytes() == expected[Path("metadata.jsonl")]
    for path in sorted((run_dir / "generated").glob("*/*.png")):  # made in batches of 50
        difference = np.abs(pixels(path) - pixels(tmp_path / "one" / path.relative_to(run_dir / "generated")))
        assert difference.mean() < 1 and difference.max() < 16


def rows_of(folder, file="metadata.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_the_methods_start_from_what_they_say(run_dir, tmp_path):
    made, plain = {}, tmp_path / "plain" / "inversion"
    launch("tint_invert.py", "--support_dir", run_dir / "support", "--output_dir", plain, "--prompt", "an icon",
           *INVERT, "--max_train_steps", 0)  # fmt: skip
    for method in ("tint", "textual_inversion", "null_text"):
        root = plain.parent if method == "null_text" else run_dir
        generate(root, tmp_path / method, "--num_images_per_class", 2, "--alpha", 1, "--method", method,
                 "--null_text_fade", 0)  # fmt: skip
        made[method] = load_folder(tmp_path / method)[0]
    _, error = launch("tint_generate.py", "--inversion_dir", run_dir / "inversion", "--output_dir", tmp_path / "none",
                      "--method", "null_text", code=2)  # fmt: skip
    assert 'tint_invert.py --prompt "a photo" --max_train_steps 0' in error
    # At alpha 1 all three start from the same noise and differ by prompt and null-text alone.
    for a, b in (("tint", "textual_inversion"), ("tint", "null_text"), ("textual_inversion", "null_text")):
        assert (made[a] - made[b]).abs().mean() > 0.003
    generate(run_dir, tmp_path / "faded", "--num_images_per_class", 2, "--alpha", 1, "--null_text_fade", 1)
    assert (load_folder(tmp_path / "faded")[0] - made["textual_inversion"]).abs().max() < 0.02  # no null-text is left
    rows = rows_of(tmp_path / "textual_inversion")
    assert "alpha" not in rows[0] and "support_image" not in rows[0]

    generate(run_dir, tmp_path / "copies", "--num_images_per_class", 2, "--alpha", 0, 0.5, "--method", "img2img")
    pipe = diffusion.load_stable_diffusion("assets/mini-sd", "cpu")
    for row in rows_of(tmp_path / "copies"):
        original = load_image(run_dir / "support" / row["label"] / row["support_image"])[None]
        decoded = diffusion.decode_latents(pipe, diffusion.encode_images(pipe.vae, original))
        distance = (load_image(tmp_path / "copies" / row["file_name"]) - decoded).abs().mean()
        assert (distance < 0.02) == (row["alpha"] == 0)  # hardly noised: what the VAE makes of it


def test_uniform_alphas_and_a_guidance_scale_for_each_alpha(run_dir, tmp_path):
    generate(run_dir, tmp_path / "uniform", "--num_images_per_class", 40, "--alpha", "uniform")
    alphas = [row["alpha"] for row in rows_of(tmp_path / "uniform")]
    assert scipy.stats.kstest(alphas, "uniform").pvalue > 0.01 and len(set(alphas)) == 80
    assert pixels(tmp_path / "uniform" / "grid.png").shape[0] // 130 == 7  # supports, and alphas by fifths
    generate(run_dir, tmp_path / "scales", "--num_images_per_class", 2, "--alpha", 0.9, 0.9, "--guidance_scale", 1, 6)
    for kind in (1, 6):
        generate(run_dir, tmp_path / str(kind), "--num_images_per_class", 2, "--alpha", 0.9, "--guidance_scale", kind)
    for row in rows_of(tmp_path / "scales"):
        same, other = ("1", "6") if row["index"] == 0 else ("6", "1")
        assert row["guidance_scale"] == float(same)
        image = pixels(tmp_path / "scales" / row["file_name"])
        if row["index"] == 0:  # the second image of "scales" has the same support as the first, in the others the next
            assert np.abs(image - pixels(tmp_path / same / row["file_name"])).mean() < 1
            assert np.abs(image - pixels(tmp_path / other / row["file_name"])).mean() > 3


def test_generation_goes_on_where_it_was_and_what_lies_beside_it_is_left_alone(run_dir, tmp_path):
    """A smaller photo that came since, more steps than there are, another model, a tracker, an archive beside."""
    for name in ("inversion", "generated"):
        shutil.copytree(run_dir / name, tmp_path / name)
    facts = {path: json.loads(path.read_text()) for path in tmp_path.glob("inversion/*/inversion.json")}
    for path, known in facts.items():
        path.write_text(json.dumps(known | {"image_size": 20}))
    before = files_below(tmp_path / "generated")
    generate(tmp_path, tmp_path / "generated", "--num_images_per_class", 6, "--alpha", 0, 0.5, 1,
             "--num_inference_steps", 50)  # fmt: skip
    assert files_below(tmp_path / "generated") == before
    assert json.loads((tmp_path / "generated" / "generation.json").read_text())["settings"]["num_inference_steps"] == 4

    for path, known in facts.items():
        path.write_text(json.dumps(known | {"settings": known["settings"] | {"variant": "fp16"}}))
    made = tmp_path / "made"
    generate(tmp_path, made, "--pretrained_model_name_or_path", ROOT / "assets" / "mini-sd",
             "--num_images_per_class", 1, "--report_to", "tensorboard")  # fmt: skip
    assert (made / "grid.png").is_file() and any(made.glob(".trackers/tint/events*"))
    (made / "photos.tar").write_bytes(b"of somebody")
    assert {name: len(paths) for name, paths in list_samples(made, classes_of(run_dir)).items()} == dict.fromkeys(
        classes_of(run_dir), 1
    )
    assert len(list(open_samples(made))) == 2
    (made / ".rows").mkdir()
    with pytest.raises(UserError, match="has not finished"):
        list_samples(made, classes_of(run_dir))
    (made / ".rows").rmdir()
    (made / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="has not finished"):
        list_samples(made, classes_of(run_dir))


def test_shards_hold_the_same_images_and_train_the_same_student(run_dir, tmp_path):
    options = ("--num_images_per_class", 6, "--alpha", 0, 0.5, 1, "--batch_size", 4)
    generate(run_dir, tmp_path / "folder", *options, "--image_format", "webp")
    shards = (*options, "--image_format", "webp", "--format", "webdataset", "--shard_size", 4)
    generate(run_dir, tmp_path / "shards", *shards, by=TWO_PROCESSES)
    expected = files_below(tmp_path / "shards")
    names = [str(tmp_path / "shards" / f"{k:06d}.tar") for k in range(3)]
    samples = {s["__key__"]: s for s in webdataset.WebDataset(names, shardshuffle=False)}
    rows = rows_of(tmp_path / "folder")
    assert len(samples) == 12 == len(rows)
    for row in rows:
        sample = samples[row["file_name"].removesuffix(".webp")]
        assert sample["webp"] == (tmp_path / "folder" / row["file_name"]).read_bytes()
        assert json.loads(sample["json"]).items() >= row.items()
    (tmp_path / "shards" / "000001.tar").unlink()
    generate(run_dir, tmp_path / "shards", *shards)
    assert files_below(tmp_path / "shards") == expected

    students = []
    for kind in ("folder", "shards"):
        launch("distill.py", "--support_dir", run_dir / "support", "--train_dir", tmp_path / kind, "--output_dir",
               tmp_path / f"{kind}-student", "--max_train_steps", 3, "--train_batch_size", 8)  # fmt: skip
        students.append((tmp_path / f"{kind}-student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_the_filter_drops_what_the_teacher_gives_to_another_class(run_dir, tmp_path):
    options = ("--num_images_per_class", 8, "--alpha", 1)
    generate(run_dir, tmp_path / "all", *options)
    generate(run_dir, tmp_path / "filtered", *options, "--filter_threshold", 0.3)
    model = models.load_model("assets/teacher")
    size = models.input_size(model)[0]
    images, labels, _, paths = load_folder(tmp_path / "all", size)
    supports, support_labels, *_ = load_folder(run_dir / "support", size)
    teacher = models.PrototypeClassifier(model, supports, support_labels)
    with torch.no_grad():
        confidences, answers = teacher(images).softmax(-1).max(-1)
    wrong = {p.relative_to(tmp_path / "all") for p, bad in zip(paths, (answers != labels) & (confidences > 0.3)) if bad}
    assert 0 < len(wrong) < 16  # four steps of diffusion at alpha 1 go wrong often enough
    left = {path.relative_to(tmp_path / "filtered") for path in (tmp_path / "filtered").glob("*/*.png")}
    assert left == {path.relative_to(tmp_path / "all") for path in paths} - wrong
    dropped = rows_of(tmp_path / "filtered", "dropped.jsonl")
    assert len(rows_of(tmp_path / "filtered")) == 16 - len(wrong)
    assert {f"{row['label']}/{row['index']:05d}.png" for row in dropped} == {str(path) for path in wrong}
    assert all("the teacher calls it" in row["dropped"] for row in dropped)
    before = files_below(tmp_path / "filtered")
    generate(run_dir, tmp_path / "filtered", *options, "--filter_threshold", 0.3)  # finds nothing to do
    assert files_below(tmp_path / "filtered") == before
    record = tmp_path / "filtered" / "generation.json"
    record.write_text(re.sub('("teacher_weights": ")[^"]*', r"\g<1>0123456789abcdef", record.read_text()))
    _, error = launch("tint_generate.py", "--inversion_dir", run_dir / "inversion", "--output_dir", record.parent,
                      *options, "--filter_threshold", 0.3, code=2)  # fmt: skip
    assert "teacher_weights changed" in error
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "filtered"), cache_dir=str(tmp_path / "c"))
    assert len(loaded["train"]) == 16 - len(wrong) and None not in loaded["train"]["image"]


def test_a_filter_may_drop_everything(run_dir, tmp_path, monkeypatch, capsys):
    def drop(rows, *_):
        for row in rows:
            row |= {"file_name": None, "dropped": "the teacher calls it another"}

    monkeypatch.setattr(tint_generate, "drop_strangers", drop)
    options = ["--inversion_dir", run_dir / "inversion", "--output_dir", tmp_path, "--num_images_per_class", 1]
    tint_generate.main(tint_generate.parse_args([*map(str, options), "--filter_threshold", "0.5"]))
    assert "0 images in" in capsys.readouterr().out and not rows_of(tmp_path)
    assert len(rows_of(tmp_path, "dropped.jsonl")) == 2


def test_generated_folders_open_as_the_libraries_expect(run_dir, tmp_path):
    folder = run_dir / "generated"
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path))["train"]
    rows = rows_of(folder)
    assert len(loaded) == len(rows) == len(ImageFolder(folder))
    for row, sample in zip(rows, loaded):
        assert sample["label"] == row["label"] and sample["alpha"] == row["alpha"]
        assert (np.asarray(sample["image"]) == pixels(folder / row["file_name"])).all()
    labelled = datasets.load_dataset("imagefolder", data_files=f"{folder}/*/*.png", cache_dir=str(tmp_path))["train"]
    assert labelled.features["label"].names == classes_of(run_dir)
    assert [labelled.features["label"].int2str(i) for i in labelled["label"]] == [row["label"] for row in rows]


def test_specificity_and_diversity_of_a_generated_folder(run_dir, tmp_path):
    output, _ = launch("evaluate.py", "--generated_dir", f"tint={run_dir / 'generated'}", "--support_dir",
                       run_dir / "support", "--data_dir", run_dir / "query", "--output_dir", tmp_path)  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert f"{results['sets']['tint'][0]['nearest_support']:.3f}" in output
    teacher = models.load_model("assets/teacher")
    (images, labels, *_), (supports, support_labels, *_) = (
        load_folder(run_dir / part, models.input_size(teacher)[0]) for part in ("generated", "support")
    )
    with torch.no_grad():
        f, g = (models.features(teacher, x).double().numpy() for x in (images, supports))
    centre = g.mean(0)
    alphas = np.array([row["alpha"] for row in rows_of(run_dir / "generated")])
    for row in results["sets"]["tint"]:
        at, nearest, pairwise = alphas == row["alpha"], [], []
        for c in (0, 1):
            own = f[at & (labels == c).numpy()] - centre
            nearest += list(scipy.spatial.distance.cdist(own, g[support_labels == c] - centre, "cosine").min(1))
            pairwise.append(scipy.spatial.distance.pdist(own, "cosine").mean())
        assert row["images"] == 4 and row["agreement"]["mean"] in (0, 0.25, 0.5, 0.75, 1)
        assert row["nearest_support"] == pytest.approx(np.mean(nearest), abs=1e-4)
        assert row["pairwise"] == pytest.approx(np.mean(pairwise), abs=1e-4)
    own = [scipy.spatial.distance.pdist(g[support_labels == c] - centre, "cosine") for c in (0, 1)]
    assert results["real"]["supports"]["pairwise"] == pytest.approx(np.mean(own), abs=1e-4)
    assert results["real"]["supports"]["nearest_support"] == pytest.approx(np.mean(own), abs=1e-4)  # two a class
    right = []  # of each support the prototypes of all others, in float64
    for i in range(len(g)):
        kept = np.arange(len(g)) != i
        unit = g - g[kept].mean(0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        own = [unit[kept & (support_labels == c).numpy()].mean(0) for c in (0, 1)]
        right.append(np.argmax([unit[i] @ p / np.linalg.norm(p) for p in own]) == support_labels[i].item())
    assert results["real"]["supports"]["agreement"]["mean"] == np.mean(right)
    assert results["real"]["real images"]["images"] > 20
    one = [sorted((run_dir / "support" / name).iterdir())[0] for name in classes_of(run_dir)]
    for path in one:
        (tmp_path / "one" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "one" / path.parent.name)
    output, err = launch("evaluate.py", "--generated_dir", run_dir / "generated", "--support_dir", tmp_path / "one",
                         "--data_dir", tmp_path / "one", "--output_dir", tmp_path / "of_one")  # fmt: skip
    supports = json.loads((tmp_path / "of_one" / "results.json").read_text())["real"]["supports"]
    assert supports["agreement"] is None and "2 of 2 images" in err and "are supports" in err
    output, _ = launch("evaluate.py", "--generated_dir", run_dir / "generated", "--support_dir", tmp_path / "one",
                       "--output_dir", tmp_path / "of_one")  # fmt: skip
    assert re.search(r"^supports +2 *$", output, re.MULTILINE)  # of single ones nothing is known
    assert "Cosine distance to the nearest support" in (tmp_path / "report.html").read_text()


def test_alphas_of_somebody_elses_metadata_count_for_none(run_dir, tmp_path):
    rows = rows_of(run_dir / "generated")
    shutil.copytree(run_dir / "generated", tmp_path / "generated")
    rows = [row | {"alpha": alpha} for row, alpha in zip(rows, [[], {}, "x", float("nan"), 7] * 3)]
    write_json_lines(tmp_path / "generated" / "metadata.jsonl", rows)
    launch("evaluate.py", "--generated_dir", tmp_path / "generated", "--support_dir", run_dir / "support",
           "--output_dir", tmp_path / "out")  # fmt: skip
    ((found,),) = json.loads((tmp_path / "out" / "results.json").read_text())["sets"].values()
    assert found["alpha"] is None and found["images"] == len(rows)


@pytest.mark.parametrize("by", [THREE_PROCESSES, TWO_NODES], ids=["three processes", "two nodes"])
def test_inversion_does_not_depend_on_batching_or_processes(run_dir, tmp_path, by):
    """Of three processes one has no class."""
    options = ("--support_dir", run_dir / "support", "--num_vectors", 2, *INVERT)
    launch("tint_invert.py", *options, "--output_dir", tmp_path, "--class_batch_size", 1,
           "--null_text_batch_size", 1, by=by)  # fmt: skip
    for name in classes_of(run_dir):
        folders = tmp_path / name, run_dir / "inversion" / name
        for file in ("learned_embeds", "null_text"):
            ours, reference = (load_file(folder / f"{file}.safetensors") for folder in folders)
            for key in reference:
                difference = (ours[key] - reference[key]).abs()
                # Adam's first steps follow the sign of a gradient, even of one that is no more than rounding.
                assert difference.mean() < 1e-3 and difference.max() < (0.1 if key == "null_offsets" else 0.01), key
        psnr = [json.loads((f / "inversion.json").read_text())["reconstruction_psnr_db"]["null_text"] for f in folders]
        assert psnr[0] == pytest.approx(psnr[1], abs=0.05)


def test_an_interrupted_inversion_goes_on_and_ends_the_same(run_dir, tmp_path):
    """Killed in textual inversion, and again after one batch of images: the files are those of an undisturbed run."""
    options = ("--support_dir", run_dir / "support", "--max_train_steps", 60, "--validation_steps", 5, "--patience", 0,
               "--validation_samples", 4, "--num_inference_steps", 8, "--null_text_batch_size", 1)  # fmt: skip
    launch("tint_invert.py", *options, "--output_dir", tmp_path / "undisturbed")
    output_dir = tmp_path / "killed"

    def steps():
        try:
            with safe_open(next(output_dir.glob(".partial-*/textual_inversion.safetensors")), "pt") as file:
                return json.loads(file.metadata()["progress"])[0]
        except (StopIteration, FileNotFoundError):
            return 0

    command = ("tint_invert.py", *options, "--output_dir", output_dir)
    killed_when(lambda: steps() >= 15, *command)
    assert 15 <= steps() < 60 and not list(output_dir.glob(".partial-*/images-*"))
    killed_when(lambda: list(output_dir.glob(".partial-*/images-0.safetensors")), *command)
    assert steps() == 60 and not list(output_dir.glob("*/inversion.json"))
    launch(*command)
    files = [path.relative_to(output_dir) for path in sorted(output_dir.glob("**/*")) if path.is_file()]
    assert len(files) == 8
    for file in files:
        assert (output_dir / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes(), file


def test_textual_inversion_stops_class_by_class_with_its_best_vectors(run_dir, tmp_path):
    options = ("--support_dir", run_dir / "support", "--output_dir", tmp_path, "--num_inference_steps", 2,
               "--null_text_steps", 0, "--validation_steps", 2, "--patience", 2)  # fmt: skip
    launch("tint_invert.py", *options, "--learning_rate", 0.05, "--max_train_steps", 60)
    records = {name: json.loads((tmp_path / name / "inversion.json").read_text()) for name in classes_of(run_dir)}
    curves = {name: r["textual_inversion_loss"] for name, r in records.items()}
    assert len({curve[-1][0] for curve in curves.values()}) == 2 and all(c[-1][0] < 60 for c in curves.values())
    for name, curve in curves.items():
        steps, losses = zip(*curve)
        for end in range(3, len(losses)):  # it went on while one of the last two was a gain of 0.2%
            assert min(losses[:end]) < 0.998 * min(losses[: end - 2])
        assert min(losses) >= 0.998 * min(losses[:-2])
        best = steps[int(np.argmin(losses))]
        again = tmp_path / f"{best} steps"  # a run that ends at the best step, and keeps its last vectors
        options = ("--support_dir", run_dir / "support", "--output_dir", again, "--num_inference_steps", 2,
                   "--null_text_steps", 0, "--validation_steps", 2, "--patience", 0)  # fmt: skip
        launch("tint_invert.py", *options, "--learning_rate", 0.05, "--max_train_steps", best)
        ours, reference = (load_file(d / name / "learned_embeds.safetensors") for d in (tmp_path, again))
        torch.testing.assert_close(ours[f"<{name}>"], reference[f"<{name}>"], rtol=1e-3, atol=1e-3)


def test_inversion_without_optimisation(run_dir, tmp_path):
    """With the prompt for null-text nothing is guided, and DDIM inversion comes back if fixed-point steps mend it."""
    psnr = {}
    for steps in (0, 3):
        options = ("--null_text_start", 1, "--null_text_steps", 0, "--fixed_point_steps", steps, "--max_train_steps", 0)
        launch("tint_invert.py", "--support_dir", run_dir / "support", "--output_dir", tmp_path / str(steps), *options)
        records = [json.loads(p.read_text()) for p in (tmp_path / str(steps)).glob("*/inversion.json")]
        assert all(n == 0 for record in records for n in record["null_text_steps"])
        psnr[steps] = {k: np.mean([r["reconstruction_psnr_db"][k] for r in records]) for k in ("vae", "null_text")}
    assert psnr[3]["null_text"] > psnr[0]["null_text"] + 0.5
    assert psnr[3]["null_text"] > psnr[3]["vae"] - 0.3


def test_a_second_run_changes_nothing_and_other_settings_are_refused(run_dir):
    options = ("--support_dir", run_dir / "support", "--output_dir", run_dir / "inversion")
    marker = run_dir / "inversion" / classes_of(run_dir)[0] / "inversion.json"
    before = marker.stat().st_mtime_ns
    out, _ = launch("tint_invert.py", *options, "--num_vectors", 2, *INVERT)
    assert "of which 0 new" in out and marker.stat().st_mtime_ns == before
    _, err = launch("tint_invert.py", *options, "--num_vectors", 1, *INVERT, code=2)
    assert "num_vectors: 2 then, 1 now" in err and marker.stat().st_mtime_ns == before


def test_adding_is_adding(run_dir, tmp_path):
    """Another class, and another photo of a class: what was there stays, to the byte, and only the new is made."""
    for part in ("support", "inversion", "generated"):
        shutil.copytree(run_dir / part, tmp_path / part)
    names, new = classes_of(run_dir), "a qwxz"
    photos = [sorted((run_dir / "query" / name).iterdir())[0] for name in names]
    (tmp_path / "support" / new).mkdir()
    shutil.copy(photos[1], tmp_path / "support" / new / "first.png")
    shutil.copy(photos[0], tmp_path / "support" / names[0] / "more.png")
    (tmp_path / "inversion" / ".partial-of-others").mkdir()
    (tmp_path / "inversion" / ".partial-of-others" / "classes.json").write_text('["somebody elses"]')
    before = files_below(tmp_path / "inversion") | files_below(tmp_path / "generated")
    invert = ("tint_invert.py", "--support_dir", tmp_path / "support", "--output_dir", tmp_path / "inversion",
              "--num_vectors", 2, *INVERT)  # fmt: skip
    out, _ = launch(*invert)
    assert f"1 photo added to {names[0]}: more.png" in out and "3 classes" in out and "of which 1 new" in out
    assert "qwxz" in out.split("(not in the tokenizer: ")[1].split(")")[0] and "by the VAE alone at" in out
    changed = {"inversion.json", "null_text.safetensors"}
    after = files_below(tmp_path / "inversion")
    assert {path for path in after if before.get(path) != after[path]} == {
        *(Path(names[0], file) for file in changed), Path(names[0], "reconstruction_from_2.png"),
        Path(names[1], "inversion.json"),  # which says where the photos are now
        *(path for path in after if path.parts[0] == new),
    }  # fmt: skip
    facts, other = (json.loads(after[Path(name, "inversion.json")]) for name in names)
    assert other["support_dir"] == str(tmp_path / "support")
    assert facts["images"][2:] == ["more.png"] == facts["added"]
    assert all(len(values) == 3 for values in facts["reconstruction_psnr_db"].values())
    ours, old = (load_file(f / "inversion" / names[0] / "null_text.safetensors") for f in (tmp_path, run_dir))
    assert all(ours[k].shape[0] == 3 and torch.equal(ours[k][:2], old[k]) for k in old)
    make = ("tint_generate.py", "--inversion_dir", tmp_path / "inversion", "--output_dir", tmp_path / "generated",
            "--num_images_per_class", 6, "--alpha", 0, 0.5, 1)  # fmt: skip
    out, _ = launch(*make)
    assert "21 images" in out and "9 made now" in out and "at alpha 0.5" in out
    after = files_below(tmp_path / "generated")
    same = {path for path in before if path.suffix == ".png" and path.name[0] == "0"}
    assert len(same) == 12 and all(after[path] == before[path] for path in same)
    rows = rows_of(tmp_path / "generated")
    assert [row["file_name"] for row in rows if row.get("support_image") == "more.png"] == [
        f"{names[0]}/{i:05d}.png" for i in (6, 7, 8)
    ]
    assert sum(row["label"] == new for row in rows) == 6
    out, _ = launch(*make)
    assert "0 made now" in out and files_below(tmp_path / "generated") == after
    free = ("tint_generate.py", "--inversion_dir", tmp_path / "inversion", "--method", "textual_inversion",
            "--num_images_per_class", 2)  # fmt: skip
    out, _ = launch(*free, "--output_dir", tmp_path / "free")
    assert "6 images in" in out  # no support has a share of images that are made of none
    (tmp_path / "support").rename(tmp_path / "moved")
    out, _ = launch(*make, "--support_dir", tmp_path / "moved", "--output_dir", tmp_path / "elsewhere")
    grids = [pixels(tmp_path / part / "grid.png") for part in ("generated", "elsewhere")]  # in other company, of images
    assert grids[0].shape == grids[1].shape and np.abs(grids[0] - grids[1]).mean() < 1  # that round otherwise
    (tmp_path / "moved").rename(tmp_path / "support")
    photo = tmp_path / "support" / names[0] / "more.png"
    photo.rename(tmp_path / "more.png")  # of what is gone, or is another, nothing more is made
    _, err = launch(*make, "--num_images_per_class", 9, code=2)
    assert f"1 photo removed from {names[0]}: more.png" in err and "inversion.json is of other photos" in err
    (tmp_path / "more.png").rename(photo)
    shutil.rmtree(tmp_path / "support" / new)  # taken away: not generated without a word
    _, err = launch(*make, code=2)
    assert f"{new} is left out" in err and f"removed from {new}: first.png" in err
    out, _ = launch(*invert)
    assert f"{new} was inverted before" in out
    (tmp_path / "support" / names[0] / "more.png").unlink()
    _, err = launch(*invert, code=2)
    assert f"1 photo removed from {names[0]}: more.png" in err and "delete" not in err


def test_what_is_left_of_an_interrupted_addition_is_of_these_photos_only(run_dir, tmp_path, monkeypatch):
    """Who then takes the class away has it inverted as if nothing had been there."""
    for part in ("support", "inversion"):
        shutil.copytree(run_dir / part, tmp_path / part)
    name = classes_of(run_dir)[0]
    shutil.copy(sorted((run_dir / "query" / name).iterdir())[0], tmp_path / "support" / name / "more.png")
    options = ("--support_dir", tmp_path / "support", "--num_vectors", 2, *INVERT, "--null_text_batch_size", 1)

    def invert(folder):
        tint_invert.main(tint_invert.parse_args([*map(str, options), "--output_dir", str(folder)]))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tint_invert.inversion, "write_inversion", Mock(side_effect=KeyboardInterrupt))
        invert(tmp_path / "inversion")
    assert list(tmp_path.glob("inversion/.partial-*/images-0.safetensors"))
    shutil.rmtree(tmp_path / "inversion" / name)
    invert(tmp_path / "inversion")
    invert(tmp_path / "fresh")
    ours, fresh = (load_file(tmp_path / part / name / "null_text.safetensors") for part in ("inversion", "fresh"))
    assert all(torch.equal(ours[k], fresh[k]) for k in fresh) and not list(tmp_path.glob("inversion/.partial-*"))


def test_a_diffusion_model_is_known_by_its_weights_and_precision(run_dir, tmp_path):
    shutil.copytree("assets/mini-sd", tmp_path / "model")
    invert = ("tint_invert.py", "--support_dir", run_dir / "support", "--output_dir", tmp_path / "inversion",
              "--pretrained_model_name_or_path", tmp_path / "model", "--max_train_steps", 0, "--num_inference_steps", 2,
              "--null_text_steps", 0)  # fmt: skip
    launch(*invert)
    _, err = launch(*invert, "--mixed_precision", "bf16", code=2)
    assert "mixed_precision: no then, bf16 now" in err and "weights" not in err
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: -v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    _, err = launch(*invert, code=2)
    assert "model_weights changed" in err
    _, err = launch(
        "tint_generate.py", "--inversion_dir", tmp_path / "inversion", "--output_dir", tmp_path / "out", code=2
    )
    assert f"The weights of {tmp_path / 'model'} are not those" in err and not (tmp_path / "out").exists()
    save_file({k: -v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    launch(*invert)  # it is the model of before
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for change in ({"prediction_type": "v_prediction"}, {"set_alpha_to_one": True}):
        scheduler.write_text(json.dumps(config | change))
        _, err = launch(*invert, code=2)
        assert "model_weights changed" in err


def test_the_curves_of_all_processes_reach_a_tracker(run_dir, tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    launch("tint_invert.py", "--support_dir", run_dir / "support", "--output_dir", tmp_path, *INVERT,
           "--class_batch_size", 1, "--report_to", "tensorboard", by=TWO_PROCESSES)  # fmt: skip
    events = tensorboard.EventAccumulator(str(next(tmp_path.glob(".trackers/tint/events*")))).Reload()
    for name in classes_of(run_dir):
        record = json.loads((tmp_path / name / "inversion.json").read_text())["textual_inversion_loss"]
        found = [(event.step, pytest.approx(event.value)) for event in events.Scalars(f"textual_inversion_loss/{name}")]
        assert found == [tuple(row) for row in record] and len(record) > 1


def test_classes_of_a_batch_stay_together_when_killed_between_them(run_dir, tmp_path, monkeypatch):
    """The second would else be inverted alone, and differ in its last bits."""
    options = ("--support_dir", run_dir / "support", "--class_batch_size", 2, "--null_text_batch_size", 3, *INVERT)
    launch("tint_invert.py", *options, "--output_dir", tmp_path / "undisturbed")
    write, written = inversion.write_inversion, []

    def killed(folder, *args):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        write(folder, *args)

    monkeypatch.setattr(inversion, "write_inversion", killed)
    with pytest.raises(KeyboardInterrupt):
        tint_invert.main(tint_invert.parse_args([*map(str, options), "--output_dir", str(tmp_path / "killed")]))
    assert [path.parent for path in (tmp_path / "killed").glob("*/inversion.json")] == written
    launch("tint_invert.py", *options, "--output_dir", tmp_path / "killed")
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "undisturbed")


def test_other_images_are_not_taken_for_the_same_work(run_dir, tmp_path):
    """A path says nothing of what lies there: the record holds a fingerprint of the images."""
    for part in ("support", "inversion", "generated", "student"):
        shutil.copytree(run_dir / part, tmp_path / part)
    generated = ("--inversion_dir", tmp_path / "inversion", "--output_dir", tmp_path / "generated")
    alphas = ("--alpha", 0, 0.5, 1)
    _, err = launch("tint_generate.py", *generated, *alphas, "--num_images_per_class", 4, code=2)
    assert "00004.png: give another --output_dir" in err
    distil = ("--support_dir", tmp_path / "support", "--train_dir", tmp_path / "generated", "--output_dir",
              tmp_path / "student", "--max_train_steps", 10, "--train_batch_size", 8)  # fmt: skip
    out, _ = launch("distill.py", *distil)
    assert "already there" in out  # moved, but the same
    some = sorted((tmp_path / "support").glob("*/*.png"))[0]
    other = tmp_path / "support" / classes_of(run_dir)[1] / "moved.png"
    some.rename(other)
    _, err = launch("distill.py", *distil, code=2)
    assert "support_images" in err  # the same images of other classes
    other.rename(some)
    shutil.copytree("assets/teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    _, err = launch("distill.py", *distil, "--teacher", tmp_path / "teacher", code=2)
    assert "teacher: assets/teacher then" in err and "teacher_weights" not in err
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "other.safetensors")
    _, err = launch("distill.py", *distil, "--teacher_checkpoint", tmp_path / "other.safetensors", code=2)
    assert "teacher_weights" in err
    Image.new("RGB", (32, 32), "red").save(some)
    _, err = launch("distill.py", *distil, code=2)
    assert "support_images" in err
    _, err = launch("tint_invert.py", "--support_dir", tmp_path / "support", "--output_dir", tmp_path / "inversion",
                    "--num_vectors", 2, *INVERT, code=2)  # fmt: skip
    assert "support_images" in err


def test_the_student_is_a_timm_model(run_dir, tmp_path):
    student = timm.create_model(f"local-dir:{run_dir / 'student'}", pretrained=True).eval()
    config = json.loads((run_dir / "student" / "config.json").read_text())
    assert config["architecture"] == "conv4_64" and config["label_names"] == classes_of(run_dir)
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3 and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    ours = models.load_model(str(run_dir / "student"))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(student(x), ours(x))
    # Any timm model can be a student from random weights, and any a teacher; sizes and normalisation differ here.
    options = ("--support_dir", run_dir / "support", "--supports_only", "--max_train_steps", 2, "--train_batch_size", 4)
    _, err = launch("distill.py", *options, "--student", "test_resnet.r160_in1k", "--output_dir", tmp_path / "timm")
    assert "test_resnet.r160_in1k starts from random weights" in err  # which its name, of weights, does not say
    launch("distill.py", *options, "--teacher", tmp_path / "timm", "--teacher_image_size", 64,
           "--student", "conv4_64", "--student_image_size", 84, "--output_dir", tmp_path / "conv4")  # fmt: skip
    stock = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert stock.num_classes == 2
    conv4 = timm.create_model(f"local-dir:{tmp_path / 'conv4'}", pretrained=True)
    assert conv4.num_features == 1600 and models.input_size(conv4) == (84, 84)


def test_distillation_is_reproducible_and_lowers_its_loss(run_dir, tmp_path):
    options = ("--support_dir", run_dir / "support", "--train_dir", run_dir / "generated", "--train_batch_size", 8)
    launch("distill.py", *options, "--output_dir", tmp_path / "again", "--max_train_steps", 10)
    again, first = (load_file(d / "model.safetensors") for d in (tmp_path / "again", run_dir / "student"))
    assert all(torch.equal(again[k], first[k]) for k in first)
    launch("distill.py", *options, "--output_dir", tmp_path / "long", "--student", "conv4_64", "--max_train_steps", 60)
    losses = [loss for _, loss in json.loads((tmp_path / "long" / "distill.json").read_text())["loss"]]
    assert losses[-1] < 0.7 * losses[0]
    launch("distill.py", *options, "--output_dir", tmp_path / "two", "--max_train_steps", 4, by=TWO_PROCESSES)
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert all(v.isfinite().all() for v in two.values()) and not torch.equal(two["head.weight"], first["head.weight"])


def test_evaluation_counts_right_answers(run_dir, tmp_path):
    onnx = run_dir / "export" / "student_fp32.onnx"
    launch("evaluate.py", "--model", f"student={run_dir / 'student'}", f"onnx={onnx}", "before=assets/student",
           "--data_dir", run_dir / "query", "--support_dir", run_dir / "support", "--output_dir", tmp_path,
           by=TWO_NODES)  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    images, labels, names, _ = load_folder(run_dir / "query")
    student = models.load_model(str(run_dir / "student"))
    with torch.no_grad():
        correct = student(models.normalize(student, images)).argmax(-1) == labels
    found = results["methods"]["student"]
    assert found["correct"] == correct.int().tolist() and found["mean"] == pytest.approx(correct.double().mean())
    assert found["per_class"][names[0]]["mean"] == pytest.approx(correct[labels == 0].double().mean())
    assert np.sum(found["confusion"]["counts"]) == len(labels)
    assert np.trace(found["confusion"]["counts"]) == correct.sum()
    assert results["methods"]["onnx"]["correct"] == found["correct"]
    before, support = models.load_model("assets/student"), load_folder(run_dir / "support")
    with torch.no_grad():
        f, q = (models.features(before, x).double() for x in (support[0], images))
    center = f.mean(0)
    prototypes = [F.normalize(f[support[1] == c] - center).mean(0) for c in range(2)]
    cosine = torch.stack([F.cosine_similarity(q - center, p[None]) for p in prototypes], 1)
    assert results["methods"]["before"]["correct"] == (cosine.argmax(1) == labels).int().tolist()
    assert [m["classifier"] for m in results["methods"].values()] == ["head", "head", "prototypes"]
    report = (tmp_path / "report.html").read_text()
    assert all(name in report for name in ("student", "onnx", "before", *names)) and "http" not in report


def test_small_images_can_be_upscaled_by_a_network(run_dir, tiny_sd1, tmp_path):
    name = classes_of(run_dir)[0]
    shutil.copytree(run_dir / "support" / name, tmp_path / "support" / name)
    network = ESRGAN(num_filters=8, num_blocks=1, scale=2).eval()
    save_file(network.state_dict(), tmp_path / "esrgan.safetensors")
    path = next((tmp_path / "support" / name).iterdir())
    with torch.no_grad():  # 32, 64, 128 and down to 96
        image = network(network(load_image(path)[None]).clamp(0, 1)).clamp(0, 1)
        expected = F.interpolate(image, (96, 96), mode="bicubic", antialias=True).clamp(0, 1)[0]
    upscaler = tint_invert.load_upscaler(tmp_path / "esrgan.safetensors", "cpu")
    torch.testing.assert_close(tint_invert.load_support(path, 96, upscaler), expected, atol=1e-3, rtol=0)
    options = ("--pretrained_model_name_or_path", tiny_sd1, "--support_dir", tmp_path / "support",
               "--fallback_token", "icon", *INVERT)  # fmt: skip
    made = {"bicubic": tmp_path / "plain", tmp_path / "esrgan.safetensors": tmp_path / "upscaled"}
    for upscaler, output_dir in made.items():
        launch("tint_invert.py", *options, "--output_dir", output_dir, "--upscaler", upscaler)
    (tmp_path / "plain" / "config.json").touch()  # a folder to start in that looks like a model's
    out, _ = launch(ROOT / "tint_invert.py", *options, "--output_dir", ".", cwd=tmp_path / "plain")
    assert "of which 0 new" in out
    ours, plain = (load_file(d / name / "null_text.safetensors")["latents"] for d in made.values())
    assert (ours - plain).abs().mean() > 0.01
    save_file({k: v / 2 for k, v in network.state_dict().items()}, upscaler)
    _, error = launch("tint_invert.py", *options, "--output_dir", output_dir, "--upscaler", upscaler, code=2)
    assert "upscaler_weights changed" in error
    _, error = launch("tint_invert.py", *options, "--output_dir", tmp_path / "no", "--upscaler", path, code=2)
    assert "is no safetensors checkpoint" in error


def test_a_full_size_stable_diffusion_1_5(run_dir, tmp_path):
    """The real network's shapes with random weights, saved as a float16 variant, at a small resolution."""
    pipe = stable_diffusion_1_5()
    torch.manual_seed(0)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half().to_empty(device="cpu")
        for key, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.data.fill_(0.0 if key.endswith("bias") else 1.0)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    positions = [b for key, b in pipe.text_encoder.named_buffers() if key.endswith("position_ids")]
    assert len(positions) == 1 and positions[0].copy_(torch.arange(77)).shape == (1, 77)
    pipe.save_pretrained(tmp_path / "sd15", variant="fp16")
    del pipe, module, parameter
    name = classes_of(run_dir)[0]
    shutil.copytree(run_dir / "support" / name, tmp_path / "support" / name)
    launch("tint_invert.py", "--pretrained_model_name_or_path", tmp_path / "sd15", "--variant", "fp16",
           "--support_dir", tmp_path / "support", "--output_dir", tmp_path / "inversion", "--resolution", 64,
           "--fallback_token", "icon", "--max_train_steps", 1, "--train_batch_size", 1, "--validation_samples", 1,
           "--num_inference_steps", 2, "--null_text_steps", 1, "--gradient_checkpointing")  # fmt: skip
    generate(tmp_path, tmp_path / "generated", "--num_images_per_class", 1)
    tensors = load_file(tmp_path / "inversion" / name / "null_text.safetensors")
    assert tensors["latents"].shape == (2, 4, 8, 8) and tensors["null_offsets"].shape == (2, 2, 77, 768)
    assert all(tensor.isfinite().all() for tensor in tensors.values()) and tensors["null_offsets"].abs().max() > 0
    assert load_file(tmp_path / "inversion" / name / "learned_embeds.safetensors")[f"<{name}>"].shape == (1, 768)
    assert pixels(tmp_path / "generated" / name / "00000.png").shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["tiny_sd1", "tiny_sd2"])
def test_models_of_both_stable_diffusion_generations(kind, run_dir, tmp_path, request):
    model = request.getfixturevalue(kind)
    name = "T Shirt"  # CLIP's tokenizer has neither capitals nor spaces
    shutil.copytree(run_dir / "support" / classes_of(run_dir)[0], tmp_path / "support" / name)
    launch("tint_invert.py", "--pretrained_model_name_or_path", model, "--support_dir", tmp_path / "support",
           "--num_vectors", 2, "--output_dir", tmp_path / "inversion", "--prompt", "a {}", "--fallback_token", "icon",
           "--guidance_scale", 3, "--mixed_precision", "bf16", "--gradient_checkpointing", *INVERT)  # fmt: skip
    generate(tmp_path, tmp_path / "generated", "--num_images_per_class", 2, "--mixed_precision", "bf16")
    for options in ((), ("--compile",)):
        generate(tmp_path, tmp_path / f"compiled{len(options)}", "--num_images_per_class", 2, *options)
    plain, compiled = (load_folder(tmp_path / f"compiled{k}")[0] for k in (0, 1))
    assert (plain - compiled).abs().mean() < 1 / 255
    pipe = diffusion.load_stable_diffusion(str(model), "cpu")
    assert pipe.scheduler.config.prediction_type == ("epsilon" if kind == "tiny_sd1" else "v_prediction")
    facts = json.loads((tmp_path / "inversion" / name / "inversion.json").read_text())
    psnr = {k: np.mean(v) for k, v in facts["reconstruction_psnr_db"].items()}
    assert all(np.isfinite(v) for v in psnr.values())
    assert facts["settings"]["resolution"] == 64 and facts["image_size"] == 32
    vectors = load_file(tmp_path / "inversion" / name / "learned_embeds.safetensors")["<t-shirt>"]
    assert vectors.dtype == torch.float32 and not torch.equal(vectors[0], vectors[1])  # both are trained
    assert pixels(tmp_path / "generated" / name / "00000.png").shape == (32, 32, 3)


def test_null_text_inversion_at_the_default_settings_reconstructs(tmp_path):
    """Within 1 dB of the VAE alone and 3 dB above DDIM inversion at the same guidance, on novel images."""
    launch("-m", "common.datasets", "--output_dir", tmp_path, "--num_shots", 2)
    launch("tint_invert.py", "--support_dir", tmp_path / "support", "--output_dir", tmp_path / "inversion",
           "--validation_samples", 32)  # fmt: skip
    records = [json.loads(p.read_text()) for p in tmp_path.glob("inversion/*/inversion.json")]
    psnr = {k: np.mean([r["reconstruction_psnr_db"][k] for r in records]) for k in ("vae", "ddim", "null_text")}
    assert len(records) == 5
    assert psnr["null_text"] > psnr["vae"] - 1
    assert psnr["null_text"] > psnr["ddim"] + 3
    # Textual inversion has learned: on fixed noise and timesteps, the loss is below that of the class's own name.
    curves = [[loss for _, loss in r["textual_inversion_loss"]] for r in records]
    gains = [1 - min(curve) / curve[0] for curve in curves]
    assert np.mean(gains) > 0.003 and sum(gain > 0 for gain in gains) >= 4
