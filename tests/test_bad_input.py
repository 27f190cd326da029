"""Bad input gets one clear message that names the culprit, and exit code 2."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageFont

import demo
import distill
import evaluate
import export
import tint_generate
import tint_invert
from common import icons_fs
from common.cli import UserError, run
from common.diffusion import load_stable_diffusion
from common.images import FONT, shortened
from common.inversion import interrupted
from common.processes import stopwatch
from common.records import keep_apart, read_json_lines
from common.shards import write_shard
from common.words import initial_vector
from tests.conftest import PYTHON, ROOT, launch


@pytest.fixture
def folder(tmp_path):
    """A folder of two classes with two readable images each."""
    for name in ("cat", "dog"):
        (tmp_path / "support" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 32), (90 * i, 50, 60)).save(tmp_path / "support" / name / f"{i}.png")
    return tmp_path


def rejected(*command):
    """What a script says on stderr when it exits with 2: one message and no traceback."""
    _, err = launch(*command, code=2)
    assert "Traceback" not in err
    return err


def invert(folder, *options):
    return rejected("tint_invert.py", "--support_dir", folder / "support", "--output_dir", folder / "out", *options)


@pytest.mark.parametrize("script", [tint_invert, tint_generate, distill, evaluate, export, demo])
def test_help_explains_every_option(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.splitlines()[0] in text
    for option in text.split("\n  --")[1:]:
        name, _, explanation = " ".join(option.split()).partition("  ")[0].partition(" ")
        assert len(explanation.split()) > 2, f"--{name} has no help"


def test_missing_support_folder(tmp_path):
    assert "support: no such folder" in invert(tmp_path)


@pytest.mark.parametrize("place, relation", [("", "is"), ("cat/new", "lies in"), ("link", "lies in"), ("..", "holds")])
@pytest.mark.parametrize(
    "command",
    ["tint_invert.py --support_dir", "distill.py --supports_only --support_dir", "evaluate.py --data_dir",
     "evaluate.py --support_dir assets --generated_dir name=", "export.py --model assets/student --data_dir",
     "tint_generate.py --inversion_dir"],
)  # fmt: skip
def test_output_among_the_inputs(folder, command, place, relation):
    """Whatever is written among a user's photos would be taken for photos, by links too."""
    photos = folder / "support"
    (folder / "link").symlink_to(photos, target_is_directory=True)
    output_dir = folder / "link" / "new" if place == "link" else photos / place
    script, *options = f"{command} {photos}".replace("= ", "=").split()
    before = sorted(folder.rglob("*"))
    assert f"{output_dir} {relation} --" in rejected(script, *options, "--output_dir", output_dir)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("script", [("-m", "common.datasets"), ("evaluate.py",)])
def test_output_in_the_data_set_that_episodes_are_drawn_from(folder, script):
    output_dir = folder / "support" / "cat" / "new"
    err = rejected(*script, "--dataset", folder / "support", "--output_dir", output_dir)
    assert f"{output_dir} lies in --dataset" in err and not output_dir.exists()


def test_empty_class(folder):
    (folder / "support" / "emu").mkdir()
    assert "emu holds no image" in invert(folder)


def test_corrupt_image(folder):
    (folder / "support" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nonsense")
    assert "1.png cannot be read as an image" in invert(folder, "--max_train_steps", 0)


def test_truncated_image(folder):
    path = folder / "support" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])
    err = rejected("distill.py", "--support_dir", folder / "support", "--supports_only", "--output_dir", folder / "out")
    assert "1.png cannot be read as an image" in err


def test_prompt_without_a_place_for_the_word(folder):
    assert "must hold {} once" in invert(folder, "--prompt", "a photo of a cat")


def test_folder_that_is_no_model(folder):
    assert "as a Stable Diffusion model" in invert(folder, "--pretrained_model_name_or_path", folder / "support")
    err = rejected(
        "distill.py",
        "--support_dir",
        folder / "support",
        "--supports_only",
        "--output_dir",
        folder / "out",
        "--teacher",
        folder / "support",
    )
    assert "is no model folder" in err


