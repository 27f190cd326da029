"""Each formula against an independent computation: float64 by hand, diffusers' schedulers, SciPy, or Monte Carlo."""

import argparse
import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

import tint_generate
import tint_invert
from benchmarks import flops
from common import diffusion, models, statistics
from common.cli import UserError
from common.images import load_image
from common.processes import generator

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
def test_ddim_step_equals_the_scheduler_of_diffusers(prediction_type, spacing, offset):
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=False,
    )
    schedule = diffusion.make_schedule(scheduler, 20)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    z = latents(2, 4, 8, 8)
    for i, t in enumerate(schedule.timesteps):
        prediction = latents(2, 4, 8, 8, seed=i + 1)
        expected = scheduler.step(prediction, t, z).prev_sample
        eps = diffusion.to_noise(prediction_type, prediction, z, schedule.abar[i])
        z = diffusion.ddim_step(z, eps, schedule.abar[i], schedule.abar[i + 1])
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


def test_ddim_step_backward_undoes_forward_and_equals_the_inverse_scheduler():
    z, eps = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    moved = diffusion.ddim_step(z, eps, 0.9, 0.3)
    torch.testing.assert_close(diffusion.ddim_step(moved, eps, 0.3, 0.9), z)
    x0 = (z - np.sqrt(0.1) * eps) / np.sqrt(0.9)
    torch.testing.assert_close(moved, np.sqrt(0.3) * x0 + np.sqrt(0.7) * eps)

    inverse = DDIMInverseScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    inverse.set_timesteps(10)
    t = int(inverse.timesteps[4])
    abar_from, abar_to = inverse.alphas_cumprod[t - 100].item(), inverse.alphas_cumprod[t].item()
    expected = inverse.step(eps, t, z).prev_sample
    torch.testing.assert_close(diffusion.ddim_step(z, eps, abar_from, abar_to), expected, rtol=1e-5, atol=1e-5)


class Network:
    """In place of a UNet: `function(z, t, prompt_embeds)` is its prediction."""

    dtype = torch.float64

    def __init__(self, function):
        self.function = function

    def __call__(self, z, t, prompt_embeds):
        return type("Output", (), {"sample": self.function(z, t, prompt_embeds)})


def make_schedule(steps):
    return diffusion.make_schedule(DDIMScheduler(**BETAS, timestep_spacing="trailing"), steps)


def test_ddim_inversion_follows_the_exact_solution_for_gaussian_data():
    """For data ~ N(0, s^2) the ideal noise prediction is known, and so is the flow from image to noise: each latent is
    multiplied by the ratio of the marginal standard deviations sqrt(abar s^2 + 1 - abar)."""
    s, schedule = 0.6, make_schedule(500)
    abar = dict(zip(schedule.timesteps, schedule.abar))

    def ideal(z, t, _):
        a = abar[int(t)]
        return (1 - a) ** 0.5 * z / (a * s**2 + 1 - a)

    z0 = s * latents(3, 4, 8, 8)
    trajectory = tint_invert.ddim_inversion(Network(ideal), schedule, z0, torch.zeros(3, 2, 2))
    assert trajectory.shape == (501, 3, 4, 8, 8) and torch.equal(trajectory[-1], z0)
    sigma = [(a * s**2 + 1 - a) ** 0.5 for a in schedule.abar]
    for i in (0, 100, 250, 400):
        torch.testing.assert_close(trajectory[i].float(), (z0 * sigma[i] / sigma[-1]).float(), rtol=0.02, atol=0.02)
    back = diffusion.denoise(
        Network(ideal), schedule, trajectory[0], torch.zeros(3, 2, 2), torch.zeros(3, 1, 2, 2), 1.0
    )
    torch.testing.assert_close(back, z0.to(back.dtype), rtol=0.02, atol=0.02)


