"""DFM learns from measurements alone, and from the rows that it was not shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import invsolve as iv
from invsolve import io, operators as ops, training_dfm
from invsolve.cli import main
from invsolve.exams import Exams, acquire, load_exams, save_exams
from invsolve.forward_prior import (
    GaussianForwardPrior,
    LearntPrior,
    NetworkForwardPrior,
    UNetHead,
)
from invsolve.operators.parametric import Parametric
from invsolve.training_dfm import (
    DFMConfig,
    Weights,
    dfm_losses,
    divided,
    maker,
    train_dfm,
    whitened,
)

D = 6
FAMILY = Parametric.pixels((1, 1, D))
SIGMA = 0.1


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def gaussian() -> GaussianForwardPrior:
    L = torch.randn(D, D, dtype=torch.float64, generator=seeded(3))
    cov = L @ L.T / D + 0.1 * torch.eye(D)
    mean = torch.zeros(1, 1, D, dtype=torch.float64)
    return GaussianForwardPrior(FAMILY, mean, cov, sigma=SIGMA, target_rows=1)


def signals(n: int, seed: int) -> Tensor:
    root = torch.linalg.cholesky(gaussian().cov)
    z = torch.randn(n, D, dtype=torch.float64, generator=seeded(seed))
    return (z @ root.T).reshape(n, 1, 1, D)


class Vectors(nn.Module):
    """A small head for signals of a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4 * D + 1, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU()
        )
        self.out = nn.Linear(96, D)
        self.log_mu = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.cat([x.flatten(1), level[:, None]], 1)
        return self.out(self.net(u)).reshape(-1, 1, 1, D), self.log_mu


def config(tmp_path: Path, **more: Any) -> DFMConfig:
    return DFMConfig.model_validate(
        {
            "name": "toy",
            "data": {"train": tmp_path / "train.npz", "val": tmp_path / "val.npz"},
            "split": {"context": [1, 2], "target": 1, "dropout": 0.0},
            **more,
        }
    )


def learnt(weights: Weights, tmp_path: Path) -> float:
    """The squared error of E[S | y_C, u] where neither C nor T measured, relative."""
    with torch.random.fork_rng():
        net = Vectors().double()
    seen = acquire(signals(20_000, 1), FAMILY, 4, SIGMA, generator=seeded(2))
    setup = config(tmp_path)
    make = maker(seen, setup, torch.device("cpu"))
    g, steps = seeded(4), 500
    adam = torch.optim.Adam(net.parameters(), 4e-3)
    fall = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, steps)
    for _ in range(steps):
        index = torch.randint(len(seen), (128,), generator=g)
        rows = whitened(make(net), divided(seen, index, setup, g))
        some = dfm_losses(make(net), weights=weights, **rows)
        loss = torch.stack(list(some.values())).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        fall.step()
    prior, law = make(net), gaussian()
    exact = GaussianForwardPrior(
        FAMILY, law.mean, law.cov, sigma=SIGMA, whitening=prior.whitening
    )
    C = torch.tensor([[[True, True, False, False, False, False]]])
    T = torch.tensor([[[False, False, True, False, False, False]]])
    seen = acquire(signals(2000, 5), FAMILY, D, SIGMA, generator=seeded(7))
    y = prior.whitened(seen.y)
    s = torch.tensor(0.7, dtype=torch.float64)
    u = y + s * torch.randn(y.shape, dtype=y.dtype, generator=seeded(6))
    with torch.no_grad():
        S = prior.signal(y, C, u, T, s, prior.guess(y, C))[..., 3:]
        mean = exact.signal(y, C, u, T, s, y)[..., 3:]
    return float((S - mean).square().mean() / mean.square().mean())


def test_novel_rows_teach_what_was_never_measured_together(tmp_path: Path) -> None:
    assert learnt(Weights(guess=0), tmp_path) < 0.06
    assert learnt(Weights(guess=0, novel=0), tmp_path) > 0.2


def test_the_losses_are_least_at_the_posterior_mean() -> None:
    exact = gaussian()
    x = signals(4000, 1)
    seen = acquire(x, FAMILY, 4, SIGMA, generator=seeded(2))
    setup = config(Path())
    rows = divided(seen, range(len(seen)), setup, seeded(3))

    def losses(of: GaussianForwardPrior) -> dict[str, float]:
        return {
            k: float(v) for k, v in dfm_losses(of, weights=Weights(), **rows).items()
        }

    best = losses(exact)
    for off in (0.5, 1.2):  # dependences that are too weak, and too strong
        cov = off * exact.cov + (1 - off) * exact.cov.diag().diag()
        other = GaussianForwardPrior(FAMILY, exact.mean, cov, sigma=SIGMA)
        worse = losses(other)
        assert all(worse[k] > best[k] for k in best)