def test_pickled_weights_are_refused(folder):
    shutil.copytree(ROOT / "assets" / "mini-sd", folder / "model")
    (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "model" / "unet" / "diffusion_pytorch_model.bin")
    assert "weights as safetensors" in invert(folder, "--pretrained_model_name_or_path", folder / "model")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--resolution", 33), "--resolution 33: this model takes multiples of 4"),
        (("--num_inference_steps", 501), "Give 500."),
        (("--num_inference_steps", 1), "Give 2."),
        (("--num_inference_steps", 1000), "Give 999."),
    ],
)
def test_numbers_that_the_diffusion_model_does_not_take(folder, options, message):
    assert message in invert(folder, *options) and not (folder / "out").exists()


def test_templates_of_windows_are_read_and_those_of_no_utf_8_refused(tmp_path):
    path = tmp_path / "templates.txt"
    args = tint_invert.parse_args(["--prompt_templates", str(path)])
    path.write_bytes(b"\xef\xbb\xbfan icon of a {}\r\na {}\r\n")
    assert tint_invert.read_templates(args) == ["an icon of a {}", "a {}"]
    path.write_bytes(b"une ic\xf4ne de {}")
    with pytest.raises(UserError, match=r"templates.txt: .*no UTF-8"):
        tint_invert.read_templates(args)


def test_what_the_tokenizer_does_not_know_starts_no_word():
    """Its token for the unknown, which ends texts, is one token, too."""
    args = tint_invert.parse_args([])
    pipe = load_stable_diffusion(args.pretrained_model_name_or_path, "cpu")
    assert pipe.tokenizer("&", add_special_tokens=False).input_ids == [pipe.tokenizer.unk_token_id]
    for name, words in (("house & key", "house key"), ("& 7", args.fallback_token)):
        start, found = initial_vector(pipe, name, args)
        ids = pipe.tokenizer(words, add_special_tokens=False).input_ids
        assert found == words
        torch.testing.assert_close(start, pipe.text_encoder.get_input_embeddings().weight[ids].mean(0))


def test_names_of_several_lines_are_shown_in_one():
    assert shortened("a\nb", ImageFont.truetype(FONT, 12), 99) == "a b"


