"""Masks straight from 15-view CT by a prior of images and labels: docs/joint.md.

    python benchmarks/joint.py run --data $INVSOLVE_DATA --prior CARD --segmenter FILE
    python benchmarks/joint.py docs

``run`` tunes on two slices of each of the first nine validation patients who have all
contours, then compares on all others the draws of p(image, labels | y) with
reconstruct-then-segment (`joint_segmenter.py` trains the segmenter), and measures what
scribbles, known labels, the split of uncertainty and tilted posteriors give. Each result
is kept as it comes, so that a run that was stopped goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ct_headneck import machine, put
from joint_segmenter import Segmenter, cases, reconstructed, settings
from quality import read
from quality_tasks import TASKS, ct
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io, samplers
from invsolve.metrics import body_mask, psnr
from invsolve.operators import (
    GaussianNoise,
    Mask,
    Stack,
    on_channels,
)
from invsolve.priors import GaussianMixturePrior, Tilted
from invsolve.priors.weights import read_card
from invsolve.segmentation.metrics import dice
from invsolve.segmentation.uncertainty import brier, calibration_error, nested_anova

HERE = Path(__file__).parent / "results"
PASSES, DRAWS, FEW = 20, 8, 6
TASK = TASKS["ct-15"]
LABEL_NOISE = 0.05
"""What a known label's membership of 0 or 1 is believed to be off by."""
INSIDE, OUTSIDE = 3, 10
"""Pixels scribbled of each label: in it, and within two pixels around it."""

JOINT: Mapping[str, tuple[Callable[..., Tensor], list[dict[str, Any]]]] = {
    "dds": (
        samplers.dds,
        [
            {"sigma_range": (low, high), "eta": eta, "lam": lam, "cg_steps": 10}
            for low, high in ((0.02, 3.0), (0.033, 0.63))
            for eta, lam in ((0.85, 1.0), (0.96, 0.06))
        ],
    ),
    "diffpir": (
        samplers.diffpir,
        [
            {"sigma_range": (0.02, high), "zeta": 0.77, "lam": lam, "cg_steps": 15}
            for high in (0.9, 3.0)
            for lam in (0.11, 1.0)
        ],
    ),
    "mmps": (
        samplers.mmps,
        [{"sigma_range": (0.02, 3.0), "cg_steps": 1}],
    ),
    "pnp": (
        samplers.pnp,
        [
            {
                "sigma_range": (0.018, 2.35),
                "lam": lam,
                "cg_steps": 15,
                "init": "adjoint",
            }
            for lam in (0.066, 0.3)
        ],
    ),
}
"""What is tried of each sampler; the Brier score on the tuning slices decides."""
CHEAP = ("dds", "pnp", "diffpir")
"""Those without backward passes, which come first."""


