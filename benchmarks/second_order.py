"""Does STSL's second-order term help? The tables of docs/second_order.md.

    python benchmarks/second_order.py --docs docs/second_order.md

A mixture of three in the plane, one noisy measurement of it, everything known exactly.
First the guidance itself: how far each method's ∇log p(y | z) is from the exact one, at
each noise level. Then whole runs at equal cost, a forward and a backward pass of the
network counting one each: the sliced Wasserstein distance of 1,000 draws to the
posterior's own, with every method's step length chosen on another measurement. Data: none
but these numbers.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ct_headneck import machine, put
from oracles import MIXTURE, matrix, real
from torch import Generator, Tensor

from invsolve import InverseProblem, io, samplers
from invsolve.operators import GaussianNoise
from invsolve.samplers.jacobian import denoise_with_vjp
from invsolve.samplers.stsl import Trace, laplacian_estimate, stsl

BEGIN, END = "<!-- second-order: begin -->", "<!-- second-order: end -->"
ROWS = [[1.0, 0.3]]
TUNE, TEST = (-0.6, 0.2), (0.9, -0.1)
"""What is measured where step lengths are chosen, and where they are compared."""
NOISES = (0.1, 0.3, 1.0)
BUDGETS = (200, 1000)
DRAWS = 1000


def evidence_grad(z: Tensor, sigma: float, y: float, sigma_y: float) -> Tensor:
    """∇_z log p(y | z), by differentiating the mixture's formula."""
    A, a = real(ROWS), torch.zeros(len(z), dtype=torch.float64)
    z = z.clone().requires_grad_()
    logs, joint = [], []
    for w, part in zip(MIXTURE.weights, MIXTURE.components, strict=True):
        eye = torch.eye(2, dtype=torch.float64)
        P = part.cov + sigma**2 * eye
        gain = torch.linalg.solve(P, part.cov).T
        mean = part.mean + (z - part.mean) @ gain.T
        spread = A @ (part.cov - gain @ part.cov) @ A.T + sigma_y**2
        r = (y - mean @ A.T)[:, 0]
        prior = (
            torch.distributions.MultivariateNormal(part.mean, P).log_prob(z) + w.log()
        )
        likelihood = -(r**2) / (2 * spread[0, 0]) - spread[0, 0].log() / 2
        logs.append(prior)
        joint.append(prior + likelihood + a)
    value = torch.stack(joint).logsumexp(0) - torch.stack(logs).logsumexp(0)
    return torch.autograd.grad(value.sum(), z)[0]


def laplacian_grad(z: Tensor, sigma: float) -> Tensor:
    """∇ ∇²log p_σ at each z, the mean of the estimator over a basis with no bandwidth."""
    z = z.clone().requires_grad_()
    level, total = real(sigma), torch.zeros(len(z), dtype=torch.float64)
    for axis in torch.eye(2, dtype=torch.float64):
        n = axis.expand_as(z)
        total = total + laplacian_estimate(MIXTURE, z, level, n, real(1e-4 * sigma))
    return torch.autograd.grad(total.sum(), z)[0]


def guidances(z: Tensor, sigma: float, y: float, sigma_y: float) -> dict[str, Tensor]:
    """Each method's ∇_z log p(y | z)."""
    A, level = real(ROWS), real(sigma)
    D, vjp = denoise_with_vjp(MIXTURE, z, level)
    r = y - D @ A.T
    first = vjp(r @ A) / sigma_y**2
    laplacian = laplacian_grad(z, sigma)
    weight = float(A.norm()) ** 2 * sigma**4 / (2 * sigma_y**2)
    r2 = sigma**2 / (1 + sigma**2)
    pigdm = vjp(r @ A) / (r2 * float(A.norm()) ** 2 + sigma_y**2)
    spread = (vjp(A.expand_as(z)) @ A.T) * sigma**2 + sigma_y**2
    return {
        "first order": first,
        "second order (bound)": first - weight * laplacian,
        "ΠGDM": pigdm,
        "MMPS": vjp(r @ A) / spread,
    }