def test_kinds_of_diffusion_models_that_are_not_taken(folder):
    model = folder / "model"
    shutil.copytree(ROOT / "assets" / "mini-sd", model)
    given = ("--pretrained_model_name_or_path", model)
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    single = ("--pretrained_model_name_or_path", unet)
    assert "is a single file: make a folder of it" in invert(folder, *single)
    (model / "tint.json").write_text('{"tint_invert": {"guidance": 3}}')
    assert "tint.json should hold" in invert(folder, *given)
    for half in ('{"compare_ddim": 0}', '{"max_train_steps": true}'):  # a switch is no number, nor a number a switch
        (model / "tint.json").write_text(f'{{"tint_invert": {half}}}')
        assert "tint.json should hold" in invert(folder, *given)
    (model / "tint.json").unlink()
    for part in ("unet", "vae"):
        weights = model / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert "add --variant fp16" in invert(folder, *given)
    for part in ("unet", "vae"):
        weights = model / part / "diffusion_pytorch_model.safetensors"
        weights.with_suffix(".fp16.safetensors").rename(weights)
    config = json.loads((model / "unet" / "config.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    config |= {"block_out_channels": [32, 64], "projection_class_embeddings_input_dim": 64, "mid_block_type": None,
               "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}  # fmt: skip
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    for more in (sdxl, {"class_embed_type": "projection"}, {"time_cond_proj_dim": 8}):  # as unCLIP, LCM
        pipe.unet = UNet2DConditionModel.from_config(config | more)
        pipe.save_pretrained(model)
        assert "is no Stable Diffusion 1.x or 2.x model" in invert(folder, *given)


def test_defaults_from_another_folder(folder):
    script = ROOT / "tint_invert.py"
    _, err = launch(script, "--support_dir", "support", cwd=folder, code=2)
    assert f"There is {ROOT / 'assets' / 'mini-sd'}: give that, or start in {ROOT}" in err
    _, err = launch(script, cwd=folder, code=2)
    assert "outputs/demo/support: no such folder" in err and "python -m common.datasets" in err


def test_records_of_an_inversion_that_are_not_its_own(run_dir, tmp_path):
    """A class is its folder's name: whatever else the record says would be written to."""
    shutil.copytree(run_dir / "inversion", tmp_path / "inversion")
    path = sorted(tmp_path.glob("inversion/*/inversion.json"))[0]
    facts = json.loads(path.read_text())
    for changes, message in (
        ({"class": "../outside"}, "its folder should have that name"),
        ({"images": "x"}, "is damaged (images"),
        ({"textual_inversion_loss": []}, "is damaged ("),
        ({"settings": {}}, "is damaged (guidance_scale"),
        ({"placeholder_token": "<other>"}, "its word is not <other>"),
        ({"images": [*facts["images"], "more.png"]}, "is damaged (images"),
    ):
        path.write_text(json.dumps(facts | changes))
        err = rejected("tint_generate.py", "--inversion_dir", tmp_path / "inversion", "--output_dir", tmp_path / "out")
        assert message in err and str(path.parent) in err
    assert not (tmp_path / "outside").exists() and not (tmp_path / "out").exists()


def test_inversions_that_no_image_can_come_from(run_dir, tmp_path):
    """Without a word where the method needs one; of two classes with one word; with a name that readers leave out."""
    source = sorted(run_dir.glob("inversion/*/inversion.json"))[0]
    facts = json.loads(source.read_text())
    plain = {"settings": facts["settings"] | {"prompt": "an icon"}}
    for number, (names, changes, options, message) in enumerate((
        (["a"], plain, ["--method", "textual_inversion"], "needs a learned word"),
        (["a"], plain, ["--method", "img2img"], "needs a learned word"),
        (["solar panel", "solar-panel"], {}, [], "would share the word <solar-panel>"),
        (["__a__"], {}, ["--format", "webdataset"], "leave __a__ out"),
    )):  # fmt: skip
        inversions = tmp_path / f"{number}"
        for name in names:
            shutil.copytree(source.parent, inversions / name)
            (inversions / name / "inversion.json").write_text(json.dumps(facts | changes | {"class": name}))
        given = ["--inversion_dir", inversions, "--output_dir", tmp_path / "out", "--support_dir", "/nowhere"]
        with pytest.raises(UserError, match=message):
            tint_generate.main(tint_generate.parse_args([*map(str, given), *options]))
    assert not (tmp_path / "out").exists()


def test_settings_of_a_model_for_other_scripts(folder):
    """tint.json speaks to tint_invert.py alone: what else it holds would count for nothing."""
    (folder / "tint.json").write_text('{"tint_invert": {}, "tint_generate": {"alpha": [1]}}')
    assert "should hold {tint_invert: {option: value}}" in invert(folder, "--pretrained_model_name_or_path", folder)


def test_defaults_are_inputs_too(folder, monkeypatch):
    monkeypatch.setattr(distill, "TRAIN_DIR", str(folder / "support"))
    given = ["--support_dir", str(folder / "support" / "cat"), "--output_dir", str(folder / "support" / "new")]
    with pytest.raises(UserError, match="lies in --train_dir"):
        distill.main(distill.parse_args(given))
    assert not (folder / "support" / "new").exists()


def test_unknown_initializer_token(folder):
    err = invert(folder, "--initializer_token", "hippopotamus", "--max_train_steps", 0)
    assert "--initializer_token 'hippopotamus': give words" in err


def test_generation_without_inversion(folder):
    err = rejected("tint_generate.py", "--inversion_dir", folder / "support", "--output_dir", folder / "out")
    assert "run tint_invert.py" in err


def test_alpha_out_of_range(run_dir, tmp_path):
    err = rejected("tint_generate.py", "--inversion_dir", run_dir / "inversion", "--output_dir", tmp_path,
                   "--alpha", 1.5)  # fmt: skip
    assert "between 0 and 1" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--alpha", 0.5, "uniform"), "the word uniform alone"),
        (("--guidance_scale", 2, 3), "one for each --alpha"),
        (("--filter_threshold", 1.5), "1.5 is not at least 0 and below 1"),
        (("--filter_threshold", 1), "1.0 is not at least 0 and below 1"),
        (("--filter_threshold", 0.5, "--support_dir", "/nowhere"), "say where with --support_dir"),
    ],
)
def test_generation_options_that_cannot_be(run_dir, tmp_path, options, message):
    err = rejected("tint_generate.py", "--inversion_dir", run_dir / "inversion", "--output_dir", tmp_path, *options)
    assert message in err