def main() -> None:
    """Run, or write down."""
    parser = argparse.ArgumentParser(description="Masks straight from 15 views.")
    parser.add_argument("what", choices=["run", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--prior", default="ct-organs-128", help="the joint prior")
    parser.add_argument(
        "--segmenter", type=Path, default=Path("runs/joint/segmenter.safetensors")
    )
    parser.add_argument("--out", type=Path, default=HERE / "joint.json")
    parser.add_argument("--page", type=Path, default=Path("docs/joint.md"))
    parser.add_argument("--patients", type=int, help="only the first so many")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    args = parser.parse_args()
    if args.what == "docs":
        put(args.page, page(read(args.out)), BEGIN, END)
    else:
        Bench(args).run(time.monotonic() + 60 * (args.minutes or 1e9))


class Bench:
    """The joint prior, the slices, and what is known so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out
        self.found: dict[str, Any] = read(self.path)
        self.prior = iv.priors.load(args.prior)
        card, _ = read_card(args.prior)
        self.labels, self.value = card["labels"], card["label_value"]
        self.channels = 1 + len(self.labels)
        self.cases = cases(args.data, "test")
        if args.patients:
            keep = sorted(set(self.cases.patients))[: args.patients]
            n = sum(p in keep for p in self.cases.patients)
            c = self.cases
            self.cases = type(c)(c.x[:n], c.inside[:n], c.patients[:n])
        self.body = body_mask(self.cases.x)
        self.problem = self.measured(15)
        step = len(self.cases.x) / min(FEW, len(self.cases.x))
        self.few = [int(step * k) for k in range(min(FEW, len(self.cases.x)))]

    def measured(self, views: int) -> iv.InverseProblem:
        """The test slices, seen from so many sides."""
        return ct(views, self.cases.x, Generator().manual_seed(0))

    def run(self, until: float) -> None:
        """Make what is not there yet."""
        self.found |= {"labels": self.labels, "patients": self.cases.patients}
        parts: dict[str, Callable[[], Any]] = {"recovery": recovery}

        def joint(name: str) -> None:
            parts[f"settings/{name}"] = partial(self.tune, name)
            parts[f"rows/joint: `{name}`"] = partial(self.joint, name)

        for name in CHEAP:
            joint(name)
        for kind in ("FBP", "TV", "pnp"):
            parts[f"rows/{kind}, then segmenter"] = partial(
                self.two_steps, kind, "clean"
            )
        for kind in ("FBP", "pnp"):
            told = f"rows/{kind}, then segmenter trained on {kind}"
            parts[told] = partial(self.two_steps, kind, kind)
        parts["rows/draws of the image, each segmented"] = self.propagated
        parts["rows/draws of the image, each labelled by the joint prior"] = (
            self.propagated_jointly
        )
        parts["rows/images of joint `dds`, each segmented"] = self.segmented
        parts["rows/true image, segmenter"] = partial(self.two_steps, "clean", "clean")
        parts["rows/true image, joint prior"] = self.of_the_image
        for name in JOINT.keys() - set(CHEAP):
            joint(name)
        parts["scribbles"] = self.scribbled
        parts["guided"] = self.guided
        parts["anova"] = self.anova
        parts["bounds"] = self.bounds
        parts["picture"] = self.picture
        for place, make in tqdm(parts.items()):
            where, at = self.found, place.split("/")
            for name in at[:-1]:
                where = where.setdefault(name, {})
            if at[-1] not in where and time.monotonic() < until:
                where[at[-1]] = make()
                order = [k.removeprefix("rows/") for k in parts]
                rows = self.found.get("rows", {})
                self.found["rows"] = {k: rows[k] for k in order if k in rows}
                self.save()

    def save(self) -> None:
        """All that is known so far."""
        self.found |= {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "torch": torch.__version__,
        }
        text = json.dumps(self.found, indent=1) + "\n"
        io.replace(self.path, lambda p: Path(p).write_text(text))

    # --- the joint posterior

    def embedded(self, problem: iv.InverseProblem) -> iv.InverseProblem:
        """[A 0]: what is measured of the image channel alone."""
        A = on_channels(problem.linear, 0, of=self.channels)
        return iv.InverseProblem(problem.y, A, problem.noise)

    def drawn(
        self,
        name: str,
        problem: iv.InverseProblem,
        samples: int = DRAWS,
        **options: Any,
    ) -> iv.Solution:
        """A sampler's draws of image and labels, by its settings."""
        own = dict(self.found["settings"][name]["options"])
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        prior = options.pop("prior", self.prior)
        return iv.solve(
            problem,
            prior,
            JOINT[name][0],
            samples=1 if name == "pnp" else samples,
            steps=PASSES,
            generator=Generator().manual_seed(1),
            precision="bf16",
            **{**own, **options},
        )

    def membership(self, x: Tensor) -> Tensor:
        """0 … 1 in the labels' channels: a denoised one is P(inside | what was noisy)."""
        return (x[..., 1:, :, :] / self.value).clamp(0, 1)

    def tune(self, name: str) -> dict[str, Any]:
        """The settings with the least Brier score on the tuning slices."""
        held = cases(self.args.data, "tune")
        problem = ct(15, held.x, Generator().manual_seed(0))
        tried = []
        for options in JOINT[name][1]:
            self.found["settings"][name] = {"options": options}
            solution = self.drawn(name, self.embedded(problem), samples=4)
            p = self.membership(solution.samples).mean(0)
            body = body_mask(held.x)
            region = psnr(solution.mean[:, :1], held.x, TASK.data_range, body)
            score = float(brier(p * body, held.inside & body).mean())
            tried.append(
                {"options": options, "brier": score, "psnr": float(region.mean())}
            )
        del self.found["settings"][name]
        return {**min(tried, key=lambda t: t["brier"]), "tried": tried}

    def joint(self, name: str) -> dict[str, Any]:
        """P(label | y) is the mean of the draws' labels; `mmps` makes half as many."""
        begin = time.perf_counter()
        n = DRAWS // 2 if name == "mmps" else DRAWS
        solution = self.drawn(name, self.embedded(self.problem), n)
        seconds = time.perf_counter() - begin
        p = self.membership(solution.samples).mean(0)
        return self.scored(p, solution.mean[:, :1], seconds)

    def of_the_image(self) -> dict[str, Any]:
        """Labels drawn given the image itself: what the prior knows of them."""
        p = self.membership(self.labels_of(self.cases.x, 4).samples).mean(0)
        return self.scored(p, None, 0.0)

    def labels_of(self, x: Tensor, samples: int) -> iv.Solution:
        """p(labels | image): [I 0], with noise that is far below the image's own."""
        A = on_channels(Mask(torch.ones_like(x[0])), 0, of=self.channels)
        problem = iv.InverseProblem(A(self.padded(x)), A, GaussianNoise(1e-4))
        return self.drawn("dds", problem, samples, lam=1.0)

    def padded(self, x: Tensor) -> Tensor:
        """The image with channels of nothing."""
        nothing = x.new_zeros(len(x), self.channels - 1, *x.shape[2:])
        return torch.cat([x, nothing], 1)

    # --- reconstruct, then segment

    def two_steps(self, kind: str, told: str) -> dict[str, Any]:
        """The segmenter, told that it sees images of a kind, on a reconstruction."""
        begin = time.perf_counter()
        x = reconstructed(self.cases.x, kind, Generator(), self.problem)
        p = Segmenter.load(self.args.segmenter)(x, told)
        return self.scored(
            p, None if kind == "clean" else x, time.perf_counter() - begin
        )

    def propagated(self) -> dict[str, Any]:
        """The mean over draws of a prior of images of what the segmenter sees in each."""
        begin = time.perf_counter()
        solution = self.images()
        return self.scored(
            self.seen_in(solution.samples),
            solution.mean,
            time.perf_counter() - begin,
        )

    def propagated_jointly(self) -> dict[str, Any]:
        """The mean over such draws of labels that the joint prior draws given each."""
        begin = time.perf_counter()
        solution = self.images()
        labels = self.labels_of(solution.samples.flatten(0, 1), 1).samples[0]
        p = self.membership(labels).unflatten(0, (DRAWS, -1)).mean(0)
        return self.scored(p, solution.mean, time.perf_counter() - begin)

    def segmented(self) -> dict[str, Any]:
        """The mean over joint draws of what the segmenter sees in their images."""
        begin = time.perf_counter()
        solution = self.drawn("dds", self.embedded(self.problem))
        p = self.seen_in(solution.samples[:, :, :1])
        return self.scored(p, solution.mean[:, :1], time.perf_counter() - begin)

    def seen_in(self, draws: Tensor) -> Tensor:
        """The mean of the segmenter's answers."""
        segmenter = Segmenter.load(self.args.segmenter)
        return torch.stack([segmenter(x, "clean") for x in draws]).mean(0)

    def images(self) -> iv.Solution:
        """Draws of a prior of images alone."""
        return iv.solve(
            self.problem,
            iv.priors.load(TASK.prior),
            samplers.dds,
            samples=DRAWS,
            steps=PASSES,
            cg_steps=10,
            generator=Generator().manual_seed(1),
            precision="bf16",
            **settings("dds"),
        )

    # --- scores

    def scored(
        self,
        p: Tensor,
        x: Tensor | None,
        seconds: float,
        chosen: list[int] | None = None,
        count: Tensor | None = None,
    ) -> dict[str, Any]:
        """Of each patient.

        Args:
            p: P(label | y) of the chosen slices.
            x: their images, if there are any to be judged.
            seconds: what all of that took.
            chosen: which slices, all unless given.
            count: which pixels count, the body's unless given.
        """
        chosen = list(range(len(self.cases.x))) if chosen is None else chosen
        inside, body = self.cases.inside[chosen], self.body[chosen]
        patients = [self.cases.patients[i] for i in chosen]
        counted = (body if count is None else count).expand_as(inside)
        rows: dict[str, Any] = {
            name: per_patient(
                patients,
                lambda i, k=k: float(
                    dice(
                        ((p[i, k] > 0.5) & counted[i, k])[None],
                        (inside[i, k] & counted[i, k])[None],
                    )
                ),
            )
            for k, name in enumerate(self.labels)
        }
        return {
            "dice": rows,
            "brier": per_patient(
                patients,
                lambda i: float(
                    brier(p[i][counted[i]][None], inside[i][counted[i]][None])
                ),
            ),
            "ece": float(calibration_error(p[counted], inside[counted])),
            "psnr": None
            if x is None
            else psnr(x, self.cases.x[chosen], TASK.data_range, body).tolist(),
            "seconds": seconds / len(chosen),
        }

    # --- more than images measured

    def with_labels(self, i: int, seen: Tensor, sigma: float) -> iv.InverseProblem:
        """Slice i's sinogram beside some pixels of its labels, all of one noise.

        That of the best ray; the others' and the labels' weights make it theirs.

        Args:
            i: which slice.
            seen: (labels, h, w), of which pixels the label is known.
            sigma: what their membership is off by.
        """
        one = self.problem.items(torch.tensor([i]))
        weight = torch.as_tensor(one.noise.precision(one.y))
        root = weight.sqrt()
        noise = 1 / float(root.max())
        A = on_channels(Mask(noise * root) @ one.linear, 0, of=self.channels)
        labels = on_channels(Mask(seen), range(1, self.channels), of=self.channels)
        S = (noise / (self.value * sigma)) * labels
        both = Stack([A, S], shape=(self.channels, *seen.shape[1:]))
        told = (noise / sigma) * (seen * self.cases.inside[i])[None]
        y = both.join([noise * root * one.y, told])
        return iv.InverseProblem(y, both, GaussianNoise(noise))

    def scribbled(self) -> dict[str, Any]:
        """Few pixels of each label, told beside 15 views; they do not count in scores."""
        g, rows = Generator().manual_seed(2), {}
        chosen = list(range(0, len(self.cases.x), 2))  # a slice of each patient
        inside = self.cases.inside[chosen]
        seen = torch.stack([torch.stack([scribble(m, g) for m in i]) for i in inside])
        count = self.body[chosen] & ~seen
        for name in ("dds", "mmps"):
            some = self.problem.items(torch.tensor(chosen))
            plain = self.drawn(name, self.embedded(some), 4)
            p = self.membership(plain.samples).mean(0)
            x = plain.mean[:, :1]
            rows[f"`{name}`, without"] = self.scored(p, x, 0.0, chosen, count)
            parts = [
                self.drawn(name, self.with_labels(i, s.float(), LABEL_NOISE), 4)
                for i, s in tqdm(list(zip(chosen, seen, strict=True)), leave=False)
            ]
            p = torch.cat([self.membership(s.samples).mean(0) for s in parts])
            x = torch.cat([s.mean[:, :1] for s in parts])
            rows[f"`{name}`, with"] = self.scored(p, x, 0.0, chosen, count)
        return rows

    def guided(self) -> dict[str, Any]:
        """PSNR of the image where the labels are known everywhere, and where not at all."""
        without, known, near = [], [], []
        for i in tqdm(range(len(self.cases.x)), leave=False):
            x, body = self.cases.x[i : i + 1], self.body[i : i + 1]
            around = widened(self.cases.inside[i].any(0)[None, None], 3) & body
            seen = torch.ones_like(self.cases.inside[i], dtype=torch.float32)
            one = self.problem.items(torch.tensor([i]))
            pair = []
            for problem in (
                self.embedded(one),
                self.with_labels(i, seen, LABEL_NOISE),
            ):
                mean = self.drawn("dds", problem).mean[:, :1]
                pair.append(float(psnr(mean, x, TASK.data_range, body)))
                if around.any():
                    near.append(float(psnr(mean, x, TASK.data_range, around)))
            without.append(pair[0])
            known.append(pair[1])
        return {
            "without": without,
            "known": known,
            "near without": near[::2],
            "near known": near[1::2],
        }

    def anova(self) -> dict[str, Any]:
        """Images drawn from y, labels drawn from each: variance between and within."""
        rows: dict[str, Any] = {}
        for views in (15, 30, 60):
            problem = self.measured(views).items(torch.tensor(self.few))
            images = self.drawn("dds", self.embedded(problem), 6).samples[:, :, :1]
            n, m = images.shape[:2]
            labels = self.labels_of(images.flatten(0, 1), 4).samples
            masks = self.membership(labels).unflatten(1, (n, m)).transpose(0, 1)
            parts = nested_anova((masks > 0.5).float())
            # Pixels of one slice on average, in the body.
            body = self.body[self.few]
            rows[str(views)] = {
                "acquisition": float((parts.acquisition * body).sum() / m),
                "annotation": float((parts.annotation * body).sum() / m),
            }
        return rows

    def bounds(self) -> dict[str, Any]:
        """The parotids' pixels in draws of the posterior and of tilted ones, and χ²."""
        which = 1 + self.labels.index("parotids")
        problem = self.embedded(self.problem.items(torch.tensor(self.few)))
        truth = self.cases.inside[self.few, which - 1].flatten(1).sum(1)
        rows: dict[str, Any] = {"truth": truth.tolist()}

        def pixels(x: Tensor) -> Tensor:
            return x[:, which].flatten(1).sum(1) / self.value

        for strength in (-1.0, -0.3, 0.0, 0.3, 1.0):
            prior = Tilted(self.prior, pixels, strength) if strength else self.prior
            x = self.drawn("dds", problem, 4, prior=prior).samples
            z = problem.operator(x.mean(0))
            residual = problem.noise.precision(problem.y) * (problem.y - z) ** 2
            rows[str(strength)] = {
                # Small errors on many pixels outside would add up: those inside count.
                "pixels": (self.membership(x)[:, :, which - 1] > 0.5)
                .sum((2, 3))
                .tolist(),
                "chi2": float(residual.mean()),
                "psnr": psnr(
                    x.mean(0)[:, :1],
                    self.cases.x[self.few],
                    TASK.data_range,
                    self.body[self.few],
                ).tolist(),
            }
        return rows

    def picture(self) -> str:
        """Truth, draws, probability, and reconstruct-then-segment, of one slice."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        i = self.few[len(self.few) // 2]
        one = self.problem.items(torch.tensor([i]))
        solution = self.drawn("dds", self.embedded(one))
        x, draws = solution.samples[:, 0, 0], self.membership(solution.samples)[:, 0]
        pnp = reconstructed(self.cases.x[i : i + 1], "pnp", Generator(), one)
        p = Segmenter.load(self.args.segmenter)(pnp, "pnp")[0]
        truth = self.cases.inside[i].float()
        shown = [
            ("truth", self.cases.x[i, 0], truth > 0.5),
            ("a draw", x[0], draws[0] > 0.5),
            ("another", x[1], draws[1] > 0.5),
            ("mean, P > ½", x.mean(0), draws.mean(0) > 0.5),
            ("pnp, then segmenter", pnp[0, 0], p > 0.5),
        ]
        rows, columns = self.body[i, 0].nonzero().unbind(1)
        cut = (
            slice(int(rows.min()), int(rows.max()) + 1),
            slice(int(columns.min()), int(columns.max()) + 1),
        )
        figure, axes = plt.subplots(1, len(shown) + 1, figsize=(13, 2.6))
        for axis, (title, image, masks) in zip(axes, shown, strict=False):
            axis.imshow(image[cut], cmap="gray", vmin=0.012, vmax=0.028)
            for k, mask in enumerate(masks):
                if mask[cut].any():
                    axis.contour(mask[cut].float(), [0.5], colors=f"C{k + 1}")
            axis.set_title(title, fontsize=9)
        axes[-1].imshow(draws.mean(0).amax(0)[cut], cmap="magma", vmin=0, vmax=1)
        axes[-1].set_title("P(any label | y)", fontsize=9)
        for axis in axes:
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(self.args.page.with_name("joint.png"), dpi=110)
        plt.close(figure)
        return self.cases.patients[i]


def per_patient(patients: list[str], score: Callable[[int], float]) -> dict[str, float]:
    """The mean over a patient's slices in which it is defined; who has none is left out."""
    values: dict[str, list[float]] = {}
    for i, patient in enumerate(patients):
        value = score(i)
        if value == value:
            values.setdefault(patient, []).append(value)
    return {patient: sum(v) / len(v) for patient, v in values.items()}


def widened(mask: Tensor, pixels: int) -> Tensor:
    """All that is at most so many pixels away along rows and columns."""
    side = 2 * pixels + 1
    return torch.nn.functional.max_pool2d(mask.float(), side, 1, pixels) > 0


def scribble(inside: Tensor, generator: Generator) -> Tensor:
    """Some pixels in a mask and some around it; none where it is empty."""
    around = widened(inside[None, None], 2)[0, 0] & ~inside
    seen = torch.zeros_like(inside)
    for region, n in ((inside, INSIDE), (around, OUTSIDE)):
        at = region.nonzero()
        chosen = at[torch.randperm(len(at), generator=generator)[:n]]
        seen[chosen[:, 0], chosen[:, 1]] = True
    return seen


# --- where p(label | y) is known


def recovery() -> dict[str, dict[str, float]]:
    """|share of the draws − p(label | y)|/2 summed over labels, the mean of 20 y.

    A mixture of three textures of 2×2 pixels, each with labels of its own.
    """
    g, side, sigma = Generator().manual_seed(0), 2, 0.4
    d = side**2
    image = 0.6 * torch.randn(3, 1, side, side, generator=g)
    one_hot = torch.eye(3)[:, :2, None, None].expand(3, 2, side, side)
    factor = torch.randn(3, d, 2, generator=g)
    covs = 0.01 * torch.eye(3 * d).repeat(3, 1, 1)
    covs[:, :d, :d] = 0.15 * torch.eye(d) + 0.1 * factor @ factor.mT
    weights, means = torch.tensor([0.5, 0.3, 0.2]), torch.cat([image, one_hot], 1)
    prior = GaussianMixturePrior(weights, means, covs, 0.01, 20.0)
    A = on_channels(Mask(torch.tensor([[1.0, 0.0], [1.0, 1.0]])), 0, of=3)
    y = A(prior.sample(20, generator=g))
    y = y + sigma * torch.randn(y.shape, generator=g)
    rows = torch.eye(3 * d).reshape(-1, 3, side, side)
    matrix = A(rows).flatten(1).T
    exact = torch.stack(
        [prior.posterior(matrix, v.flatten(), sigma).weights for v in y]
    )
    problem = iv.InverseProblem(y, A, GaussianNoise(sigma))
    found: dict[str, dict[str, float]] = {
        "(the prior's shares)": {
            "any": float((weights - exact).abs().sum(1).mean() / 2)
        }
    }
    for name in ("dds", "ddnm", "diffpir", "daps", "mmps", "tmpd", "pigdm", "dps"):
        sampler = getattr(samplers, name)
        for steps in (20, 100):
            solution = iv.solve(
                problem,
                prior,
                sampler,
                steps=steps,
                samples=200,
                chunk=4000,
                generator=Generator().manual_seed(1),
            )
            inside = solution.samples[:, :, 1:].mean((3, 4)) > 0.5
            third = ~inside.any(-1, keepdim=True)
            first = inside[..., :1]
            share = (
                torch.cat([first, inside[..., 1:] & ~first, third], -1).float().mean(0)
            )
            off = float((share - exact).abs().sum(1).mean() / 2)
            found.setdefault(name, {})[str(steps)] = off
    return found


# --- the page

BEGIN, END = "<!-- joint: begin -->", "<!-- joint: end -->"


def interval(values: Tensor) -> str:
    """The mean of patients' values, and its bootstrap interval of 95 %."""
    g = Generator().manual_seed(0)
    picks = torch.randint(len(values), (4000, len(values)), generator=g)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(values.mean()):.3f} ({low:.3f} … {high:.3f})"


def dice_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Each patient's Dice, the mean over the labels that are there."""
    by: dict[str, list[float]] = {}
    for values in row["dice"].values():
        for patient, value in values.items():
            by.setdefault(patient, []).append(value)
    return {patient: sum(v) / len(v) for patient, v in by.items()}


def difference(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    """Of the same patients."""
    return interval(torch.tensor([a[p] - b[p] for p in a if p in b]))


def mean_of(values: Any) -> str:
    """Of a mapping's values or a list's."""
    listed = list(values.values()) if isinstance(values, Mapping) else values
    return "–" if not listed else f"{sum(listed) / len(listed):.3f}"


def page(found: Mapping[str, Any]) -> str:
    """All tables."""
    labels, rows = found["labels"], found["rows"]
    lines = [
        f"| | Dice, all labels | {' | '.join(labels)} | Brier ×10³ | ECE ×10³ | PSNR (dB) "
        "| seconds |",
        "| --- | --- |" + " --- |" * (len(labels) + 4),
    ]

    def line(name: str, row: Mapping[str, Any]) -> str:
        whole = interval(torch.tensor(list(dice_of(row).values())))
        each = " | ".join(mean_of(row["dice"][label]) for label in labels)
        quality = "–" if row["psnr"] is None else f"{mean(row['psnr']):.2f}"
        score = 1e3 * mean(list(row["brier"].values()))
        cost = f"{row['seconds']:.1f}" if row["seconds"] else "–"
        return (
            f"| {name} | {whole} | {each} | {score:.2f} | {1e3 * row['ece']:.2f} "
            f"| {quality} | {cost} |"
        )

    lines += [line(name, row) for name, row in rows.items()]
    n = len(found["patients"])
    people = len(set(found["patients"]))
    lines += [
        "",
        f"{n} slices of {people} patients whom neither training nor tuning saw; 15 views, "
        "measurements simulated. Dice of each patient averaged over labels and slices, its "
        "mean over patients with the bootstrap's 95 % interval; Brier score and "
        "calibration error over the body's pixels; seconds for one slice. "
        f"{DRAWS} draws of {PASSES} passes each (`mmps`: half of them, with backward "
        f"passes; `pnp`: one). {found['date']}, {found['machine']}, torch "
        f"{found['torch']}.",
    ]
    joint = [name for name in rows if name.startswith("joint")]
    other = [n for n in rows if "then" in n or "each segmented" in n]
    if joint and other:
        best = max(joint, key=lambda n: mean(list(dice_of(rows[n]).values())))
        lines += ["", f"| {best} minus | Dice | Brier ×10³ |", "| --- | --- | --- |"]
        for name in other:
            change = difference(dice_of(rows[best]), dice_of(rows[name]))
            scores = [
                {p: 1e3 * v for p, v in rows[name]["brier"].items()}
                for name in (best, name)
            ]
            lines.append(f"| {name} | {change} | {difference(*scores)} |")
    if "picture" in found:
        lines += ["", "![truth, draws, mean, reconstruct-then-segment](joint.png)"]
    for part in (scribbles_told, guided_told, anova_told, bounds_told, recovery_told):
        lines += part(found, line, labels)
    return "\n".join(lines)


Line = Callable[[str, Mapping[str, Any]], str]


def scribbles_told(
    found: Mapping[str, Any], line: Line, labels: list[str]
) -> list[str]:
    """With and without."""
    if "scribbles" not in found:
        return []
    return [
        "",
        f"**Scribbles**: {INSIDE} pixels in each label and {OUTSIDE} around it are "
        "measured beside the sinogram, and do not count in the scores; 4 draws, a slice of "
        "each patient.",
        "",
        f"| | Dice, all labels | {' | '.join(labels)} | Brier ×10³ | ECE ×10³ | PSNR (dB) "
        "| seconds |",
        "| --- | --- |" + " --- |" * (len(labels) + 4),
        *(line(name, row) for name, row in found["scribbles"].items()),
    ]


def guided_told(found: Mapping[str, Any], line: Line, labels: list[str]) -> list[str]:
    """PSNR where the labels are known."""
    if "guided" not in found:
        return []
    g = found["guided"]
    gains = [
        torch.tensor(g[b]) - torch.tensor(g[a])
        for a, b in (("without", "known"), ("near without", "near known"))
    ]
    return [
        "",
        f"**Known labels** (all pixels of all, {LABEL_NOISE} off) change the image's PSNR "
        f"by {interval(gains[0])} dB over the body, and by {interval(gains[1])} dB within "
        "three pixels of a label (intervals over slices).",
    ]


def anova_told(found: Mapping[str, Any], line: Line, labels: list[str]) -> list[str]:
    """Two parts of the variance against views."""
    if "anova" not in found:
        return []
    return [
        "",
        "**Whose doubt it is**: variance of a pixel's label, summed over a slice and its "
        f"labels, by nested analysis of variance (6 images, 4 masks each; {FEW} slices).",
        "",
        "| views | of the measurement | of the contour, the image known |",
        "| --- | --- | --- |",
        *(
            f"| {views} | {row['acquisition']:.1f} | {row['annotation']:.1f} |"
            for views, row in found["anova"].items()
        ),
    ]


def bounds_told(found: Mapping[str, Any], line: Line, labels: list[str]) -> list[str]:
    """Areas against the tilt."""
    if "bounds" not in found:
        return []
    truth = torch.tensor(found["bounds"]["truth"], dtype=torch.float32)
    lines = [
        "",
        "**Bounds**: pixels of the parotids under p(x) exp(s · pixels), each slice's as a "
        f"fraction of the truth ({mean(truth.tolist()):.0f} pixels on average; slices "
        "without are left out), with the data's misfit.",
        "",
        "| s | area / true area | χ² | PSNR (dB) |",
        "| --- | --- | --- | --- |",
    ]
    for strength, row in found["bounds"].items():
        if strength == "truth":
            continue
        pixels = torch.tensor(row["pixels"], dtype=torch.float32).mean(0)
        ratio = (pixels / truth)[truth > 0]
        lines.append(
            f"| {strength} | {mean(ratio.tolist()):.2f} | {row['chi2']:.2f} "
            f"| {mean(row['psnr']):.2f} |"
        )
    return lines


def recovery_told(found: Mapping[str, Any], line: Line, labels: list[str]) -> list[str]:
    """How far each sampler's labels are from the closed form's."""
    if "recovery" not in found:
        return []
    lines = [
        "",
        "**Where p(label | y) is known** (a mixture whose component is the label; only "
        "the image is measured): total variation between labels of 200 draws and the "
        "closed form, the mean of 20 measurements. As many exact draws are off by about "
        "0.02.",
        "",
        "| | 20 steps | 100 steps |",
        "| --- | --- | --- |",
    ]
    for name, row in found["recovery"].items():
        cells = [row.get(k, row.get("any")) for k in ("20", "100")]
        shown = name if name.startswith("(") else f"`{name}`"
        lines.append(f"| {shown} | " + " | ".join(f"{v:.3f}" for v in cells) + " |")
    return lines


def mean(values: list[float]) -> float:
    """The average."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
