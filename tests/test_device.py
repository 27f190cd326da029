"""What the inner loops would wait for on a GPU, counted on a device that is none: see tests/device.py."""

import argparse
import copy
import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import distill
import evaluate
import export
import tint_invert
from benchmarks import gpu
from benchmarks import memory as table
from benchmarks.flops import stable_diffusion_1_5
from common import diffusion, episodes, generated, memory, models, teachers
from common.processes import cores_of_a_process
from common.words import add_new_words
from tests.device import DEVICE, Traffic, move


class Bar:
    """In place of a progress bar."""

    def update(self, count):
        pass


@pytest.fixture(scope="module")
def remote_sd(tiny_sd1):
    """A small Stable Diffusion on the device, and its schedule of four steps."""
    pipe = diffusion.load_stable_diffusion(str(tiny_sd1), "cpu")
    diffusion.load_networks.cache_clear()  # what moves to the device is nobody else's
    schedule = diffusion.make_schedule(pipe.scheduler, 4)
    pipe.scheduler.alphas_cumprod = move(pipe.scheduler.alphas_cumprod)
    move(pipe.unet)
    return pipe, schedule


def test_the_device_refuses_and_counts_what_a_gpu_would():
    near = torch.rand(3, 2)
    with Traffic() as traffic:
        far = near.to(DEVICE)
        torch.testing.assert_close((far @ far.T).to("cpu"), near @ near.T)
        assert far.sum().item() == pytest.approx(near.sum().item())
        far[far[:, 0] > 0.5]
        far.tolist()
        with pytest.raises(AssertionError, match="both kinds"):
            far + near
        with pytest.raises(AssertionError, match="Python's numbers"):
            far + torch.tensor([1.0, 2.0], device=DEVICE)
    assert traffic.counts == {"to_device": 1, "to_host": 2, "asked": 2}


def test_textual_inversion_waits_for_nothing_between_its_validations(remote_sd, tmp_path):
    pipe, _ = remote_sd
    found = {}
    for steps in (2, 4):
        options = ["--max_train_steps", str(steps), "--validation_steps", "100", "--validation_samples", "1"]
        args = tint_invert.parse_args([*options, "--train_batch_size", "1", "--fallback_token", "icon"])
        args.prompt_templates = ["an icon of a {}", "a {} icon"]
        names = [f"a{steps}", f"b{steps}"]
        text_encoder, pipe.text_encoder = pipe.text_encoder, copy.deepcopy(pipe.text_encoder)
        words, first_id, vectors, _ = add_new_words(pipe, names, args)
        move(pipe.text_encoder)
        latents = [move(torch.randn(3, 4, 8, 8)) for _ in names]
        with Traffic() as traffic:
            tint_invert.textual_inversion(pipe, names, words, latents, first_id, move(vectors.detach()), args,
                                          tmp_path / str(steps))  # fmt: skip
        pipe.text_encoder, found[steps] = text_encoder, traffic.counts
    more = found[4] - found[2]
    assert more["asked"] == more["to_host"] == 0 and more["to_device"] <= 3 * 2  # what was drawn: images, times, noise


def test_null_text_inversion_waits_once_a_step_of_adam(remote_sd):
    pipe, schedule = remote_sd
    z0, prompt_embeds = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 32)
    args = argparse.Namespace(
        guidance_scale=3.0,
        null_text_learning_rate=1e-2,
        null_text_steps=3,
        null_text_tolerance=0.0,
        null_text_start=0.0,
    )
    with Traffic() as traffic:
        trajectory = tint_invert.ddim_inversion(pipe.unet, schedule, move(z0), move(prompt_embeds), 1)
        assert not any(traffic.counts.values())
        tint_invert.null_text_inversion(
            pipe.unet, schedule, trajectory, move(prompt_embeds), move(torch.zeros(3, 16, 32)), args, Bar()
        )
    assert traffic.counts == {"asked": 0, "to_device": 0, "to_host": 4 * (3 + 1)}  # whether one is still too far