def test_damaged_shard(run_dir, tmp_path):
    options = ("--num_images_per_class", 2, "--format", "webdataset", "--shard_size", 2)
    shards = tmp_path / "shards"
    launch("tint_generate.py", "--inversion_dir", run_dir / "inversion", "--output_dir", shards, *options)
    shard = shards / "000000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        second = sorted(member.offset for member in tar.getmembers())[2]
    shard.write_bytes(whole[:second])  # where an image ends, which is no damage to tar
    err = rejected("distill.py", "--support_dir", run_dir / "support", "--train_dir", shards, "--output_dir",
                   tmp_path / "student", "--max_train_steps", 1)  # fmt: skip
    assert f"{shards}: shards lack 1 images, as " in err
    row = {"label": "a", "index": 0, "file_name": None}
    write_shard(shard, [row], [b""])
    (shards / "none").mkdir()
    shutil.move(shard, shards / "none" / "000000.tar")
    (shards / "none" / "metadata.jsonl").touch()
    err = rejected("export.py", "--model", ROOT / "assets" / "student", "--data_dir", shards / "none", "--precision",
                   "int8", "--output_dir", tmp_path / "export")  # fmt: skip
    assert f"{shards / 'none'} holds no image." in err
    shard.write_bytes(whole[:700])
    distil = ("distill.py", "--support_dir", run_dir / "support", "--train_dir", shards, "--output_dir",
              tmp_path / "student")  # fmt: skip
    err = rejected(*distil)
    assert str(shards) in err and "generate again" in err
    name = sorted(path.name for path in (run_dir / "support").iterdir())[0]
    write_shard(shard, [{"label": name, "index": 0, "file_name": f"{name}/0.png"}], [b"no image"])
    assert f"{shards / name / '0.png'} cannot be read as an image" in rejected(*distil)
    shard.unlink()
    (shards / "metadata.jsonl").unlink()
    err = rejected(*distil)
    assert "has not finished" in err