def exams_in(tmp_path: Path, family: Parametric, count: int = 8) -> None:
    for name, n in (("train", 5), ("val", 4)):
        x = torch.rand(n, *family.image, generator=seeded(n))
        made = acquire(x, family, count, 0.05, generator=seeded(1))
        save_exams(tmp_path / f"{name}.npz", made)


def beams() -> Parametric:
    angles = torch.arange(12) * torch.pi / 12
    return Parametric.views(ops.ParallelBeam((8, 8), angles))


SMALL: dict[str, Any] = {
    "network": {"widths": [8, 16], "groups": 4},
    "optimisation": {"images": 16, "batch": 4, "warmup": 1},
    "checkpoints": 2,
    "split": {"context": [2, 4], "target": 2},
}


@pytest.mark.parametrize("kind", ["views", "lines", "coils", "warps"])
def test_trained_saved_loaded_and_solved(kind: str, tmp_path: Path) -> None:
    maps = torch.randn(2, 8, 8, dtype=torch.complex64, generator=seeded(5))
    family = {
        "views": beams(),
        "lines": Parametric.lines((8, 8), real=True),
        "coils": Parametric.lines((8, 8), maps),
        "warps": Parametric.warps(torch.rand(9, 8, 8, generator=seeded(5))),
    }[kind]
    exams_in(tmp_path, family, 7)
    weights = {"weights": {"smooth": 0.1}} if kind == "warps" else {}
    card = train_dfm(config(tmp_path, **SMALL, **weights), tmp_path / "out", seed=0)
    prior = iv.priors.load(card)
    assert isinstance(prior, LearntPrior)
    assert prior.info.family == "dfm"
    rows = torch.zeros(1, *family.grid, dtype=torch.bool)
    rows[:, ::3] = True
    x = torch.rand(2, *family.image, generator=seeded(7))
    noise = ops.GaussianNoise(0.05)
    y = noise.sample(family(rows).apply(x), generator=seeded(8))
    y = family.restrict_data(y, rows)
    problem = iv.InverseProblem(y, family(rows), noise)
    how: dict[str, Any] = {"samples": 2, "steps": 3, "closing": "gaussian"}
    if kind == "warps":
        with pytest.raises(ValueError, match="no closing draw"):
            iv.solve(problem, prior, iv.samplers.dfm, generator=seeded(), **how)
        how["closing"] = "none"
    got = iv.solve(problem, prior, iv.samplers.dfm, generator=seeded(), **how)
    assert got.samples.shape == (2, *x.shape)
    assert got.stats.network_forwards == 4 * (5 + (kind != "warps"))
    if kind == "views":
        assert isinstance(family.full, ops.ParallelBeam)
        beam = ops.ParallelBeam((8, 8), family.full.angles[rows[0]])
        fewer = iv.InverseProblem(y[:, :, rows[0]], beam, noise)
        same = iv.solve(fewer, prior, iv.samplers.dfm, generator=seeded(), **how)
        torch.testing.assert_close(same.samples, got.samples, rtol=1e-4, atol=1e-4)


BLOCKS: dict[str, Any] = {
    "first": {"variation": True, "variation_steps": (25, 5), "nonnegative": True}
}


def blocks(n: int, seed: int) -> Tensor:
    """Rectangles on nothing, 8×8."""
    x = torch.zeros(n, 1, 8, 8)
    at = torch.randint(1, 4, (n, 4), generator=seeded(seed)).tolist()
    for item, (top, left, h, w) in zip(x, at, strict=True):
        item[0, top : top + h + 1, left : left + w + 1] = 1.0
    return x


def test_the_first_guess_may_begin_with_total_variation(tmp_path: Path) -> None:
    """That of `samplers.tv`, its λ the best for rows that were left out."""
    family, sigma, gain = beams(), 0.1, 0.5
    made = acquire(blocks(60, 1), family, 9, sigma, generator=seeded(2))
    setup = config(tmp_path, **{**SMALL, **BLOCKS, "scale": gain})
    prior = maker(made, setup, torch.device("cpu"))(training_dfm.unchanged)
    assert isinstance(prior, NetworkForwardPrior)
    rows = divided(made, range(60), setup, Generator())
    C, told = rows["context"], rows["target"] | rows["novel"]
    weight = family.spread(told) * family.density

    def left_out(lam: float) -> tuple[float, Tensor]:
        y = family.restrict_data(made.y, C)
        problem = iv.InverseProblem(y, family(C), ops.GaussianNoise(sigma))
        how = {"steps": 25, "cg_steps": 5, "nonnegative": True}
        x = iv.samplers.tv(problem, lam=lam / gain, **how)
        error = family.turned(family.full.apply(x) - made.y).square()
        each = (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1)
        return float(each.log().mean()), x

    lam = prior.variation
    least, x = left_out(lam)
    first = gain * prior.first(prior.whitened(made.y), C)
    torch.testing.assert_close(first, x, rtol=1e-3, atol=1e-3)
    assert first.min() >= 0
    for other in (lam / 3**0.5, lam * 3**0.5):
        assert left_out(other)[0] > least
    truth, plain = blocks(60, 1), gain * prior.back(prior.whitened(made.y), C)
    assert (first - truth).square().mean() < 0.7 * (plain - truth).square().mean()