@pytest.mark.parametrize("steps", [None, [1, 2]])
def test_generation_waits_for_nothing(remote_sd, steps):
    pipe, schedule = remote_sd
    z, embeds = move(torch.randn(3, 4, 8, 8)), move(torch.randn(3, 16, 32))
    with Traffic() as traffic:
        found = diffusion.denoise(pipe.unet, schedule, z, embeds, embeds[:, None], 3.0, steps)
    assert found.device == DEVICE and traffic.counts == {"asked": 0, "to_host": 0, "to_device": 1}  # guidance's scale


def pictures(count):
    return [(Image.effect_noise((20, 20), 50 + 9 * i).convert("RGB"), i % 2) for i in range(count)]


@pytest.mark.parametrize("name", ["assets/teacher", "conv4_64", "resnet12"])
def test_classifiers_have_deterministic_algorithms_on_gpus(name):
    """As the device's `REFUSED` have none. Forward and back, as a teacher is fine-tuned and a student learns."""
    model = move(models.load_model(name, pretrained=name.startswith("assets")).train())
    images = move(torch.rand(2, 3, *models.input_size(model)))
    with Traffic():
        models.features(model, images).sum().backward()
    with Traffic(), pytest.raises(AssertionError, match="no deterministic"):
        images.median(2)


def test_distillation_waits_for_its_curve_alone(tmp_path, monkeypatch):
    """Ten points of the curve, however many steps; and the teacher answers in full precision."""
    rng = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: rng())  # this device has none of its own
    state, found = {"autocast": False}, {}

    @contextmanager
    def autocast():
        state["autocast"] = True
        yield
        state["autocast"] = False

    def embed(views):
        assert not state["autocast"]
        return views.flatten(1)[:, :2]

    accelerator = SimpleNamespace(
        device=DEVICE, process_index=0, num_processes=1, scaler=None, is_local_main_process=False, autocast=autocast,
        is_main_process=False, prepare=lambda *things, device_placement: things, reduce=lambda x, _: x,
        accumulate=lambda _: nullcontext(), backward=lambda loss: loss.backward(), log=lambda *args: None,
    )  # fmt: skip
    teacher = SimpleNamespace(embed=embed, classify=lambda embedding: 10 * embedding)
    for steps in (10, 20):
        args = distill.parse_args(["--max_train_steps", str(steps), "--train_batch_size", "4", "--mixup", "0.5",
                                   "--cutmix", "1", "--hard_label_weight", "0.1", "--ema_decay", "0.9",
                                   "--output_dir", str(tmp_path)])  # fmt: skip
        student = models.load_model("conv4_64", pretrained=False, num_classes=2, image_size=16)
        views = distill.Views(pictures(4), [], 2, 1, teachers.augmentation(16, args), 0)
        with Traffic() as traffic:
            distill.train(move(student), teacher, views, args, accelerator, {})
        found[steps] = traffic.counts
    assert found[10]["to_host"] == found[20]["to_host"] == 10
    assert found[10]["asked"] == found[20]["asked"] == 1  # how large the first loss is
    assert (found[20] - found[10])["to_device"] == 2 * 10  # views and labels


def test_views_are_made_by_workers_and_pinned_where_a_gpu_is(monkeypatch):
    made = []

    class Watched(DataLoader):
        def __init__(self, dataset, **options):
            made.append(options)
            super().__init__(dataset, **options | {"num_workers": 0, "pin_memory": False})

    monkeypatch.setattr(distill, "DataLoader", Watched)
    for on_gpu, words, workers in [(True, (), cores_of_a_process()), (True, ("--dataloader_num_workers", "0"), 0),
                                   (False, (), 0)]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        args = distill.parse_args(["--train_batch_size", "2", *words])
        views = distill.Views(pictures(2), [], 2, 1, teachers.augmentation(8, args), 0)
        assert len(list(distill.batches(views, [0, 1], args))) == 2
        assert made[-1]["num_workers"] == workers and made[-1]["pin_memory"] == on_gpu