def test_damaged_inversion(run_dir, tmp_path):
    shutil.copytree(run_dir / "inversion", tmp_path / "inversion")
    broken = sorted((tmp_path / "inversion").glob("*/null_text.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    err = rejected("tint_generate.py", "--inversion_dir", tmp_path / "inversion", "--output_dir", tmp_path / "out")
    assert broken.parent.name in err and "invert again" in err


def test_generated_classes_that_are_not_the_supports(folder):
    shutil.copytree(folder / "support", folder / "train")
    (folder / "train" / "cat").rename(folder / "train" / "cow")
    err = rejected("distill.py", "--support_dir", folder / "support", "--train_dir", folder / "train",
                   "--output_dir", folder / "out")  # fmt: skip
    assert "missing ['cat'], unknown ['cow']" in err


def test_diverging_distillation_stops(folder):
    for rate, message in ((1e30, "use a smaller --learning_rate"), (10, "it diverges")):
        err = rejected("distill.py", "--support_dir", folder / "support", "--supports_only", "--output_dir",
                       folder / "out", "--learning_rate", rate, "--max_train_steps", 40,
                       "--train_batch_size", 4)  # fmt: skip
        assert message in err
        assert not (folder / "out" / "model.safetensors").exists()


def test_a_student_that_is_very_wrong_at_first_does_not_diverge(folder):
    """An imprinted student may be as sure of other images than the supports as its teacher, and of another class."""
    others, rng = folder / "others", np.random.default_rng(0)
    others.mkdir()
    for path in (*folder.glob("support/*/*.png"), *(others / f"{i}.png" for i in range(6))):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    launch("distill.py", "--support_dir", folder / "support", "--unlabeled_dir", others, "--support_ratio", 0,
           "--output_dir", folder / "out", "--max_train_steps", 2, "--train_batch_size", 8,
           "--teacher_scale", 300)  # fmt: skip
    facts = json.loads((folder / "out" / "distill.json").read_text())
    assert facts["loss"][0][1] > 10 * facts["loss_of_ignorance"]


def test_model_that_does_not_know_the_classes(folder):
    options = ("--data_dir", folder / "support", "--output_dir", folder / "out")
    assert "give --support_dir" in rejected("evaluate.py", "--model", "assets/student", *options)
    (folder / "wrong.onnx").write_bytes(b"no model")
    assert "is no ONNX file of export.py" in rejected("evaluate.py", "--model", folder / "wrong.onnx", *options)
    assert "nowhere.onnx: no such file" in rejected("evaluate.py", "--model", folder / "nowhere.onnx", *options)


def test_onnx_file_that_lacks_a_class_or_is_damaged(run_dir, folder):
    err = rejected("evaluate.py", "--model", run_dir / "export" / "student_fp32.onnx", "--data_dir", folder / "support",
                   "--output_dir", folder / "out")  # fmt: skip
    assert "lacks classes" in err and "['cat', 'dog']" in err
    model = onnx.load(run_dir / "export" / "student_fp32.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    facts["preprocessing"] = json.dumps(json.loads(facts["preprocessing"]) | {"std": [1, {}, 1]})
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, folder / "wrong.onnx")
    err = rejected("evaluate.py", "--model", folder / "wrong.onnx", "--data_dir", folder / "support")
    assert "is no ONNX file of export.py" in err


def test_classes_that_the_tokenizer_cannot_tell_apart(folder):
    (folder / "support" / "dog").rename(folder / "support" / "Cat")
    assert "would share the word <cat>" in invert(folder)


def test_one_class_only(folder):
    shutil.rmtree(folder / "support" / "dog")
    err = rejected("distill.py", "--support_dir", folder / "support", "--supports_only", "--output_dir", folder / "out")
    assert "one class only" in err


def test_output_folder_that_is_a_file(folder):
    (folder / "out").write_text("a file")
    err = rejected("evaluate.py", "--model", "assets/student", "--data_dir", folder / "support",
                   "--support_dir", folder / "support", "--output_dir", folder / "out")  # fmt: skip
    assert "out: " in err
    err = rejected("evaluate.py", "--data_dir", folder / "support", "--output_dir", os.fsdecode(b"caf\xe9"))
    assert "--output_dir 'caf\\udce9': that name is no UTF-8" in err


def test_files_of_the_user_are_not_written_over(run_dir, folder):
    """Where an output folder holds what its script would write, and no record that it was this script's."""
    mine = {"README.md": "mine", "model.safetensors": "mine", "config.json": "{}", "cat/00000.png": "mine",
            "metadata.jsonl": "{}", "cat/test.jpg": "mine", "000000.tar": "mine", "architectures.py": "mine",
            "cat/learned_embeds.safetensors": "mine", "student_fp32.onnx": "mine", "benchmark.md": "mine",
            "web/index.html": "mine"}  # fmt: skip
    for name, content in mine.items():
        path = folder / "mine" / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        if name in ("student_fp32.onnx", "benchmark.md", "web/index.html"):
            command = ("export.py", "--model", run_dir / "student")
        elif name in ("README.md", "model.safetensors", "config.json", "architectures.py"):
            command = ("distill.py", "--support_dir", folder / "support", "--supports_only")
        elif name == "cat/learned_embeds.safetensors":
            command = ("tint_invert.py", "--support_dir", folder / "support", "--max_train_steps", 0)
        else:
            command = ("tint_generate.py", "--inversion_dir", run_dir / "inversion")
        err = rejected(*command, "--output_dir", folder / "mine")
        assert f"{path} is there" in err and "give another --output_dir" in err and path.read_text() == content
        assert [p for p in folder.glob("mine/**/*") if p.is_file()] == [path]
        shutil.rmtree(folder / "mine")


@pytest.mark.parametrize("name, content", [("report.html", "mine"), ("results.json", "{}"), ("benchmark.json", "{}")])
def test_results_of_others_are_not_written_over(run_dir, folder, name, content):
    """Those of a user, and of the other of the two scripts that write reports."""
    exporting = ("export.py", "--model", run_dir / "student", "--output_dir", folder)
    evaluating = (
        "evaluate.py",
        "--model",
        run_dir / "student",
        "--data_dir",
        run_dir / "query",
        "--output_dir",
        folder,
    )
    (folder / name).write_text(content)
    for command in {"results.json": [evaluating], "benchmark.json": [exporting]}.get(name, [evaluating, exporting]):
        assert f"{folder / name} is there, and of something else" in rejected(*command)
    assert (folder / name).read_text() == content and sorted(p.name for p in folder.iterdir()) == [name, "support"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--plan --dataset icons_fs", "by --plan does not read --dataset"),
        ("--plan --num_episodes 9", "by --plan does not read --num_episodes"),
        ("--dataset icons_fs --generated_dir x", "by --dataset does not read --generated_dir"),
        ("--dataset icons_fs --model x", "by --dataset does not read --model"),
        ("--dataset icons_fs --support_dir x", "by --dataset does not read --support_dir"),
        ("--dataset icons_fs --max_queries 9", "by --dataset does not read --max_queries"),
        ("--generated_dir x --support_dir x --model x", "by --generated_dir does not read --model"),
        ("--data_dir x --model y --methods tint", "by --data_dir does not read --methods"),
        ("--half_width 0.01", "by --data_dir does not read --half_width"),
        ("--plan --pilot x --half_width 0.01 --accuracy 0.9", "by --pilot does not read --accuracy"),
        ("--plan --half_width 0.01 --method x", "by --plan does not read --method"),
        ("--dataset icons_fs --half_width 0.1 --method a --compare a b", "two different methods, and no --method"),
        ("--plan --pilot x --half_width 0.1 --compare a a", "two different methods"),
        ("--dataset icons_fs --methods", "unknown method ''"),
        ("--plan --half_width 0.01 --episode_variance 0.001 --accuracy 0.1 --compare a b", "for a difference: "),
    ],
)
def test_options_that_would_count_for_nothing(options, message, tmp_path):
    empty = [""] if options.endswith("--methods") else []  # as an empty variable of a shell gives it
    with pytest.raises(UserError, match=message):
        evaluate.main(evaluate.parse_args([*options.split(), *empty, "--output_dir", str(tmp_path)]))


@pytest.mark.parametrize("prefix", ["local-dir:", "hf_hub:"])
def test_prefixes_that_only_timm_reads(run_dir, folder, prefix):
    """As names they would mean random weights, and a model whose files no record knows."""
    distil = ("distill.py", "--supports_only", "--support_dir", folder / "support", "--output_dir", folder / "out")
    of_folder = ("evaluate.py", "--data_dir", run_dir / "query", "--support_dir", run_dir / "support", "--output_dir",
                 folder / "out", "--model")  # fmt: skip
    for command in ((*distil, "--student"), (*distil, "--teacher"), of_folder):
        assert "give a folder without a prefix" in rejected(*command, f"{prefix}{run_dir / 'student'}")
    assert not list(folder.glob("out/*"))


def test_results_of_one_measurement_do_not_replace_those_of_another(run_dir, folder):
    episodes = ("--dataset", "icons_fs", "--split", "val", "--num_ways", 2, "--num_shots", 1, "--num_queries", 2,
                "--methods", "prototypes", "--output_dir", folder)  # fmt: skip
    for number in (1, 2):
        launch("evaluate.py", *episodes, "--num_episodes", number)
    before = (folder / "results.json").read_bytes()
    err = rejected("evaluate.py", "--model", run_dir / "student", "--data_dir", run_dir / "query",
                   "--output_dir", folder)  # fmt: skip
    assert f"{folder / 'results.json'} is there" in err and (folder / "results.json").read_bytes() == before
    launch("evaluate.py", *episodes, "--num_episodes", 3)
    assert len(json.loads((folder / "results.json").read_text())["looks"]) == 3


def test_images_of_an_unfinished_generation_are_not_measured(run_dir, tmp_path):
    shutil.copytree(run_dir / "generated", tmp_path / "generated")
    (tmp_path / "generated" / "metadata.jsonl").unlink()
    options = ("--support_dir", run_dir / "support", "--output_dir", tmp_path / "out")
    student = ("--model", run_dir / "student")
    for command in (
        ("evaluate.py", "--generated_dir", tmp_path / "generated"),
        ("evaluate.py", "--generated_dir", run_dir / "generated", "--data_dir", tmp_path / "generated"),
        ("evaluate.py", *student, "--data_dir", tmp_path / "generated"),
        ("export.py", *student, "--data_dir", tmp_path / "generated"),
        ("export.py", *student, "--query_dir", tmp_path / "generated"),
        ("distill.py", "--unlabeled_dir", tmp_path / "generated"),
    ):
        assert "generated: tint_generate.py has not finished" in rejected(*command, *options)


def test_damaged_records_of_all_kinds(tmp_path):
    """JSON of another form, or nested beyond what Python reads, in what scripts keep for their next start."""
    path = tmp_path / ".partial-x" / "classes.json"
    path.parent.mkdir()
    for content in ("{}", "[1]", '"x"', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(UserError, match=r"classes\.json is damaged"):
            interrupted(tmp_path)
        with pytest.raises(UserError, match=r"classes\.json is damaged"), stopwatch(path):
            pass
        with pytest.raises(UserError, match=r"classes\.json is damaged"):
            read_json_lines(path) if content.startswith("[[") else demo.run_stages({}, path)


def test_damaged_record(run_dir, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "distill.json").write_text("{")
    err = rejected("distill.py", "--support_dir", run_dir / "support", "--supports_only",
                   "--output_dir", tmp_path / "student")  # fmt: skip
    assert "distill.json is damaged" in err


def test_full_disk_is_no_users_mistake_but_gets_a_message(capsys):
    def main(args):
        raise OSError(errno.ENOSPC, "No space left on device", "out/0.png")

    with pytest.raises(SystemExit) as stop:
        run(main, lambda: None)
    assert stop.value.code == 1 and "out/0.png: No space left on device. Free some" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, message",
    [
        (MemoryError(), 1, "memory does not suffice"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 1, "(CUDA out of memory. Tried"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/1.png"), 2, "a/1.png: No such file"),
    ],
)
def test_too_little_memory_ctrl_c_and_files_that_vanish_get_a_message(error, code, message, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, lambda: None)
    assert stop.value.code == code and message in capsys.readouterr().err


def test_paths_that_no_file_system_takes_get_a_message(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path, message in ((tmp_path / ("x" * 300), "File name too long"), (tmp_path / "loop" / "x", "symbolic links")):
        err = rejected("evaluate.py", "--plan", "--half_width", 0.1, "--pilot", path)
        assert message in err or "no such file" in err


def test_output_that_is_a_model_or_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: File exists" in rejected("-m", "common.datasets", "--split", "val", "--output_dir", tmp_path / "loop")
    shutil.copytree(ROOT / "assets" / "student", tmp_path / "model")
    for spec in (f"prototypes:{tmp_path / 'model'}", f"a=prototypes:{tmp_path / 'model'}", f"a={tmp_path / 'model'}"):
        args = Namespace(output_dir=str(tmp_path / "model"), model=[spec])
        with pytest.raises(UserError, match="is --model"):
            keep_apart(args)


def test_other_errors_keep_their_traceback():
    def main(args):
        torch.zeros(2).view(3)

    with pytest.raises(RuntimeError, match="shape"):
        run(main, lambda: None)
    with pytest.raises(SystemExit):  # by PyTorch's own words on a CPU
        run(lambda args: torch.empty(1 << 50), lambda: None)


@pytest.mark.parametrize(
    "record", ["[]", "1", "{", '{"kind": "benchmark"}', '{"kind": "benchmark", "methods": {"a": 1}}']
)
def test_a_damaged_pilot_is_named(record, tmp_path):
    (tmp_path / "pilot.json").write_text(record)
    options = ["--plan", "--pilot", tmp_path / "pilot.json", "--half_width", 0.1, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"pilot\.json"):
        evaluate.main(evaluate.parse_args([*map(str, options)]))


def test_weights_that_cannot_be_written(run_dir, tmp_path):
    """100 kB a file, where the student has 500."""
    command = [sys.executable, "distill.py", "--support_dir", run_dir / "support", "--supports_only",
               "--max_train_steps", 1, "--output_dir", tmp_path]  # fmt: skip
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "_", *map(str, command)]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "model.safetensors: File too large. Free some space" in result.stderr  # of the rehearsal, or the student


@pytest.mark.parametrize(
    "option", ["--min_crop 0", "--min_crop 2", "--mixup -1", "--cutmix nan", "--temperature 0", "--color_jitter -1"]
)
def test_numbers_out_of_range(option, folder):
    err = rejected("distill.py", "--support_dir", folder / "support", "--supports_only", *option.split())
    assert f"argument {option.split()[0]}: " in err


def test_tracker_that_is_unknown(folder):
    err = rejected("distill.py", "--support_dir", folder / "support", "--supports_only", "--output_dir",
                   folder / "out", "--report_to", "nobody")  # fmt: skip
    assert "--report_to" in err


def test_export_of_something_else(folder):
    assert "is no folder of a trained student" in rejected("export.py", "--model", folder / "support")


def damaged(student, folder, **changes):
    """A copy of a student's folder with other entries in its config.json."""
    shutil.copytree(student, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_damaged_configurations(run_dir, tmp_path):
    """In export and evaluation: half a file, other JSON, names that are none; a wrong size."""
    half = damaged(run_dir / "student", tmp_path / "half")
    (half / "config.json").write_text((half / "config.json").read_text()[:100])
    lists = damaged(run_dir / "student", tmp_path / "list")
    (lists / "config.json").write_text("[1]")
    names = damaged(run_dir / "student", tmp_path / "names", label_names={"a": 1})
    fewer = damaged(run_dir / "student", tmp_path / "fewer", label_names=["one of two"])
    twice = damaged(run_dir / "student", tmp_path / "twice", label_names=["one", "one"])
    for folder in (half, lists, names, fewer, twice):
        for command in (["export.py", "--model"], ["evaluate.py", "--data_dir", run_dir / "support", "--model"]):
            err = rejected(*command, folder, "--output_dir", tmp_path / "out")
            assert "config.json is damaged" in err
    config = json.loads((run_dir / "student" / "config.json").read_text())["pretrained_cfg"]
    other = damaged(run_dir / "student", tmp_path / "size", pretrained_cfg=config | {"input_size": [3, 64, 64]})
    err = rejected("export.py", "--model", other, "--output_dir", tmp_path / "out")
    assert "takes no images of [3, 64, 64]" in err
    for command in (
        ("export.py", "--model", run_dir / "student", "--teacher", "assets/student"),
        ("evaluate.py", "--model", "assets/student", "--data_dir", run_dir / "query", "--support_dir",
         run_dir / "support"),
    ):  # fmt: skip
        err = rejected(*command, "--teacher_image_size", 1, "--output_dir", tmp_path / "out")
        assert "assets/student takes no images of (3, 1, 1)" in err


def test_int8_without_images_and_tensorrt_without_tensorrt(run_dir, tmp_path):
    options = ("--model", run_dir / "student", "--output_dir", tmp_path)
    for wrong, message in (
        (["--precision", "int8"], "needs images to calibrate on"),
        (["--precision", "int8", "--runtime", "tensorrt"], "an engine wants int8_tensorrt"),
        (["--opt_batch_size", "9", "--max_batch_size", "8"], "above --max_batch_size 8"),
        (["--benchmark", "--benchmark_batch_sizes", "300"], "raise --max_batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(export.parse_args([*map(str, options), *wrong]))
    (tmp_path / "student_int8.onnx").touch()
    (tmp_path / "benchmark.json").write_text('{"kind": "export"}')  # of an earlier export
    err = rejected("export.py", *options, "--runtime", "tensorrt")
    assert "pip install tensorrt" in err
    assert f"{tmp_path / 'student_int8.onnx'} is of an earlier export" in err
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["bytes"]) == ["student_fp32.onnx"]


def test_an_episode_beside_somebody_elses_queries(tmp_path):
    (tmp_path / "query" / "mine").mkdir(parents=True)
    (tmp_path / "query" / "mine" / "a.png").touch()
    err = rejected("-m", "common.datasets", "--split", "val", "--output_dir", tmp_path)
    assert str(tmp_path / "query") in err and not (tmp_path / "episode.json").exists()


def test_episode_with_too_many_ways(tmp_path):
    many = len(icons_fs.load_splits()["val"]) + 1
    assert f"--num_ways {many}" in rejected("-m", "common.datasets", "--split", "val", "--num_ways", many,
                                            "--output_dir", tmp_path)  # fmt: skip


def test_whoever_reads_the_first_lines_only_sees_no_traceback():
    code = "from common.cli import run; run(lambda _: [print(k) for k in range(100_000)], lambda: None)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*PYTHON, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
