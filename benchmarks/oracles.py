"""Every sampler where the posterior is known: the table and picture of docs/samplers.md.

    python benchmarks/oracles.py --docs docs/samplers.md

Two problems with two unknowns and one measurement: a Gaussian prior, where the bias of
mean and covariance can be told, and a mixture of three, of which the measurement leaves
two modes. Many draws of each sampler are compared with the exact posterior; nothing is
tuned on it. Data: none but these numbers.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ct_headneck import machine
from torch import Generator, Tensor

from invsolve import InverseProblem, samplers
from invsolve.operators import GaussianNoise, LinearOperator
from invsolve.operators.bridge import from_scipy
from invsolve.priors import GaussianMixturePrior, GaussianPrior
from invsolve.samplers.solvers import Multistep

DRAWS = 20_000
BEGIN, END = "<!-- oracles: begin -->", "<!-- oracles: end -->"
SIGMA_MIN, SIGMA_MAX = 1e-3, 100.0


@dataclass(frozen=True)
class Entry:
    """A sampler as it is run: what it costs, and at two lengths."""

    name: str
    sampler: Callable[..., Tensor]
    cost: str
    options: dict[str, Any] = field(default_factory=dict)
    per_step: int = 1
    """Passes of the network a step."""


RANGE = {"sigma_range": (0.02, 20.0)}
ENTRIES = (
    Entry("mmps", samplers.mmps, "N F + N (k+1) B", RANGE),
    Entry(
        "mmps, deis3",
        samplers.mmps,
        "N F + N (k+1) B",
        {"solver": Multistep(3, "eps"), **RANGE},
    ),
    Entry("pigdm", samplers.pigdm, "N F + N B", RANGE),
    Entry("tmpd", samplers.tmpd, "2N F", RANGE, 2),
    Entry("daps", samplers.daps, "5N F", RANGE, 5),
    Entry("diffpir", samplers.diffpir, "N F", RANGE),
    Entry(
        "diffpir, dpm++",
        samplers.diffpir,
        "N F",
        {"solver": Multistep(2), **RANGE},
    ),
    Entry("dds", samplers.dds, "N F", RANGE),
    Entry("ddnm", samplers.ddnm, "N F", RANGE),
    Entry("ddnm, noisy", samplers.ddnm, "N F", {"noisy": True, **RANGE}),
    Entry("ddrm", samplers.ddrm, "N F", RANGE),
    Entry("score_sde", samplers.score_sde, "(2N − 1) F", RANGE, 2),
    Entry("dps", samplers.dps, "N F + N B"),
    Entry(
        "reddiff",
        samplers.reddiff,
        "N F",
        {
            "sigma_range": (0.02, 5.0),
            "normalize": "bayes",
            "weight": "calibrated",
            "optimizer": "prox",
            "lam": 1.0,
            "lr": 0.5,
        },
    ),
    Entry("pnp", samplers.pnp, "N F", {"sigma_range": (0.05, 1.0), "lam": 1.0}),
    Entry("red", samplers.red, "N F", {"sigma_range": (0.05, 1.0)}),
)


def real(values: Any) -> Tensor:
    """Double precision."""
    return torch.tensor(values, dtype=torch.float64)


def matrix(rows: Any) -> LinearOperator:
    """A dense operator from numbers to numbers."""
    from scipy.sparse.linalg import aslinearoperator

    dense = real(rows).numpy()
    return from_scipy(aslinearoperator(dense), (dense.shape[1],), (dense.shape[0],))


COV = [[1.0, 0.8], [0.8, 1.0]]
GAUSSIAN = GaussianPrior(real([0.5, -0.5]), real(COV), SIGMA_MIN, SIGMA_MAX)
MIXTURE = GaussianMixturePrior(
    real([0.5, 0.3, 0.2]),
    real([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]),
    real(
        [
            [[0.1, 0.05], [0.05, 0.1]],
            [[0.1, -0.05], [-0.05, 0.1]],
            [[0.05, 0.0], [0.0, 0.15]],
        ]
    ),
    SIGMA_MIN,
    SIGMA_MAX,
)
ROWS = {"gaussian": [[1.0, 0.0]], "mixture": [[1.0, 0.3]]}
SEEN = {"gaussian": 1.5, "mixture": 0.9}
NOISE = {"gaussian": 0.2, "mixture": 0.3}


def draws(entry: Entry, which: str, passes: int) -> Tensor:
    """Many results of a sampler, each from a stream of its own."""
    y = real([[SEEN[which]]]).expand(DRAWS, 1)
    problem = InverseProblem(y, matrix(ROWS[which]), GaussianNoise(NOISE[which]))
    prior = GAUSSIAN if which == "gaussian" else MIXTURE
    return entry.sampler(
        problem,
        prior,
        steps=max(1, passes // entry.per_step),
        generator=Generator().manual_seed(0),
        **entry.options,
    )


def exact(which: str) -> Any:
    """The posterior itself."""
    prior = GAUSSIAN if which == "gaussian" else MIXTURE
    return prior.posterior(real(ROWS[which]), real([SEEN[which]]), NOISE[which])


def gaussian_bias(x: Tensor) -> tuple[float, float, float]:
    """The mean's error in standard deviations, and the covariance's extreme ratios."""
    posterior = exact("gaussian")
    L = torch.linalg.cholesky(posterior.cov)
    white = torch.linalg.solve_triangular(L, (x - posterior.mean).T, upper=False)
    ratios = torch.linalg.eigvalsh(white.cov())
    return float(white.mean(1).norm()), float(ratios[0]), float(ratios[-1])


def mixture_bias(x: Tensor) -> tuple[float, float]:
    """The share of draws nearest to the upper of the two modes, and the residual's χ²."""
    posterior = exact("mixture")
    means = torch.stack([part.mean for part in posterior.components])
    label = ((x[:, None] - means) ** 2).sum(-1).argmin(1)
    residual = (x @ real(ROWS["mixture"]).T - SEEN["mixture"]) / NOISE["mixture"]
    return float((label == 1).double().mean()), float(residual.square().mean())