@pytest.fixture
def any_precision():
    """Accelerate keeps to the first precision of a process: that of another test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("any_precision")
def test_optimiser_steps_stay_where_they_are_and_the_teacher_answers_in_full_precision(tmp_path, monkeypatch):
    """Accelerate would move AdamW's counts of steps to the GPU, which then waits for each of them in each step."""
    modes = []

    def embed(self, images):
        modes.append(torch.is_autocast_enabled("cpu"))
        return original(self, images)

    original = models.PrototypeClassifier.embed
    monkeypatch.setattr(models.PrototypeClassifier, "embed", embed)
    for i, (picture, label) in enumerate(pictures(4)):
        (tmp_path / "support" / f"class {label}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "support" / f"class {label}" / f"{i}.png")
    monkeypatch.setattr("accelerate.optimizer.move_to_device", lambda *args: pytest.fail("the state is moved"))
    distill.main(distill.parse_args([
        "--support_dir", str(tmp_path / "support"), "--supports_only", "--max_train_steps", "2", "--train_batch_size",
        "4", "--mixed_precision", "bf16", "--deterministic", "--output_dir", str(tmp_path / "student"),
    ]))  # fmt: skip
    assert modes and not any(modes) and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("any_precision")
def test_the_benchmark_of_gpus_in_little(tiny_sd1, tmp_path, capsys):
    gpu.main(gpu.parse_args([
        "--pretrained_model_name_or_path", str(tiny_sd1), "--teacher", "assets/student", "--student", "conv4_64",
        "--student_image_size", "32", "--precisions", "bf16", "--num_shots", "1", "--num_images_per_class", "1",
        "--max_train_steps", "1", "--matrix_side", "64", "--num_inference_steps", "2", "--reference_steps", "3",
        "--no-compile", "--tests", "--output_dir", str(tmp_path),
    ]))  # fmt: skip
    results = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["stage"]: row for row in results["stages"]}
    assert list(rows) == ["inversion", "generation", "distillation", "generation as the reference"]
    for row in rows.values():
        assert row["tflop"] > 0 and row["tflop_per_second"] == pytest.approx(row["tflop"] / row["seconds"])
        assert row["share_of_matrix_rate"] == row["tflop_per_second"] / results["matrix_tflop_per_second"]["bf16"]
    # Two images in two steps of two passes, and a pass that tells the memory; the reference's in three steps.
    unet = {name: row["tflop"] for name, row in rows.items()}
    assert unet["generation"] / unet["generation as the reference"] == pytest.approx(9 / 6, rel=0.5)
    assert any(row["runtime"] for row in results["runtimes"]) and "| bf16 | inversion |" in capsys.readouterr().out