def errors(levels: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
    """Relative error and mean cosine of each method's at each level, over likely z."""
    sigma_y, y, g = 0.3, TEST[0], Generator().manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for sigma in levels:
        x = posterior(y, sigma_y).sample(500, generator=g)
        z = x + sigma * torch.randn(x.shape, generator=g, dtype=x.dtype)
        exact = evidence_grad(z, sigma, y, sigma_y)
        for name, got in guidances(z, sigma, y, sigma_y).items():
            error = float((got - exact).norm() / exact.norm())
            cosine = float(torch.cosine_similarity(got, exact).mean())
            found.setdefault(name, []).append((error, cosine))
    return found


def guidance_table() -> str:
    """Relative error and cosine at a few levels."""
    levels = (0.1, 0.3, 0.7, 2.0, 6.0)
    head = "| method | " + " | ".join(f"σ = {s:g}" for s in levels) + " |"
    rule = "| --- " * (len(levels) + 1) + "|"
    rows = [
        f"| {name} | " + " | ".join(f"{e:.2f} / {c:.3f}" for e, c in pairs) + " |"
        for name, pairs in errors(levels).items()
    ]
    return "\n".join([head, rule, *rows])


def figure(path: Path) -> None:
    """The error of each method's guidance against the noise level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels = torch.logspace(-1.5, 1, 21).tolist()
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, pairs in errors(levels).items():
        for k, ax in enumerate(axes):
            ax.plot(levels, [pair[k] for pair in pairs], label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="σ", ylabel="relative error")
    axes[1].set(xscale="log", xlabel="σ", ylabel="cosine to the exact guidance")
    axes[0].axhline(1, color="gray", lw=0.7)
    axes[1].legend(frameon=False)
    drawn.tight_layout()
    io.replace(path, lambda p: drawn.savefig(p, dpi=110, format="png"))


def posterior(y: float, sigma_y: float) -> Any:
    """The exact one."""
    return MIXTURE.posterior(real(ROWS), real([y]), sigma_y)


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """The mean over 64 directions of W₁ between the projections."""
    angle = torch.arange(64, dtype=torch.float64) * torch.pi / 64
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(
        ((a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]).abs().mean()
    )


@dataclass(frozen=True)
class Method:
    """A sampler, what its steps cost, and the step lengths it may choose from."""

    sampler: Callable[..., Tensor]
    cost: Callable[[int], int]
    """Forwards and backwards of so many levels."""
    grid: tuple[Mapping[str, float], ...] = ({},)


K = 5
LAMS = (0.01, 0.03, 0.1, 0.3, 1.0)
ETAS = (0.02, 0.5)


def stsl_of(trace: Trace, etas: tuple[float, ...]) -> Method:
    """STSL with K steps of averaging a level."""
    per_step = K if trace == "off" else 2 * K
    backwards = K if trace == "off" else 3 * K
    grid = tuple({"lam": lam, "eta": eta} for lam in LAMS for eta in etas)
    sampler = partial(stsl, trace=trace, averages=K, init="gaussian")
    return Method(sampler, lambda steps: steps * (per_step + 1 + backwards), grid)


METHODS = {
    "STSL, first order": stsl_of("off", (0.0,)),
    "STSL, scaled": stsl_of("scaled", ETAS),
    "STSL, paper": stsl_of("paper", ETAS),
    "STSL, bound": stsl_of("bound", (0.0,)),
    "DPS": Method(samplers.dps, lambda n: 2 * n, tuple({"zeta": z} for z in LAMS)),
    "ΠGDM": Method(partial(samplers.pigdm, sigma_range=(0.02, 20.0)), lambda n: 2 * n),
    "MMPS": Method(
        partial(samplers.mmps, sigma_range=(0.02, 20.0), cg_steps=1), lambda n: 3 * n
    ),
}


def distance(
    method: Method, ys: tuple[float, ...], sigma_y: float, budget: int, more: Any
) -> float:
    """To the posterior's own draws, the mean over measurements; infinite if it diverges."""
    steps = max(
        n for n in range(1, budget + 1) if method.cost(n) <= max(budget, method.cost(1))
    )
    distances = []
    for y in ys:
        seen = real([[y]]).expand(DRAWS, 1)
        problem = InverseProblem(seen, matrix(ROWS), GaussianNoise(sigma_y))
        g = Generator().manual_seed(0)
        x = method.sampler(problem, MIXTURE, steps=steps, generator=g, **more)
        if not x.isfinite().all():
            return float("inf")
        exact = posterior(y, sigma_y).sample(
            DRAWS, generator=Generator().manual_seed(1)
        )
        distances.append(sliced_wasserstein(x, exact))
    return sum(distances) / len(distances)


def runs_table() -> str:
    """Sliced Wasserstein distances at equal cost, and what the step lengths were."""
    columns = [(s, b) for s in NOISES for b in BUDGETS]
    head = (
        "| method | "
        + " | ".join(f"σ_y = {s:g}, {b} passes" for s, b in columns)
        + " |"
    )
    rows = [head, "| --- " * (len(columns) + 1) + "|"]
    floor = []
    for sigma_y, _ in columns:
        draws = [
            sliced_wasserstein(
                *(
                    posterior(y, sigma_y).sample(
                        DRAWS, generator=Generator().manual_seed(s)
                    )
                    for s in (1, 2)
                )
            )
            for y in TEST
        ]
        floor.append(sum(draws) / len(draws))
    for name, method in METHODS.items():
        cells = []
        for sigma_y, budget in columns:
            best = min(
                method.grid, key=lambda m: distance(method, TUNE, sigma_y, budget, m)
            )
            value = distance(method, TEST, sigma_y, budget, best)
            chosen = ", ".join(f"{v:g}" for v in best.values() if v)
            cells.append(f"{value:.3f}" + (f" ({chosen})" if chosen else ""))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    rows.append(
        "| *two sets of exact draws* | " + " | ".join(f"{v:.3f}" for v in floor) + " |"
    )
    return "\n".join(rows)


def main() -> None:
    """Print the tables, or put them in the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    text = "\n\n".join(
        [
            "Relative error and mean cosine of the guidance, σ_y = 0.3:",
            guidance_table(),
            "Sliced Wasserstein distance to the posterior at equal cost, and in brackets "
            "the chosen λ (ζ of DPS) and η:",
            runs_table(),
            f"{DRAWS:,} draws, K = {K}; {day}, {machine()}. Made by "
            "`python benchmarks/second_order.py --docs docs/second_order.md`.",
        ]
    )
    if arguments.docs is None:
        print(text)
        return
    figure(arguments.docs.with_suffix(".png"))
    put(arguments.docs, text, BEGIN, END)


if __name__ == "__main__":
    main()