def test_null_text_inversion_reaches_its_trajectory_and_treats_images_one_by_one():
    """Guided by a network whose prediction the embedding shifts, in a batch and alone; images converge after
    different numbers of steps."""
    schedule = make_schedule(6)
    network = Network(lambda z, t, c: 0.3 * z + c.mean((1, 2))[:, None, None, None])
    prompt_embeds = torch.tensor([0.0, 0.02, 0.05, 0.08])[:, None, None].expand(4, 3, 2).double()
    null = torch.zeros(4, 3, 2).double()
    z0 = latents(4, 4, 4, 4)
    trajectory = tint_invert.ddim_inversion(network, schedule, z0, prompt_embeds, fixed_point_steps=20)
    args = argparse.Namespace(
        guidance_scale=3.0, null_text_learning_rate=1e-2, null_text_steps=10, null_text_tolerance=1e-4,
        null_text_start=0.0,
    )  # fmt: skip

    def invert(which):
        progress = type("Progress", (), {"update": lambda self, n: None})()
        return tint_invert.null_text_inversion(
            network, schedule, trajectory[:, which], prompt_embeds[which], null[which], args, progress
        )

    found, reached, num_steps = invert(slice(0, 4))
    assert found.shape == (4, 6, 3, 2) and num_steps[0] == 0 < num_steps[2] <= num_steps[3] <= 60
    for k in range(4):
        alone = invert(slice(k, k + 1))
        torch.testing.assert_close(found[k], alone[0][0])
        torch.testing.assert_close(reached[k], alone[1][0])
        assert num_steps[k] == alone[2][0]
    without = diffusion.denoise(network, schedule, trajectory[0], prompt_embeds, null[:, None], 3.0)
    error, error_without = (((z - z0) ** 2).mean((1, 2, 3)) for z in (reached, without))
    assert (error[2:] < 0.2 * error_without[2:]).all()  # what is left is that of six DDIM steps, not of guidance
    replayed = diffusion.denoise(network, schedule, trajectory[0], prompt_embeds, found, 3.0)
    torch.testing.assert_close(replayed, reached)


@pytest.mark.parametrize("tolerance", [1.0, 4e-3, 1e-3])
def test_as_long_as_the_null_text_is_the_prompt_one_prediction_serves_both(tolerance):
    """The same comes out as where both are made, in fewer passes: images move from one level on, or none does."""
    schedule, passes = make_schedule(12), []

    def predict(z, t, c):
        passes.append(t)
        return 0.8 * torch.tanh(2 * z) + c.mean((1, 2))[:, None, None, None]

    c, z0 = latents(3, 3, 2, seed=1), latents(3, 4, 4, 4)
    trajectory = tint_invert.ddim_inversion(Network(predict), schedule, z0, c, 1)
    progress = type("Progress", (), {"update": lambda self, n: None})()
    options, found, counts = ["--null_text_tolerance", str(tolerance), "--null_text_start"], [], []
    for start in ("1", "0"):
        passes.clear()
        args = tint_invert.parse_args([*options, start])
        found.append(tint_invert.null_text_inversion(Network(predict), schedule, trajectory, c, c, args, progress))
        counts.append(len(passes))
    for one, both in zip(*found):
        torch.testing.assert_close(one, both)
    null, _, num_steps = found[0]
    moved = (null != c[:, None]).any(-1).any(-1).any(0)
    assert counts[1] - counts[0] == (~moved).sum() > 0 and bool(num_steps.any()) == bool(moved.any()) == (tolerance < 1)