def test_images_are_decoded_as_many_at_once_as_there_is_memory_for(tiny_sd1, monkeypatch):
    pipe = diffusion.load_stable_diffusion(str(tiny_sd1), "cpu")
    z, sizes, decode = torch.randn(5, 4, 8, 8), [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda part: sizes.append(len(part)) or decode(part))
    whole = diffusion.decode_latents(pipe, z)
    monkeypatch.setattr(diffusion, "VAE_BYTES", 5 * diffusion.decoding_bytes(pipe, 64) // 2)
    torch.testing.assert_close(diffusion.decode_latents(pipe, z), whole)
    assert sizes == [5, 2, 2, 1]


def test_memory_is_counted_as_it_is_taken(tiny_sd1, capsys):
    """By hand; what decoding takes at Stable Diffusion's shapes; and that a batch takes as often as much as one."""

    def work():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000
        a.view(10, 100).add_(b.view(10, 100))  # no new ones
        del a
        return torch.cat([b, b])  # 4000 and 8000

    assert memory.peak_bytes(work) == 12_000
    with FakeTensorMode():
        pipe = stable_diffusion_1_5("cpu")
        counted = memory.peak_bytes(pipe.vae.decode, torch.zeros(1, 4, 64, 64))
    assert diffusion.decoding_bytes(pipe, 512) == pytest.approx(counted, rel=0.01)
    pipe = diffusion.load_stable_diffusion(str(tiny_sd1), "cpu")
    asked, trained = (diffusion.bytes_of_a_latent(pipe, 64, grad) for grad in (False, True))
    embeds = torch.zeros(4, 16, 32, requires_grad=True)
    both = [
        memory.peak_bytes(
            lambda: torch.autograd.grad(pipe.unet(torch.zeros(4, 4, 8, 8), 0, embeds).sample.sum(), embeds)
        ),
        memory.peak_bytes(torch.no_grad()(pipe.unet), torch.zeros(4, 4, 8, 8), 0, embeds),
    ]
    assert both == pytest.approx([4 * trained, 4 * asked], rel=0.05) and trained > 2 * asked
    memory.announce([pipe.vae], {"little": 2**20, "much": 3 * 2**30}, torch.device("cpu"))
    assert "memory: about 3.00 GiB, 3.00 of them for much" in capsys.readouterr().err


def measured_and_announced(monkeypatch, script, *words):
    """The most bytes of tensors while a script is at work, and how many it says that it needs before."""
    said, places = [], [distill, evaluate, export, episodes, generated]
    for module in places:
        monkeypatch.setattr(module, "announce", lambda *what: said.append(what))
    with memory.LiveBytes() as live:
        script.main(script.parse_args([*map(str, words)]))
    return live.peak, max(memory.bytes_of(*modules) + max(parts.values()) for modules, parts, _ in said)


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes of six photos."""
    for i, (picture, label) in enumerate(pictures(12)):
        (tmp_path / "photos" / f"class {label}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "photos" / f"class {label}" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.usefixtures("any_precision")
def test_scripts_need_the_memory_that_they_announce(photos, tmp_path, monkeypatch):
    """On a CPU, where copies of a batch on its way are counted too."""
    student = tmp_path / "student"
    runs = {
        "distillation": (distill, "--support_dir", photos, "--supports_only", "--max_train_steps", 2,
                         "--ema_decay", 0.9, "--train_batch_size", 24, "--output_dir", student),
        "evaluation": (evaluate, "--data_dir", photos, "--support_dir", photos, "--model", student, "assets/teacher",
                       "--batch_size", 12, "--output_dir", tmp_path / "evaluation"),
        "generated": (evaluate, "--generated_dir", photos, "--support_dir", photos, "--batch_size", 12,
                      "--output_dir", tmp_path / "specificity"),
        "episodes": (evaluate, "--dataset", "icons_fs", "--split", "val", "--num_ways", 2, "--num_shots", 1,
                     "--num_queries", 2, "--num_episodes", 1, "--methods", "teacher", "supports", "--distill",
                     "--max_train_steps 2 --train_batch_size 24", "--output_dir", tmp_path / "episodes"),
        "export": (export, "--model", student, "--runtime", "torch", "--teacher", "assets/teacher", "--data_dir",
                   photos, "--benchmark", "--benchmark_batch_sizes", 24, "--output_dir", tmp_path / "export"),
    }  # fmt: skip
    monkeypatch.setattr(
        "common.runtimes.latency.benchmark", lambda calls: {k: [(call(), 1.0)[1]] for k, call in calls.items()}
    )
    for name, (script, *words) in runs.items():
        measured, announced = measured_and_announced(monkeypatch, script, *words)
        assert 0.75 * measured < announced < 1.1 * measured, name


def test_fine_tuning_a_teacher_takes_what_distillation_announces():
    teacher, student = (models.load_model(name) for name in ("assets/teacher", "assets/student"))
    args = distill.parse_args(["--teacher_specialization", "fine_tune", "--train_batch_size", "1"])
    _, parts = distill.needs(teacher, student, 8, student.num_classes, args)
    supports, labels = torch.rand(8, 3, 64, 64), torch.arange(8) % 2
    start = models.PrototypeClassifier(teacher, supports, labels)
    with memory.LiveBytes() as live:
        teachers.fine_tune(start, lambda step: supports, supports, labels, 1e-4, 2)
    assert max(parts, key=parts.get) == "its training" and parts["its training"] == pytest.approx(live.peak, rel=0.1)


def test_a_batch_of_distillation_takes_what_benchmarks_count():
    """The table of settings and the script count alike; and a whole batch takes what small ones foretell."""
    teacher, student = (models.load_model(name) for name in ("assets/teacher", "assets/student"))
    args = distill.parse_args([])
    _, parts = distill.needs(teacher, student, 1, student.num_classes, args)
    with memory.LiveBytes() as live, torch.no_grad():
        models.features(teacher, torch.zeros(args.train_batch_size, 3, *models.input_size(teacher)))
    assert parts["the teacher (--train_batch_size)"] == pytest.approx(live.peak, rel=0.02)
    _, weights, one = table.distillation_row(teacher, student)
    assert weights == memory.bytes_of(teacher) + 4 * memory.bytes_of(student)
    assert one * args.train_batch_size == pytest.approx(max(parts.values()))