def test_what_it_begins_with_is_kept_in_the_card(tmp_path: Path) -> None:
    exams_in(tmp_path, beams())
    always = {"split": {**SMALL["split"], "dropout": 0.0}}
    setup = config(tmp_path, **{**SMALL, **BLOCKS, **always})
    prior = iv.priors.load(train_dfm(setup, tmp_path / "out", seed=0))
    exams = load_exams(tmp_path / "train.npz")
    made = maker(exams, setup, torch.device("cpu"))(training_dfm.unchanged)
    assert isinstance(prior, NetworkForwardPrior)
    assert isinstance(made, NetworkForwardPrior)
    assert (prior.variation, prior.nonnegative) == (made.variation, True)
    assert prior.variation_steps == (25, 5)
    C, noise = exams.rows[:1], ops.GaussianNoise(0.05)
    problem = iv.InverseProblem(exams.y[:1], prior.family(C), noise)
    with pytest.raises(
        ValueError, match=r"leave guidance out, or train with split\.drop"
    ):
        iv.solve(problem, prior, iv.samplers.dfm, guidance=2.0, generator=seeded(1))
    y = prior.whitened(exams.y)
    torch.testing.assert_close(prior.first(y, exams.rows), made.first(y, exams.rows))
    nothing = torch.zeros_like(exams.rows)
    assert not prior.first(y, nothing).any()
    exams_in(tmp_path, Parametric.warps(torch.rand(9, 8, 8, generator=seeded(5))), 7)
    with pytest.raises(ValueError, match="needs a linear operator"):
        train_dfm(setup, tmp_path / "other", seed=0)


def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    exams_in(tmp_path, beams())
    setup = config(tmp_path, **SMALL)
    whole = train_dfm(setup, tmp_path / "whole", seed=0)
    calls = iter([False, True])
    train_dfm(setup, tmp_path / "cut", seed=0, stop=lambda: next(calls))
    cut = train_dfm(setup, tmp_path / "cut", seed=0)
    a, b = (p.with_suffix(".safetensors").read_bytes() for p in (whole, cut))
    assert a == b
    exams_in(tmp_path, beams(), 9)
    with pytest.raises(ValueError, match="differs in exams: choose"):
        train_dfm(setup, tmp_path / "cut", seed=0)


def test_the_card_tells_what_was_measured(tmp_path: Path) -> None:
    exams_in(tmp_path, beams())
    lines: list[str] = []
    setup = config(tmp_path, **SMALL, card={"licence": "MIT"})
    card = train_dfm(setup, tmp_path / "out", seed=0, warn=lines.append)
    told = json.loads(card.read_text())
    assert told["identifiability"] == lines
    assert lines  # five exams are few: some views were never acquired together
    assert told["training"]["exams"] == 5
    assert told["licence"] == "MIT"
    prior = iv.priors.load(card)
    assert isinstance(prior, NetworkForwardPrior)
    made = maker(load_exams(tmp_path / "train.npz"), setup, torch.device("cpu"))(
        training_dfm.unchanged
    )
    torch.testing.assert_close(prior.whitening, made.whitening)


def test_the_network_of_the_configuration_is_shown_what_the_head_needs() -> None:
    network = training_dfm.network_of(beams(), SMALL["network"])
    head = UNetHead(network)
    change, log_mu = head(torch.randn(2, 4, 8, 8), torch.ones(2))
    assert change.shape == (2, 1, 8, 8)
    assert log_mu.shape == (2,)


