"""NVlabs/RED-diff: ``algos/reddiff.py`` and the operators of ``utils/degredations.py``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

from invsolve.priors import Prior

from . import EpsNet, checkout, noise


def run(
    root: Path,
    prior: Prior,
    y: Tensor,
    operator: Any,
    *,
    steps: int,
    lam: float,
    lr: float,
    sigma_x0: float,
    weight: str,
    generator: Generator,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """What it returns, x₀ before the last step; μ after it; and the levels σ it took.

    Args:
        root: the checkout.
        prior: the denoiser behind its network.
        y: measurements as its operator gives them.
        operator: ``operator(degredations)`` makes one of its ``H_functions``.
        steps, lam, lr, sigma_x0, weight: of its configuration.
        generator: where its ``torch.randn_like`` draws from.
        shape: the images'.
    """
    with checkout(root) as load:
        algo = load("algos.reddiff")
        functions, models = load("utils.functions"), load("models.diffusion")
        guidance = load("models.classifier_guidance_model")
        H = operator(load("utils.degredations"))
        cfg = SimpleNamespace(
            algo=SimpleNamespace(
                awd=True,
                cond_awd=False,
                grad_term_weight=lam,
                obs_weight=1.0,
                eta=0.0,
                lr=lr,
                denoise_term_weight=weight,
                sigma_x0=sigma_x0,
                sigma_y=0.0,
                deg="given",
            ),
            exp=SimpleNamespace(
                save_evolution=False, start_step=1000, end_step=0, num_steps=steps
            ),
        )
        diffusion = models.Diffusion()
        alphas = diffusion.alphas.to(torch.get_default_dtype())
        if alphas.dtype == torch.float64:  # its table, without the rounding
            alphas = (1 - torch.cat([torch.zeros(1), _betas()])).cumprod(0)
        diffusion.alphas = alphas
        vars(algo)["build_degredation_model"] = lambda cfg: H
        net = EpsNet(prior, alphas[1:])
        model = guidance.ClassifierGuidanceModel(net, None, diffusion, cfg)
        ts = functions.get_timesteps(cfg)
        with noise(generator, lambda k: sigma_x0 > 0 or k % 2 == 1):
            x0, mu = algo.REDDIFF(model, cfg).sample(
                torch.zeros(shape), None, ts, y_0=y
            )
        abar = alphas[1:].double()[torch.tensor(ts).flip(0)]
    return x0.detach(), mu.detach(), (1 / abar - 1).sqrt()


def _betas() -> Tensor:
    return torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)


def operators(root: Path, size: int, generator: Generator) -> dict[str, dict[str, Any]]:
    """Its operators against their adjoints and their definitions."""
    rows = {}
    with checkout(root) as load:
        theirs = load("utils.degredations")
        device = torch.device("cpu")
        kernel = torch.tensor([theirs.pdf(float(t), 25) for t in range(-2, 3)])
        kernel = kernel / kernel.sum()
        made = {
            "SuperResolution ×4": theirs.SuperResolution(3, size, 4, device),
            "Deblurring, 5 taps": theirs.Deblurring(kernel, 3, size, device),
        }
        x = torch.rand(1, 3, size, size, generator=generator)
        for name, H in made.items():
            Hx = H.H(x.clone())
            z = torch.randn(Hx.shape, generator=generator)
            there, back = (Hx * z).sum(), (x.flatten(1) * H.Ht(z)).sum()
            rows[name] = {"adjoint": float((there - back).abs() / there.abs())}
        pooled = torch.nn.functional.avg_pool2d(x, 4).flatten(1)
        rows["SuperResolution ×4"]["definition"] = _relative(
            made["SuperResolution ×4"].H(x.clone()), pooled
        )
        row = torch.nn.functional.conv2d(
            x.flatten(0, 1)[:, None], kernel[None, None, None], padding=(0, 2)
        )
        column = torch.nn.functional.conv2d(
            row, kernel[None, None, :, None], padding=(2, 0)
        )
        H = made["Deblurring, 5 taps"]
        rows["Deblurring, 5 taps"]["definition"] = _relative(
            H.H(x.clone()), column.reshape(1, -1)
        )
        flat = torch.ones(1, 3, size, size)
        four = torch.zeros(size, size)
        for i in range(size):
            for j in range(max(0, i - 2), min(size, i + 2)):
                four[i, j] = kernel[j - i + 2]
        ordered = theirs.Deblurring(kernel, 3, size, device)
        ordered.singulars = lambda: ordered._singulars.repeat_interleave(3)
        rows["Deblurring, 5 taps"]["in order"] = _relative(
            ordered.H(x.clone()), (four @ x @ four.T).reshape(1, -1)
        )
        inside = H.H(flat).reshape(3, size, size)[:, size // 2, size // 2]
        rows["Deblurring, 5 taps"]["of a flat image"] = [
            round(float(v), 3) for v in inside
        ]
    return rows


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