def test_null_text_takes_the_steps_of_adam_down_the_gradient_of_its_objective():
    """One DDIM step, three Adam steps: against finite differences of the objective and Adam's formula by hand."""
    schedule, w = make_schedule(1), 3.0
    mix = latents(4 * 2 * 2, 3 * 2, seed=3) / 3
    network = Network(lambda z, t, c: 0.3 * z + torch.tanh(c.flatten(1) @ mix.T).view(z.shape))
    cond, null, z = latents(1, 3, 2, seed=4), latents(1, 3, 2, seed=5), latents(1, 4, 2, 2)
    trajectory = torch.stack([z, latents(1, 4, 2, 2, seed=6)])
    args = argparse.Namespace(
        guidance_scale=w, null_text_learning_rate=0.05, null_text_steps=3, null_text_tolerance=0.0,
        null_text_start=0.0,
    )  # fmt: skip
    progress = type("Progress", (), {"update": lambda self, n: None})()
    found, _, _ = tint_invert.null_text_inversion(network, schedule, trajectory, cond, null, args, progress)

    def objective(e):
        (a, b), zero = schedule.abar, z[0].numpy()
        eps_u, eps_c = (0.3 * zero + np.tanh(mix.numpy() @ x).reshape(zero.shape) for x in (e, cond.numpy().ravel()))
        eps = eps_u + w * (eps_c - eps_u)
        x0 = (zero - np.sqrt(1 - a) * eps) / np.sqrt(a)
        return ((np.sqrt(b) * x0 + np.sqrt(1 - b) * eps - trajectory[1, 0].numpy()) ** 2).mean()

    e, m, v = null.numpy().ravel().copy(), np.zeros(6), np.zeros(6)
    for step in (1, 2, 3):
        gradient = scipy.optimize.approx_fprime(e, objective, 1e-6)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        e -= 0.05 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(found[0, 0].numpy().ravel(), e, atol=1e-4)


def test_fixed_point_steps_make_ddim_inversion_exact():
    """The way down at guidance 1 then retraces the way up, as it does not in the plain inversion."""
    schedule = make_schedule(10)
    network = Network(lambda z, t, c: 0.8 * torch.tanh(2 * z) + c.mean((1, 2))[:, None, None, None])
    prompt_embeds, z0 = latents(3, 3, 2, seed=1), latents(3, 4, 4, 4)
    error = []
    for steps in (0, 1, 30):
        trajectory = tint_invert.ddim_inversion(network, schedule, z0, prompt_embeds, steps)
        back = diffusion.denoise(network, schedule, trajectory[0], prompt_embeds, prompt_embeds[:, None], 1.0)
        error.append((back - z0).abs().max().item())
    assert error[2] < 1e-5 < error[1] < error[0] / 2


@pytest.mark.parametrize("first", [0, 4, 6])
def test_denoising_is_guided_at_each_step(first):
    """A batch with its own guidance scales, against a loop by hand for each image."""
    schedule = make_schedule(6)
    network = Network(lambda z, t, c: (0.3 + 0.001 * t) * z + torch.tanh(c.sum((1, 2)) + t)[:, None, None, None])
    z, cond, null = latents(3, 4, 4, 4), latents(3, 3, 2, seed=1), latents(3, 6, 3, 2, seed=2)
    w = torch.tensor([3.0, 1.5, 7.5])
    found = diffusion.denoise(network, schedule, z, cond, null, w, range(first, 6))
    for k in range(3):
        x = z[k : k + 1]
        for i in range(first, 6):
            eps_c, eps_u = (network(x, schedule.timesteps[i], e).sample for e in (cond[k : k + 1], null[k : k + 1, i]))
            eps = eps_u + w[k].item() * (eps_c - eps_u)
            a, b = schedule.abar[i], schedule.abar[i + 1]
            x = np.sqrt(b / a) * (x - np.sqrt(1 - a) * eps) + np.sqrt(1 - b) * eps
        torch.testing.assert_close(found[k : k + 1], x, rtol=1e-5, atol=1e-5)  # the network's answers are float32


class Tensors(dict):
    """What safetensors gives of a file, as far as generation needs it."""

    def get_slice(self, name):
        tensor = self[name]
        return type("Slice", (), {"get_shape": lambda _: list(tensor.shape), "__getitem__": lambda _, k: tensor[k]})()