def table(passes: tuple[int, ...]) -> tuple[list[str], dict[str, Tensor]]:
    """The rows in Markdown, and the draws on the mixture.

    Args:
        passes: of the network for one draw: few, many, and so many that what is left
            is the method's own bias. The mixture's columns are of the middle one.
    """
    counts = " / ".join(map(str, passes))
    many = passes[1]
    lines = [
        f"| sampler | gives | cost | mean's error, {counts} passes | covariance's ratios, "
        + " | ".join(map(str, passes))
        + f" | upper mode, {many} | χ² |",
        "| --- | --- | --- | --- |" + " --- |" * (len(passes) + 2),
    ]
    reference = exact("mixture").sample(DRAWS, generator=Generator().manual_seed(0))
    share, chi2 = mixture_bias(reference)
    right = " 1 … 1 |" * len(passes)
    lines.append(f"| exact | | | 0 |{right} {share:.2f} | {chi2:.2f} |")
    pictures = {"exact": reference}
    for entry in ENTRIES:
        found = [gaussian_bias(draws(entry, "gaussian", n)) for n in passes]
        x = pictures[entry.name] = draws(entry, "mixture", many)
        share, chi2 = mixture_bias(x)
        kind = entry.sampler.kind.replace("_", " ")  # pyright: ignore
        means = " / ".join(f"{m:.2f}" for m, _, _ in found)
        ratios = " | ".join(f"{a:.2f} … {b:.2f}" for _, a, b in found)
        lines.append(
            f"| `{entry.name}` | {kind} | {entry.cost} | {means} | {ratios} | "
            f"{share:.2f} | {chi2:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines, pictures


def picture(clouds: dict[str, Tensor], path: Path) -> None:
    """All samplers on the mixture's posterior, its density behind them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    posterior = exact("mixture")
    axis0, axis1 = torch.linspace(0.0, 1.9, 160), torch.linspace(-2.2, 2.0, 200)
    grid = torch.stack(torch.meshgrid(axis0, axis1, indexing="xy"), -1).double()
    density = torch.zeros(grid.shape[:2], dtype=torch.float64)
    for w, part in zip(posterior.weights, posterior.components, strict=True):
        normal = torch.distributions.MultivariateNormal(part.mean, part.cov)
        density += w * normal.log_prob(grid).exp()
    figure, axes = plt.subplots(
        3, 6, figsize=(11, 8.2), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (name, x) in zip(axes.flat, clouds.items(), strict=False):
        ax.contourf(axis0, axis1, density, 8, cmap="Greys", alpha=0.6)
        ax.plot(*x[:700].T, ".", ms=1.6, color="tab:red" if name != "exact" else "k")
        ax.set(title=name, xlim=(0.0, 1.9), ylim=(-2.2, 2.0), xticks=[], yticks=[])
    for ax in axes.flat[len(clouds) :]:
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Make the table, and put it into the page."""
    parser = argparse.ArgumentParser(description="Samplers against exact posteriors.")
    parser.add_argument("--docs", type=Path, help="The page whose table to replace.")
    parser.add_argument("--passes", type=int, nargs=3, default=(20, 200, 1000))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines, clouds = table(tuple(args.passes))
    date = datetime.now(UTC).date().isoformat()
    lines += [
        "",
        f"{DRAWS:,} draws each, seed 0, {date}, {machine()}. Made by "
        "`python benchmarks/oracles.py --docs docs/samplers.md`.",
    ]
    if args.docs:
        text = args.docs.read_text("utf-8")
        block = f"{BEGIN}\n" + "\n".join(lines) + f"\n{END}"
        text = re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL)
        args.docs.write_text(text, "utf-8")
        picture(clouds, args.docs.with_suffix(".png"))


if __name__ == "__main__":
    main()
