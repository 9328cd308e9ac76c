"""DPS2022/diffusion-posterior-sampling: ``guided_diffusion/`` of the authors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from invsolve.priors import Prior

from . import EpsNet, checkout, noise


def run(
    root: Path,
    prior: Prior,
    y: Tensor,
    operator: Callable[[Any], Any],
    *,
    steps: int,
    scale: float,
    clip: bool,
    generator: Generator,
    x_start: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``p_sample_loop`` returns, and the levels σ it took.

    Args:
        root: the checkout.
        prior: the denoiser behind its network.
        y: measurements as its operator gives them.
        operator: ``operator(measurements)`` makes one of its operators.
        steps: how many of the 1000, as its ``timestep_respacing``.
        scale: ζ.
        clip: its ``clip_denoised``.
        generator: where its ``torch.randn_like`` draws from.
        x_start: the first state, N(0, I).
        mask: of its inpainting operator.
    """
    with checkout(root) as load:
        diffusion = load("guided_diffusion.gaussian_diffusion")
        measurements = load("guided_diffusion.measurements")
        conditions = load("guided_diffusion.condition_methods")
        sampler = diffusion.create_sampler(
            sampler="ddpm",
            steps=1000,
            noise_schedule="linear",
            model_mean_type="epsilon",
            model_var_type="fixed_small",
            dynamic_threshold=False,
            clip_denoised=clip,
            rescale_timesteps=False,
            timestep_respacing=[steps],
        )
        full = diffusion.get_named_beta_schedule("linear", 1000)
        abar = torch.from_numpy(1 - full).cumprod(0)
        noiser = measurements.get_noise(name="gaussian", sigma=0.0)
        A = operator(measurements)
        condition = conditions.get_conditioning_method("ps", A, noiser, scale=scale)
        step = condition.conditioning
        if mask is not None:
            step = partial(step, mask=mask)
        vars(diffusion)["tqdm"] = _Quiet
        # One draw for the step, as ours; one for a noised y that "ps" never looks at.
        with noise(generator, lambda k: k % 2 == 0):
            x = sampler.p_sample_loop(
                model=EpsNet(prior, abar),
                x_start=x_start,
                measurement=y,
                measurement_cond_fn=step,
                record=False,
                save_root="",
            )
        levels = torch.from_numpy(sampler.alphas_cumprod).flip(0)
    return x.detach(), (1 / levels - 1).sqrt()


class _Quiet(list):
    """A list with a progress bar's method."""

    def set_postfix(self, *_: object, **__: object) -> None:
        """Show nothing."""


def batch_gradients(
    root: Path, prior: Prior, y: Tensor, x: Tensor, sigma: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """∇‖y − A D‖ of a batch by its ``grad_and_value``, together and one by one."""
    with checkout(root) as load:
        measurements = load("guided_diffusion.measurements")
        conditions = load("guided_diffusion.condition_methods")
        noiser = measurements.get_noise(name="gaussian", sigma=0.0)
        A = measurements.get_operator("inpainting", device="cpu")
        method = conditions.get_conditioning_method("ps", A, noiser, scale=1.0)

        def gradient(x: Tensor, y: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            denoised = prior.denoise(x, x.new_tensor(sigma))
            return method.grad_and_value(x, denoised, y, mask=mask)[0]

        together = gradient(x, y)
        alone = [gradient(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    return together, torch.cat(alone)


def refuses_batches(root: Path, prior: Prior, x: Tensor) -> str:
    """The error of its ``p_sample`` on a batch of two."""
    with checkout(root) as load:
        diffusion = load("guided_diffusion.gaussian_diffusion")
        sampler = diffusion.create_sampler(
            sampler="ddpm",
            steps=1000,
            noise_schedule="linear",
            model_mean_type="epsilon",
            model_var_type="fixed_small",
            dynamic_threshold=False,
            clip_denoised=False,
            rescale_timesteps=False,
        )
        net = EpsNet(prior, torch.from_numpy(sampler.alphas_cumprod))
        try:
            sampler.p_sample(net, x, torch.tensor([5] * len(x)))
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


def operators(root: Path, size: int, generator: Generator) -> dict[str, dict[str, Any]]:
    """Its operators against their adjoints, ``transpose``."""
    rows: dict[str, dict[str, Any]] = {}
    with checkout(root) as load:
        theirs = load("guided_diffusion.measurements")
        x = torch.rand(1, 3, size, size, generator=generator)
        mask = (torch.rand(1, 1, size, size, generator=generator) < 0.5).float()
        made = {
            "super_resolution ×4": (
                theirs.SuperResolutionOperator(
                    (1, 3, size, size), scale_factor=4, device="cpu"
                ),
                {},
            ),
            "gaussian_blur 61, σ 3": (
                theirs.GaussialBlurOperator(61, 3.0, device="cpu"),
                {},
            ),
            "inpainting": (theirs.InpaintingOperator("cpu"), {"mask": mask}),
        }
        with torch.no_grad():
            for name, (A, extra) in made.items():
                v = torch.randn(x.shape, generator=generator)
                Av = A.forward(v, **extra)
                z = v if Av.shape == v.shape else Av
                there = (Av * z).sum()
                back = (v * A.transpose(z, **extra)).sum()
                rows[name] = {"adjoint": float((there - back).abs() / there.abs())}
        # The kernel's network needs weights: a stand-in that uses what it is given.
        blur = theirs.NonlinearBlurOperator.__new__(theirs.NonlinearBlurOperator)
        blur.device, blur.blur_model = "cpu", _Kernels()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # it draws from the global stream
            once, again = blur.forward(x), blur.forward(x)
        rows["nonlinear_blur, twice"] = {
            "definition": float((once - again).norm() / once.norm())
        }
        wide = theirs.PhaseRetrievalOperator(oversample=2.0, device="cpu").forward(x)
        rows["phase_retrieval"] = {"oversampling": wide.shape[-1] / size}
    return rows


class _Kernels:
    """The blur of a kernel network: here its mean only, to see whether it changes."""

    def adaptKernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        return x * (1 + 0.5 * torch.tanh(kernel.mean() * 10))