@pytest.mark.parametrize("alpha, first", [(0, 10), (0.3, 7), (0.65, 4), (1, 0)])
def test_img2img_noises_its_support_as_the_scheduler_of_diffusers_does(alpha, first):
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1)
    schedule = diffusion.make_schedule(scheduler, 10)
    z0 = latents(2, 4, 8, 8).float()
    folders = {"cat": {"null_text": Tensors(latents=torch.zeros(2, 4, 8, 8), image_latents=z0.half())}}
    row = {"label": "cat", "index": 3, "seed": 5, "support": 1, "alpha": alpha}
    embeds = {"cat": torch.ones(3, 2)}
    args = argparse.Namespace(method="img2img")
    z, prompt, null, step = tint_generate.starting_point([row], folders, schedule, embeds, torch.zeros(1, 3, 2), args)
    assert step.tolist() == [first] and prompt.shape == (1, 3, 2) and null.shape == (1, 1, 3, 2)
    noise = torch.randn(4, 8, 8, generator=generator(5, "cat", 3))
    t = schedule.timesteps[first] if first < 10 else 0  # after the last step, the noise of the first timestep is left
    torch.testing.assert_close(z[0], scheduler.add_noise(z0[1], noise, torch.tensor(t)), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "spacing, offset, steps, suggested",
    [("leading", 1, 501, 500), ("leading", 0, 334, 333), ("leading", 1, 1000, 999), ("leading", 1, 143, 142),
     ("linspace", 0, 1, 2), ("trailing", 0, 1001, 1000)],
)  # fmt: skip
def test_steps_that_do_not_begin_at_the_models_noise_are_refused(spacing, offset, steps, suggested):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=offset)
    with pytest.raises(UserError, match=rf"--num_inference_steps {steps}: .* Give {suggested}\."):
        diffusion.make_schedule(scheduler, steps)
    schedule = diffusion.make_schedule(scheduler, suggested)
    assert len(schedule.timesteps) == suggested and 0 <= schedule.timesteps[-1] <= 2


@pytest.mark.parametrize("steps", [61, 103, 122, 201])  # to which the library's trailing spacing adds timestep -1
def test_trailing_steps_end_at_the_image(steps):
    schedule = diffusion.make_schedule(DDIMScheduler(**BETAS, timestep_spacing="trailing"), steps)
    expected = [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]
    assert np.abs(np.array(schedule.timesteps) - expected).max() <= 1 and len(schedule.abar) == steps + 1
    assert schedule.abar[0] < 0.005 and (np.diff(schedule.abar) > 0).all()


def test_steps_are_spread_evenly_and_begin_where_the_latents_are():
    def walk(first, alpha, *options):
        return list(tint_generate.walk(16, first, alpha, tint_generate.parse_args(options)))

    assert walk(0, 0.5) == [0, 4, 8, 12] and walk(0, 1.0, "--num_inference_steps", "6") == [0, 2, 5, 8, 10, 13]
    assert walk(0, 0.4) == walk(0, 1.0, "--null_text_fade", "0") == [*range(16)]  # its null-text leads
    assert walk(0, 0.3, "--null_text_fade", "2") == walk(0, None, "--method", "textual_inversion") == [0, 4, 8, 12]
    for first, wanted in itertools.product(range(17), (1, 4, 7, 16, 99)):
        steps = walk(first, 1 - first / 16, "--method", "img2img", "--num_inference_steps", str(wanted))
        assert steps[:1] == [first][: 16 - first] and abs(len(steps) - min(wanted, 16) * (16 - first) / 16) < 1


def test_fewer_steps_are_those_of_dpm_solver():
    """Against DPM-Solver++ 2M of diffusers at the same timesteps, which begins and ends with first order, too."""
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1)
    schedule, steps = diffusion.make_schedule(scheduler, 16), [0, 4, 8, 12]
    network = Network(lambda z, t, c: 0.8 * torch.tanh(2 * z) + 0.0005 * t + c.mean((1, 2))[:, None, None, None])
    z, embeds = latents(2, 4, 4, 4), latents(2, 3, 2, seed=1)
    found = diffusion.denoise(network, schedule, z, embeds, embeds[:, None], 1.0, steps)
    betas = {name: value for name, value in BETAS.items() if name != "clip_sample"}
    solver = DPMSolverMultistepScheduler(**betas, final_sigmas_type="zero")
    solver.set_timesteps(4)
    levels = [schedule.abar[i] for i in (*steps, 16)]
    solver.sigmas = torch.tensor([((1 - a) / a) ** 0.5 for a in levels], dtype=torch.float64)
    solver.timesteps = torch.tensor([schedule.timesteps[i] for i in steps])
    for t in solver.timesteps:
        z = solver.step(network(z, t, embeds).sample, t, z).prev_sample
    torch.testing.assert_close(found, z, rtol=1e-5, atol=1e-5)