def test_exams_are_read_as_written(tmp_path: Path) -> None:
    maps = torch.randn(2, 8, 8, dtype=torch.complex64, generator=seeded(5))
    for family in (
        FAMILY,
        beams(),
        Parametric.lines((8, 8)),
        Parametric.lines((8, 8), maps),
    ):
        x = torch.rand(3, *family.image, generator=seeded(1))
        made = acquire(x, family, 5, 0.05, note="a phantom", generator=seeded(2))
        save_exams(tmp_path / "e.npz", made)
        back = load_exams(tmp_path / "e.npz")
        assert torch.equal(back.y, made.y)
        assert torch.equal(back.rows, made.rows)
        assert (back.sigma, back.note) == (made.sigma, "a phantom")
        torch.testing.assert_close(back.family.full.apply(x), family.full.apply(x))


def test_every_exam_has_as_many_rows_and_those_that_are_kept() -> None:
    kept = torch.zeros(8, dtype=torch.bool)
    kept[3:5] = True
    family = Parametric.lines((8, 8))
    x = torch.rand(50, 2, 8, 8, generator=seeded(1))
    made = acquire(x, family, 4, 0.05, kept=kept, generator=seeded(2))
    assert (made.rows.sum(1) == 4).all()
    assert made.rows[:, 3:5].all()
    assert (made.rows.sum(0) > 0).all()
    error = made.y - family(made.rows).apply(x)
    unit = (error.real / 0.05)[family.spread(made.rows)]
    assert unit.var().item() == pytest.approx(1, abs=0.1)


def test_bad_exams_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exams_in(tmp_path, beams(), count=6)
    setup = config(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="there are no novel rows"):
        train_dfm(setup, tmp_path / "out", seed=0)
    wide = {**SMALL, "network": {"widths": [8, 16, 16, 16], "groups": 4}}
    exams_in(tmp_path, beams())
    with pytest.raises(ValueError, match=r"change network\.widths"):
        train_dfm(config(tmp_path, **wide), tmp_path / "out", seed=0)
    other = Parametric.lines((8, 8), real=True)
    x = torch.rand(4, 1, 8, 8, generator=seeded(1))
    save_exams(tmp_path / "val.npz", acquire(x, other, 7, 0.05, generator=seeded(2)))
    with pytest.raises(ValueError, match="two geometries"):
        train_dfm(setup, tmp_path / "out", seed=0)
    assert not (tmp_path / "out" / "toy.json").exists()
    (tmp_path / "val.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="cannot read the exams"):
        load_exams(tmp_path / "val.npz")
    (tmp_path / "run.toml").write_text(
        'kind = "dfm"\nname = "x"\n[data]\ntrain = "train.npz"\nval = "none.npz"\n'
        "[split]\ncontext = [2, 4]\ntarget = 2\n"
    )
    assert main(["train", str(tmp_path / "run.toml"), "-o", str(tmp_path / "o")]) == 2
    assert "there is no file of exams" in capsys.readouterr().err
    with pytest.raises(ValueError, match="more rows than the centre"):
        config(tmp_path, split={"context": [2, 4], "target": 2, "centre": 2})
    with pytest.raises(ValueError, match="NaN"):
        good = acquire(x, other, 7, 0.05, generator=seeded(2))
        Exams(other, good.rows, good.y * torch.nan, 0.05)


def test_invsolve_train_and_solve_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    exams_in(tmp_path, beams())
    monkeypatch.delenv("INVSOLVE_DATA", raising=False)
    (tmp_path / "run.toml").write_text(
        'kind = "dfm"\nname = "toy"\n[data]\ntrain = "train.npz"\nval = "val.npz"\n'
        "[split]\ncontext = [2, 4]\ntarget = 2\n[network]\nwidths = [8, 16]\n"
        "groups = 4\n[optimisation]\nimages = 8\nbatch = 4\n"
    )
    out = tmp_path / "o"
    assert main(["train", str(tmp_path / "run.toml"), "-o", str(out)]) == 0
    told = capsys.readouterr()
    assert "--sampler dfm --prior" in told.out
    assert "warning: " in told.err
    family = beams()
    x = torch.rand(1, 1, 8, 8, generator=seeded(7))
    angles = family.words["angles"][::3]
    beam = ops.ParallelBeam((8, 8), angles)
    measured = io.Measurements(
        beam.apply(x),
        {"name": "ct", "shape": [8, 8], "angles": angles.numpy(), "pixel_mm": 1.0},
        {"name": "gaussian", "sigma": 0.05},
        np.eye(4),
    )
    io.save_measurements(tmp_path / "y.npz", measured)
    command = ["solve", str(tmp_path / "y.npz"), "-o", str(tmp_path / "s")]
    command += [
        "--sampler",
        "dfm",
        "--prior",
        str(out / "toy.json"),
        "--set",
        "steps=3",
    ]
    assert main(command) == 0
    assert (tmp_path / "s" / "report.html").exists()