def test_a_models_own_settings_may_choose_a_preset(tmp_path):
    (tmp_path / "tint.json").write_text('{"tint_invert": {"preset": "reference", "num_vectors": 2}}')
    args = tint_invert.parse_args(["--pretrained_model_name_or_path", str(tmp_path), "--null_text_steps", "3"])
    assert (args.max_train_steps, args.num_inference_steps, args.null_text_steps, args.num_vectors) == (5000, 25, 3, 2)


def test_the_reference_preset_is_the_papers_and_the_command_line_has_the_last_word():
    args = tint_invert.parse_args(["--preset", "reference", "--null_text_steps", "3"])
    assert (args.max_train_steps, args.train_batch_size, args.learning_rate, args.patience) == (5000, 1, 1e-3, 0)
    assert (args.num_inference_steps, args.guidance_scale, args.null_text_tolerance) == (25, 7.5, 1e-5)
    assert args.null_text_steps == 3 and args.fixed_point_steps == 0 == args.null_text_start
    assert args.compare_ddim and not tint_invert.parse_args(["--no-compare_ddim"]).compare_ddim
    assert args.prompt == "an icon of a {}"  # the model's own, which the paper says nothing of


def test_velocity_and_noise_name_the_same_network():
    x0, eps, abar = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1), 0.37
    z = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    velocity = np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0
    torch.testing.assert_close(diffusion.to_noise("v_prediction", velocity, z, abar), eps)
    torch.testing.assert_close(diffusion.to_noise("epsilon", eps, z, abar), eps)


def test_guidance():
    uncond, cond = latents(3), latents(3, seed=1)
    torch.testing.assert_close(diffusion.guide(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(diffusion.guide(uncond, cond, 1.0), cond)
    torch.testing.assert_close(diffusion.guide(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond)


def test_blending_keeps_the_length_between_its_two_ends():
    z, n = 0.8 * latents(5, 4, 8, 8), latents(5, 4, 8, 8, seed=1)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        mixed = tint_generate.blend(z, n, torch.full((5,), alpha, dtype=torch.float64))
        for k in range(5):
            a, b = z[k].numpy(), n[k].numpy()
            length = (1 - alpha) * np.sqrt((a**2).mean()) + alpha * np.sqrt((b**2).mean())
            raw = (1 - alpha) * a + alpha * b
            np.testing.assert_allclose(mixed[k].numpy(), raw * length / np.sqrt((raw**2).mean()), rtol=1e-10)
    torch.testing.assert_close(tint_generate.blend(z, n, torch.zeros(5).double()), z)
    torch.testing.assert_close(tint_generate.blend(z, n, torch.ones(5).double()), n)


def test_wilson_interval_equals_scipy_and_covers():
    for correct, count in [(0, 10), (3, 10), (97, 100), (500, 500)]:
        expected = scipy.stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
        assert statistics.wilson_interval(correct, count) == pytest.approx((expected.low, expected.high))
    rng = np.random.default_rng(0)
    for p in (0.5, 0.9, 0.98):
        hits = rng.binomial(200, p, 10_000)
        intervals = {k: statistics.wilson_interval(k, 200) for k in set(hits.tolist())}
        coverage = np.mean([intervals[k][0] <= p <= intervals[k][1] for k in hits.tolist()])
        assert 0.93 < coverage < 0.975


def test_paired_difference_covers_and_beats_unpaired():
    rng = np.random.default_rng(0)
    covered, width = [], []
    for _ in range(2000):
        difficulty = rng.random(300)
        a, b = difficulty < 0.85, difficulty + 0.1 * rng.random(300) < 0.85
        mean, low, high = statistics.paired_difference(a.astype(int).tolist(), b.astype(int).tolist())
        assert mean == pytest.approx(a.mean() - b.mean())
        covered.append(low <= 0.05 <= high)
        width.append(high - low)
    assert 0.93 < np.mean(covered) < 0.97
    assert np.mean(width) < 2 * 1.96 * np.sqrt(2 * 0.85 * 0.15 / 300)


def test_prototype_classifier_by_hand():
    torch.manual_seed(0)
    model = models.load_model("conv4_64", pretrained=False)
    supports, queries = torch.rand(6, 3, 32, 32), torch.rand(4, 3, 32, 32)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    logits = models.PrototypeClassifier(model, supports, labels, scale=7.0)(queries).detach().numpy()
    with torch.no_grad():
        s, q = (models.features(model, x).double().numpy() for x in (supports, queries))
    center = s.mean(0)
    s, q = ((x - center) / np.linalg.norm(x - center, axis=1, keepdims=True) for x in (s, q))
    prototypes = np.stack([s[:3].mean(0), s[3:].mean(0)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    np.testing.assert_allclose(logits, 7.0 * q @ prototypes.T, rtol=1e-3, atol=1e-4)


def test_normalize_subtracts_mean_and_divides_by_std():
    model = models.load_model("resnet10t.c3_in1k", pretrained=False)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    size = models.input_size(model)
    for images in (torch.full((1, 3, *size), 0.5), torch.full((1, 3, 50, 50), 0.5)):
        out = models.normalize(model, images)
        assert out.shape[-2:] == size
        for c in range(3):
            assert out[0, c].mean().item() == pytest.approx((0.5 - mean[c]) / std[c], rel=1e-4)


def test_conv4_has_the_parameters_of_the_literature():
    model = models.load_model("conv4_64", pretrained=False, num_classes=5, image_size=84)
    body = 3 * 64 * 9 + 64 + 3 * (64 * 64 * 9 + 64) + 4 * 2 * 64
    assert sum(p.numel() for p in model.blocks.parameters()) == body == 113_088
    assert model.num_features == 1600
    assert model(torch.zeros(1, 3, 84, 84)).shape == (1, 5)


def test_psnr_by_hand():
    x = torch.zeros(1, 3, 4, 4)
    assert tint_invert.psnr(x + 0.1, x).item() == pytest.approx(20.0, abs=1e-4)


def test_diffusion_loss_is_the_mean_square_of_noise_or_velocity():
    class Pipe:
        """A network that answers zero: the loss is then the mean square of its target."""

        def __init__(self, prediction_type):
            self.scheduler = DDIMScheduler(**BETAS, prediction_type=prediction_type)
            self.unet = lambda z, t, c: type("Output", (), {"sample": torch.zeros_like(z)})
            self.unet.dtype = torch.float32

    z0, noise = latents(3, 4, 8, 8).float(), latents(3, 4, 8, 8, seed=1).float()
    t = torch.tensor([10, 400, 900])
    abar = Pipe("epsilon").scheduler.alphas_cumprod[t].double().numpy()[:, None, None, None]
    loss = tint_invert.diffusion_loss(Pipe("epsilon"), z0, t, noise, torch.zeros(3, 2, 2))
    np.testing.assert_allclose(loss.numpy(), (noise.numpy() ** 2).mean((1, 2, 3)), rtol=1e-5)
    loss = tint_invert.diffusion_loss(Pipe("v_prediction"), z0, t, noise, torch.zeros(3, 2, 2))
    velocity = np.sqrt(abar) * noise.numpy() - np.sqrt(1 - abar) * z0.numpy()
    np.testing.assert_allclose(loss.numpy(), (velocity**2).mean((1, 2, 3)), rtol=1e-4)


def test_timesteps_are_stratified_and_uniform():
    scheduler = DDIMScheduler(**BETAS)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([tint_invert.draw_noisy_latents(torch.zeros(3, 1, 1, 1), scheduler, 5, 250, rng)[1]
                         for _ in range(2000)])  # fmt: skip
    assert drawn.min() >= 250 and drawn.max() <= 999
    assert (drawn.diff(dim=1) > 0).all()  # one from each fifth
    assert scipy.stats.kstest(drawn.flatten().numpy(), scipy.stats.uniform(250, 750).cdf).pvalue > 0.001


def test_new_words_alone_receive_the_gradient():
    encoder = type("Encoder", (), {})()
    embedding = torch.nn.Embedding(10, 4).requires_grad_(False)
    encoder.get_input_embeddings = lambda: embedding
    vectors = torch.randn(2, 4, requires_grad=True)
    ids = torch.tensor([[1, 8, 9, 8]])
    with tint_invert.new_words(encoder, 8, vectors):
        out = embedding(ids)
    expected = torch.stack([embedding.weight[1], vectors[0], vectors[1], vectors[0]])[None]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(vectors.grad, torch.tensor([[2.0] * 4, [1.0] * 4]))
    assert embedding.weight.grad is None
    torch.testing.assert_close(embedding(ids), F.embedding(ids, embedding.weight))


def test_a_schedule_that_ends_in_pure_noise_is_refused():
    scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UserError, match="zero terminal SNR"):
        diffusion.make_schedule(scheduler, 10)


def test_images_of_all_kinds_are_read_alike(tmp_path):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    kinds = {
        "grey.png": Image.fromarray(ramp.astype(np.uint8)),
        "grey16.png": Image.fromarray((ramp * 257).astype(np.uint16)),
        "wide.png": Image.fromarray(np.pad(ramp, ((0, 0), (20, 20))).astype(np.uint8)).convert("RGB"),
        "cmyk.jpg": Image.fromarray(ramp.astype(np.uint8)).convert("RGB").convert("CMYK"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        x = load_image(tmp_path / name)
        assert x.shape == (3, 64, 64)
        np.testing.assert_allclose(x[0].numpy() * 255, ramp, atol=6 if name == "cmyk.jpg" else 1)
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", 16).min() == 1


def test_operations_are_counted_as_the_network_is_large():
    """Stable Diffusion 1.5's passes in TFLOP as they are known: VAE encoding 1.117, UNet 0.803, decoding 2.515. And the
    defaults take at most a tenth of what the reference takes for a class of five images."""
    settings = [tint_invert.parse_args(["--preset", p, "--pretrained_model_name_or_path", flops.DEFAULTS])
                for p in ("fast", "reference")]  # fmt: skip
    iterations = {"textual_inversion_steps": 60, "validations": 7, "null_text_steps": 80, "guided_levels": 16}
    ours = flops.inversion(settings[0], iterations)
    assert ours["VAE encoding"] == pytest.approx(5 * 1.117, rel=1e-3)
    assert ours["DDIM inversion"] == pytest.approx(5 * 16 * 2 * 0.803, rel=1e-3)
    assert ours["total"] == pytest.approx(sum(v for k, v in ours.items() if k != "total")) and ours["total"] < 1660
    steps = {"textual_inversion_steps": 5000, "validations": 0, "null_text_steps": 250, "guided_levels": 25}
    assert flops.inversion(settings[1], steps)["textual inversion"] == pytest.approx(5000 * 1.669, rel=0.02)

    def generation(steps, alpha, *options):
        return flops.generation(steps, alpha, tint_generate.parse_args(options))

    assert generation(25, 1.0, "--null_text_fade", "0") == pytest.approx(42.7, abs=0.05)
    assert generation(16, 0.6) == generation(16, None, "--method", "textual_inversion") <= 9
    assert generation(16, 0.6) == pytest.approx(8 * 0.803 + 2.515, rel=1e-3)
    # img2img at alpha 0.5 walks the second half of the steps.
    half = generation(16, 0.5, "--method", "img2img", "--num_inference_steps", "16")
    assert half == pytest.approx(16 * 0.803 + 2.515, rel=1e-3)
