import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from invsolve import (
    InverseProblem,
    bf16,
    demo,
    io,
    operators as ops,
    priors,
    samplers,
    solve,
)
from invsolve.cli import main
from invsolve.cli.measured import NOISES, OPERATORS
from invsolve.cli.samplers import SAMPLERS, options_of
from invsolve.priors import AffineMap, UNet, UNetConfig
from invsolve.priors.weights import card_of
from invsolve.units import MU_WATER, hu_to_mu, mu_to_hu


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Three slices of 32×32 in HU: a body of water with bone and air in it."""
    hu = torch.full((3, 32, 32), -1000.0)
    hu[:, 5:28, 7:26] = 0.0
    hu[:, 10:14, 12:18] = 800.0
    hu[:, 18:24, 15:20] = -900.0
    hu[1:, 20:22, 9:12] = 200.0
    affine = np.diag([-8.0, -8.0, 3.0, 1.0])
    affine[:3, 3] = (120.0, 110.0, -40.0)
    path = tmp_path_factory.mktemp("image") / "phantom.nii.gz"
    io.write(path, io.Image(hu, affine, "HU"))
    return path


def make_prior(folder, name, unit, **more):
    together, shown = more.get("neighbours", 1), more.pop("condition", 0)
    config = UNetConfig(
        channels=together - shown, condition=shown, widths=(8, 16), groups=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(config)
    scale = MU_WATER if unit else 1.0
    map = AffineMap(scale, 0.0)
    card = card_of(
        name, config, sigma_data=0.5, map=map, unit=unit, training={}, **more
    )
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / name)
    (folder / name).rename(folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(card))
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return make_prior(tmp_path_factory.mktemp("prior"), "tiny", "1/mm")


@pytest.fixture(scope="module")
def measured(phantom, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "y.npz"
    run("simulate", phantom, "-o", path, "--views", 12, "--slices", "0:2")
    return path


def run(*words):
    assert main([str(word) for word in (*words,)]) == 0


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs what must fail; gives the one line, and sees that nothing was written."""

    def listing():
        return sorted(
            (p, p.is_file() and p.stat().st_size) for p in tmp_path.rglob("*")
        )

    def check(*words, code=2):
        before = listing()
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n"
        assert listing() == before
        return err

    return check


def test_simulate_and_solve(measured, phantom, prior, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    run(
        *("solve", measured, "-o", out, "--prior", prior, "--sampler", "dds"),
        *("--steps", 3, "--samples", 2, "--set", "cg_steps=2", "--truth", phantom),
        *("--save-samples", "--seed", 3),
    )
    assert sorted(file.name for file in out.iterdir()) == [
        "mean.nii.gz",
        "report.html",
        "report.png",
        "result.json",
        "samples.npy",
        "std.nii.gz",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert "PSNR" in capsys.readouterr().out

    mean, truth = io.read(out / "mean.nii.gz"), io.read(phantom)
    np.testing.assert_allclose(mean.affine, truth.affine, atol=1e-4)
    assert mean.values.shape == (2, 32, 32) and mean.unit == "HU"
    samples = torch.from_numpy(np.load(out / "samples.npy"))
    torch.testing.assert_close(samples.mean(0), mean.values, atol=0.1, rtol=1e-4)
    std = io.read(out / "std.nii.gz").values
    torch.testing.assert_close(samples.std(0), std, atol=0.1, rtol=1e-3)

    record = json.loads((out / "result.json").read_text())
    (result,) = record["results"]
    assert record["seed"] == 3 and record["unit"] == "HU"
    options = record["settings"]["options"]
    assert options["steps"] == 3 and options["cg_steps"] == 2
    assert result["kind"] == "posterior_sample" and len(result["metrics"]["ssim"]) == 2
    assert result["stats"]["network_forwards"] == 2 * 2 * 3
    assert len(record["input"]["sha256"]) == 64 and record["versions"]["torch"]


def test_it_begins_with_other_runs_images(measured, prior, tmp_path):
    """RED-diff with steps of no length stays where it began: at one's, or two's mean."""
    begin = []
    for lam in (30, 300):
        out = tmp_path / f"{lam}"
        run("solve", measured, "-o", out, "--sampler", "tv", "--set", f"lam={lam}")
        begin.append(out / "mean.nii.gz")
    images = torch.stack([io.read(path).values for path in begin])
    for count, expected in ((1, images[0]), (2, images.mean(0))):
        then = tmp_path / f"from {count}"
        run(
            *("solve", measured, "-o", then, "--prior", prior, "--sampler", "reddiff"),
            *("--steps", 2, "--set", "lr=0", "--set", "optimizer=sgd", "--samples", 1),
            *(word for path in begin[:count] for word in ("--init", path)),
        )
        made = io.read(then / "mean.nii.gz").values
        torch.testing.assert_close(made, expected, atol=0.1, rtol=1e-5)
        record = json.loads((then / "result.json").read_text())
        told = record["settings"]["options"]["init"]
        assert told.count("mean.nii.gz, sha256 ") == count
    assert (images[0] - images[1]).abs().max() > 10


def test_the_same_seed_gives_the_same(measured, phantom, prior, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("simulate", phantom, "-o", tmp_path / f"{name}.npz", "--seed", seed)
        run(
            *("solve", measured, "-o", tmp_path / name, "--prior", prior, "--steps", 2),
            *("--samples", 1, "--seed", seed),
        )
    ys = [io.load_measurements(tmp_path / f"{n}.npz").y for n in "abc"]
    xs = [io.read(tmp_path / n / "mean.nii.gz").values for n in "abc"]
    for a, b, c in (ys, xs):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_solver_is_named(measured, prior, tmp_path):
    """And told of in the record; dps's own step has no place for one."""
    base = ("solve", measured, "--prior", prior, "--steps", 2, "--samples", 1)
    run(*base, "-o", tmp_path / "a", "--sampler", "diffpir", "--set", "solver=dpm++2m")
    run(*base, "-o", tmp_path / "b", "--sampler", "diffpir", "--set", "solver=heun")
    record = json.loads((tmp_path / "a" / "result.json").read_text())
    assert record["settings"]["options"]["solver"].startswith("Multistep(order=2")
    passes = [
        json.loads((tmp_path / n / "result.json").read_text())["results"][0]["stats"][
            "network_forwards"
        ]
        for n in "ab"
    ]
    assert passes == [2 * 2, 2 * 3]


def test_a_checkpoint_is_gone_on_from(measured, prior, refused, tmp_path):
    """And is refused by a run that differs."""
    base = ("solve", measured, "--prior", prior, "--steps", 2, "--samples", 2)
    kept = tmp_path / "kept.pt"
    run(*base, "-o", tmp_path / "a")
    run(*base, "-o", tmp_path / "b", "--checkpoint", kept)
    run(*base, "-o", tmp_path / "c", "--checkpoint", kept)
    a, b, c = (io.read(tmp_path / n / "mean.nii.gz").values for n in "abc")
    assert torch.equal(a, b) and torch.equal(b, c)
    message = refused(*base, "-o", tmp_path / "d", "--checkpoint", kept, "--seed", 1)
    assert "another run" in message and not (tmp_path / "d").exists()


def test_mirror_images_and_shifts_are_as_likely(measured, prior, refused, tmp_path):
    base = ("solve", measured, "--prior", prior, "--steps", 3, "--samples", 1)
    run(*base, "-o", tmp_path / "a")
    run(*base, "-o", tmp_path / "b", "--equivariant")
    a, b = (io.read(tmp_path / n / "mean.nii.gz").values for n in "ab")
    assert not torch.equal(a, b)
    settings = [
        json.loads((tmp_path / n / "result.json").read_text())["settings"] for n in "ab"
    ]
    assert [s["equivariant"] for s in settings] == [False, True]
    message = refused(
        *("solve", measured, "-o", tmp_path / "c", "--sampler", "fbp", "--equivariant")
    )
    assert "leave it out" in message


def test_a_preview_of_a_run(measured, prior, refused, tmp_path):
    """A picture beside the result and not in it; in the end, of the result itself."""
    from PIL import Image

    base = ("solve", measured, "--prior", prior, "--steps", 2, "--samples", 1)
    run(*base, "-o", tmp_path / "a", "--preview", tmp_path / "now.png")
    with Image.open(tmp_path / "now.png") as image:
        grey = torch.from_numpy(np.asarray(image).copy())
    hu = io.read(tmp_path / "a" / "mean.nii.gz").values[0]
    expected = (255 * (hu + 160) / 400).clamp(0, 255)
    torch.testing.assert_close(grey.float(), expected, rtol=0, atol=0.6)
    message = refused(*base, "-o", tmp_path / "b", "--preview", tmp_path / "now.jpg")
    assert ".png" in message
    classical = ("solve", measured, "-o", tmp_path / "b", "--sampler", "fbp")
    message = refused(*classical, "--preview", tmp_path / "b.png")
    assert "leave it out" in message


def test_an_ensemble_from_words(measured, phantom, prior, tmp_path):
    """Of CT it is the demo's, and begins with an image if there is one."""
    tuned = options_of("ensemble", samplers.ensemble, [], None, tuned=True)
    assert tuned["init"].func is samplers.tv
    base = ("solve", measured, "--prior", prior, "--sampler", "ensemble")
    run(*base, "-o", tmp_path / "a", "--init", phantom)
    record = json.loads((tmp_path / "a" / "result.json").read_text())
    options = record["settings"]["options"]
    assert options["methods"].startswith("pnp(method=admm, steps=20, sigma_range=(0.03")
    assert options["init"].startswith(f"{phantom.name}, sha256")
    assert record["results"][0]["stats"]["network_forwards"] == 2 * 100


def test_what_an_ensemble_is_of_is_not_for_words(refused, measured, prior, tmp_path):
    wrong = ("--sampler", "ensemble", "--set", "methods=pnp")
    base = ("solve", measured, "-o", tmp_path / "a", "--prior", prior)
    message = refused(*base, *wrong)
    assert "no option 'methods': it has none, leave it out" in message


@pytest.mark.parametrize("sampler", ["dds", "reddiff", "pnp"])
def test_levels_from_words(measured, prior, tmp_path, sampler):
    """Whether the default is a pair or none, a pair is taken, and says what it does."""
    base = ("solve", measured, "--prior", prior, "--sampler", sampler, "--samples", 1)
    means = []
    for name, high in (("a", 0.1), ("b", 2.0)):
        run(
            *base,
            *("--steps", 2, "--set", f"sigma_range=[0.02, {high}]"),
            *("-o", tmp_path / name),
        )
        means.append(io.read(tmp_path / name / "mean.nii.gz").values)
    assert not torch.equal(*means)


def test_the_network_in_bf16(measured, prior, tmp_path, monkeypatch):
    monkeypatch.setattr(bf16, "CPU", True)
    base = ("solve", measured, "--prior", prior, "--steps", 2, "--samples", 1)
    run(*base, "-o", tmp_path / "a")
    run(*base, "-o", tmp_path / "b", "--precision", "bf16")
    a, b = (io.read(tmp_path / n / "mean.nii.gz").values for n in "ab")
    assert 0 < float((a - b).abs().max()) < 200
    record = json.loads((tmp_path / "b" / "result.json").read_text())
    assert record["settings"]["precision"] == "bf16"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A ramp of red, a ramp of green and no blue."""
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    x = torch.stack([ramp, ramp.T, torch.zeros(32, 32)])
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    io.write(path, io.Image(x, np.eye(4), colour=True))
    return path


def test_a_picture_in_colours(picture, tmp_path, capsys):
    y, out = tmp_path / "y.npz", tmp_path / "out"
    words = ("--operator", "blur", "--width", 0.5, "--sigma", 0.001)
    run("simulate", picture, "-o", y, *words)
    assert io.load_measurements(y).y.shape == (1, 3, 32, 32)
    run("solve", y, "-o", out, "--sampler", "cgls", "--truth", picture)
    made, truth = (io.read(p, colour=True).values for p in (out / "mean.png", picture))
    assert (made - truth).abs().mean() < 0.01
    [row] = json.loads((out / "result.json").read_text())["results"]
    exact = io.read(out / "mean.nii.gz").values
    mse = float((exact - truth).square().mean())
    [db] = row["metrics"]["psnr_db"]  # over all colours as one
    assert db == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    assert "1 picture, 1 sample each" in (out / "report.html").read_text()


def test_colours_where_they_make_no_sense(refused, picture, prior, tmp_path):
    out = tmp_path / "y.npz"
    assert "grey images" in refused("simulate", picture, "-o", out, "--operator", "mri")
    words = ("simulate", picture, "-o", out, "--operator", "blur")
    assert "leave out --slice" in refused(*words, "--slice", 1)
    run(*words)
    solve = ("solve", out, "-o", tmp_path / "out", "--prior", prior)
    assert "measurements in no unit" in refused(*solve)
    assert "not for a picture" in refused(*solve[:4], "--sampler", "dds3d")
    latent = (*solve[:4], "--prior", "latent-photos-64", "--sampler", "resample")
    for option in (["--equivariant"], ["--preview", tmp_path / "now.png"]):
        assert "is for priors of images" in refused(*latent, *option)


@pytest.mark.parametrize("sampler", ["dds3d", "mbir"])
def test_a_stack_as_one_volume(sampler, measured, prior, phantom, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--sampler", sampler, "--prior", prior, "--steps", 3]
    run("solve", measured, "-o", out, "--truth", phantom, *options)
    shown = capsys.readouterr()
    assert "for the volume" in shown.err and f"{sampler} " in shown.out
    record = json.loads((out / "result.json").read_text())
    assert record["settings"]["options"]["aspect"] == pytest.approx(3 / 8)
    [made] = record["results"]
    passes = 3 if sampler == "dds3d" else 6
    assert made["stats"]["network_forwards"] == 2 * passes
    image = io.read(out / "mean.nii.gz")
    assert image.values.shape == (2, 32, 32)
    assert image.spacing == pytest.approx((3.0, 8.0, 8.0))
    assert "The volume" in (out / "report.html").read_text()


def test_two_processes_share_a_volume(
    phantom, prior, refused, monkeypatch, tmp_path, capsys
):
    """One process's volume, by torchrun, from a volume to begin with; one writes."""
    y, out, first = (tmp_path / name for name in ("y.npz", "out", "first"))
    run("simulate", phantom, "-o", y, "--views", 12, "--slices", "0:3")
    run("solve", y, "-o", first, "--sampler", "tv", "--steps", 5)
    options = ["--sampler", "dds3d", "--prior", prior, "--steps", 3, "--device", "cpu"]
    options += ["--init", first / "mean.nii.gz"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", "2", "-m", "invsolve.cli", "solve", y, "-o", out]
    words += [*options, "--checkpoint", tmp_path / "kept"]
    process = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode().count("wrote") == 1
    assert {p.name for p in tmp_path.glob("kept*")} == {"kept.0", "kept.1"}
    run("solve", y, "-o", tmp_path / "alone", *options)
    both, alone = (io.read(p / "mean.nii.gz") for p in (out, tmp_path / "alone"))
    assert np.array_equal(both.affine, alone.affine)
    close = 1e-5 * float(alone.values.abs().max())
    torch.testing.assert_close(both.values, alone.values, rtol=0, atol=close)
    record = json.loads((out / "result.json").read_text())
    assert record["settings"]["processes"] == 2

    for name, value in {"WORLD_SIZE": "4", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    other = ("solve", y, "-o", tmp_path / "other", "--prior", prior)
    assert "several processes share" in refused(*other, "--sampler", "dds")
    assert "4 processes cannot share 3" in refused(*other, "--sampler", "dds3d")
    shown = ("--preview", tmp_path / "now.png")
    assert "leave it out" in refused(*other, "--sampler", "dds3d", *shown)


def test_a_prior_of_neighbours_sees_them_together(
    phantom, measured, refused, tmp_path, capsys
):
    three = make_prior(tmp_path, "three", "1/mm", neighbours=3)
    many, out = tmp_path / "many.npz", tmp_path / "out"
    run("simulate", phantom, "-o", many, "--views", 12, "--slices", "0:3")
    options = ["--sampler", "dds3d", "--steps", 2, "--prior", three]
    run("solve", many, "-o", out, *options)
    assert io.read(out / "mean.nii.gz").values.shape == (3, 32, 32)
    words = ("solve", measured, "-o", tmp_path / "other", *options)
    assert "need 3 slices, the volume has 2" in refused(*words)


def test_a_card_tells_who_knows_more_below_a_level(phantom, prior, refused, tmp_path):
    """Its `below`: another prior, of single slices, and the level in its own range."""
    many, means = tmp_path / "many.npz", []
    run("simulate", phantom, "-o", many, "--views", 12, "--slices", "0:3")
    base = ["solve", many, "--sampler", "dds3d", "--steps", 3]
    three = make_prior(tmp_path, "three", "1/mm", neighbours=3)
    for below in (None, 0.5, 1e6):
        card = json.loads(three.read_text())
        if below is not None:
            card["below"] = {"sigma": below, "prior": str(prior)}
            three.write_text(json.dumps(card))
        out = tmp_path / f"out-{below}"
        if below == 1e6:
            message = refused(*base, "-o", out, "--prior", three)
            assert "never be asked" in message
            continue
        run(*base, "-o", out, "--prior", three)
        means.append(io.read(out / "mean.nii.gz").values)
    assert not torch.equal(*means)


def solved(measured, prior, sampler, **options):
    """The volume in HU that `solve` gives of the same measurements."""
    m = io.load_measurements(measured)
    angles = torch.as_tensor(m.operator["angles"])
    beam = ops.ParallelBeam((32, 32), angles, pixel_mm=8.0, oversample=2)
    A = ops.SliceWise(beam, len(m.y))
    noise = ops.TransmissionNoise(m.noise["counts"], m.noise["floor"])
    problem = InverseProblem(m.y[None], A, noise)
    generator = torch.Generator().manual_seed(0)
    made = solve(problem, prior, sampler, generator=generator, **options)
    return mu_to_hu(made.mean[0, 0])


def test_a_slice_among_its_neighbours_and_two_priors_of_a_volume(
    phantom, prior, refused, tmp_path
):
    """What the library makes of them by `Sliding`, `TwoPlanes` and another's volume."""
    between = make_prior(tmp_path, "between", "1/mm", neighbours=3, condition=2)
    y, first, then = tmp_path / "y.npz", tmp_path / "first", tmp_path / "then"
    run("simulate", phantom, "-o", y, "--views", 12, "--slices", "0:3")
    among = priors.Sliding(priors.load(between))
    run(
        *("solve", y, "-o", first, "--sampler", "pnp", "--volume"),
        *("--prior", between, "--steps", 2),
    )
    mean = io.read(first / "mean.nii.gz").values
    options = {"sigma_range": (0.01, 0.1), "lam": 0.1, "steps": 6}
    torch.testing.assert_close(
        mean, solved(y, among, samplers.pnp, steps=2), atol=0.5, rtol=1e-4
    )
    words = ("solve", y, "-o", then, "--sampler", "pnp", "--volume", "--steps", 6)
    words += ("--set", "sigma_range=[0.01, 0.1]", "--set", "lam=0.1")
    run(*words, "--prior", prior, "--beside", between, "--init", first / "mean.nii.gz")
    both = priors.TwoPlanes(priors.Slices(priors.load(prior)), among, drawn=True)
    made = io.read(then / "mean.nii.gz").values
    begin = hu_to_mu(mean)[None, None]
    expected = solved(y, both, samplers.pnp, init=begin, **options)
    torch.testing.assert_close(made, expected, atol=0.5, rtol=1e-4)
    for other in (both.first, both.second):  # both of them were asked
        alone = solved(y, other, samplers.pnp, init=begin, **options)
        assert (alone - made).abs().max() > 5
    settings = json.loads((then / "result.json").read_text())["settings"]
    assert settings["beside"] == str(between)
    assert "prior beside it" in (then / "report.html").read_text()

    nothing = ("solve", y, "-o", tmp_path / "no", "--prior", prior)
    assert "--volume is for pnp, red" in refused(*nothing, "--volume")
    assert "--sampler dds3d, or pnp --volume" in refused(*nothing, "--beside", prior)
    plain = make_prior(tmp_path, "plain", "")
    words = ("--sampler", "dds3d", "--beside", plain)
    assert "is of images in no unit" in refused(*nothing, *words)
    one = tmp_path / "one.npz"
    run("simulate", phantom, "-o", one, "--views", 12, "--slice", 1)
    words = ("solve", one, "-o", tmp_path / "no", "--sampler", "dds3d")
    message = refused(*words, "--prior", between)
    assert "need at least 2, the volume has 1" in message


def test_a_volume_that_does_not_fit_is_refused(
    refused, measured, prior, tmp_path, monkeypatch
):
    monkeypatch.setattr("invsolve.cli.stacks.free_memory", lambda device: 1000)
    words = ["solve", measured, "-o", tmp_path / "out", "--prior", prior]
    message = refused(*words, "--sampler", "dds3d")
    assert "solve for fewer slices at a time" in message
    assert not (tmp_path / "out").exists()


def test_a_point_estimate_has_no_standard_deviation(measured, tmp_path):
    out = tmp_path / "out"
    run("solve", measured, "-o", out, "--sampler", "tv", "--steps", 5)
    assert not (out / "std.nii.gz").exists()
    assert "point estimate" in (out / "report.html").read_text()


def test_force_leaves_nothing_of_the_last_run(measured, prior, tmp_path):
    out = tmp_path / "out"
    run(
        *("solve", measured, "-o", out, "--prior", prior, "--steps", 1),
        *("--samples", 2, "--save-samples"),
    )
    (out / "notes.txt").write_text("mine")
    run("solve", measured, "-o", out, "--sampler", "fbp", "--force")
    names = sorted(file.name for file in out.iterdir())
    expected = ["mean.nii.gz", "notes.txt", "report.html", "report.png", "result.json"]
    assert names == expected


def test_fbp_of_many_views_is_the_image(phantom, tmp_path):
    y, out = tmp_path / "y.npz", tmp_path / "out"
    run("simulate", phantom, "-o", y, "--views", 180, "--counts", 1e7, "--slice", 1)
    run(
        *("solve", y, "-o", out, "--sampler", "fbp", "--set", "window=ram-lak"),
        *("--truth", phantom),
    )
    metrics = json.loads((out / "result.json").read_text())["results"][0]["metrics"]
    assert metrics["psnr_db"][0] > 20
    affine = io.read(phantom).slices(1, 2).affine
    np.testing.assert_allclose(io.read(out / "mean.nii.gz").affine, affine, atol=1e-4)


def test_a_bare_sinogram(measured, tmp_path):
    m = io.load_measurements(measured)
    np.save(tmp_path / "sino.npy", m.y[:, 0].double().numpy())
    np.save(tmp_path / "angles.npy", m.operator["angles"])
    given = ("--pixel-mm", 8, "--size", 32, "--counts", 1e5, "--sampler", "fbp")
    run("solve", measured, "-o", tmp_path / "a", "--sampler", "fbp")
    run("solve", tmp_path / "sino.npy", "-o", tmp_path / "b", *given)
    run(
        *("solve", tmp_path / "sino.npy", "-o", tmp_path / "c", *given),
        *("--angles", tmp_path / "angles.npy"),
    )
    a, b, c = (io.read(tmp_path / n / "mean.nii.gz").values for n in "abc")
    torch.testing.assert_close(a, b, atol=0.05, rtol=1e-4)
    torch.testing.assert_close(a, c, atol=0.05, rtol=1e-4)


FAN = {
    "geometry": "FanBeam",
    "shape": [32, 32],
    "angles": {"start": 0.0, "stop": 6.283185307179586, "count": 90},
    "source_to_axis_mm": 500.0,
    "source_to_detector_mm": 900.0,
    "pixel_mm": 8.0,
}


def test_a_fan_beam_from_a_geometry_file(phantom, tmp_path):
    scanner, sinogram = tmp_path / "scanner.json", tmp_path / "y.npz"
    scanner.write_text(json.dumps(FAN))
    run("simulate", phantom, "-o", sinogram, "--geometry", scanner, "--counts", "1e6")
    m = io.load_measurements(sinogram)
    assert m.operator["name"] == "fan"
    run("solve", sinogram, "-o", tmp_path / "npz", "--sampler", "fbp")
    bare = tmp_path / "y.npy"
    np.save(bare, m.y[:, 0].numpy())
    words = ["solve", bare, "-o", tmp_path / "npy", "--sampler", "fbp"]
    run(*words, "--geometry", scanner, "--counts", "1e6")
    one, two = (io.read(tmp_path / k / "mean.nii.gz").values for k in ("npz", "npy"))
    assert torch.allclose(one, two)
    truth = io.read(phantom).values[len(io.read(phantom).values) // 2]
    assert (one[0] - truth).abs().median() < 40  # HU


def test_a_geometry_must_fit(refused, phantom, tmp_path):
    scanner, sinogram = tmp_path / "scanner.json", tmp_path / "y.npy"
    scanner.write_text(json.dumps({**FAN, "shape": [16, 16]}))
    words = ["simulate", phantom, "-o", tmp_path / "y.npz", "--geometry", scanner]
    assert "make them agree" in refused(*words)
    assert "--geometry is for ct" in refused(*words, "--operator", "mri")
    cone = {**FAN, "geometry": "ConeBeam", "shape": [4, 16, 16], "voxel_mm": 8.0}
    scanner.write_text(json.dumps({k: v for k, v in cone.items() if k != "pixel_mm"}))
    assert "is a ConeBeam" in refused(*words)
    np.save(sinogram, np.zeros((90, 40), np.float32))
    words = ["solve", sinogram, "-o", tmp_path / "o", "--geometry", scanner]
    assert "leave them out" in refused(*words, "--counts", "1e4", "--size", "32")


@pytest.mark.parametrize("operator", ["inpaint", "blur", "superres", "mri"])
def test_the_other_operators(operator, tmp_path, phantom):
    picture = (io.read(phantom).values[1] + 1000) / 1800
    np.save(tmp_path / "x.npy", picture.numpy())
    prior = make_prior(tmp_path, "grey", "")
    y, out = tmp_path / "y.npz", tmp_path / "out"
    run("simulate", tmp_path / "x.npy", "-o", y, "--operator", operator)
    run(
        *("solve", y, "-o", out, "--prior", prior, "--steps", 2, "--samples", 2),
        *("--truth", tmp_path / "x.npy", "--window", "0,1"),
    )
    record = json.loads((out / "result.json").read_text())
    assert record["unit"] == "" and record["settings"]["operator"]["name"] == operator
    assert io.read(out / "mean.nii.gz").values.shape == (1, 32, 32)


def test_the_demo(phantom, prior, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "bundled", lambda name: phantom)
    monkeypatch.setattr(
        demo,
        "METHODS",
        tuple(
            demo.Method(
                m.name,
                m.sampler,
                {**m.options, "steps": 3} if m.name == "DDS" else m.options,
                min(m.samples, 2),
            )
            for m in demo.METHODS
        ),
    )
    out = tmp_path / "demo"
    for _ in range(2):  # a second run may write over the first
        run("demo", "--quick", "-o", out, "--prior", prior)
    lines = capsys.readouterr().out.split("\n")
    for line, method in zip(lines[1:], demo.METHODS, strict=False):
        assert line.startswith(f"{method.name}  ")
    settings = json.loads((out / "result.json").read_text())["results"][2]["options"]
    assert settings["init"].startswith("tv(lam=145.1, steps=66")
    names = sorted(file.name for file in out.iterdir())
    assert names == ["report.html", "report.png", "result.json"]


def test_train(phantom, tmp_path, monkeypatch):
    config = tmp_path / "tiny.toml"
    config.write_text(
        'name = "tiny"\n'
        f'[data]\ntrain = "."\nval = "."\npattern = "{phantom.name}"\n'
        'unit = "HU"\nscale = 0.0193\nshift = 1\n'
        "[network]\nwidths = [8, 16]\ngroups = 4\n"
        "[optimisation]\nimages = 8\nbatch = 4\nbf16 = false\n"
    )
    monkeypatch.setenv("INVSOLVE_DATA", str(phantom.parent))
    run("train", config, "--out", tmp_path / "prior", "--minutes", 1)
    assert (tmp_path / "prior" / "tiny.safetensors").is_file()
    run("priors", tmp_path / "prior" / "tiny.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "none.nii.gz", "-o", "y.npz"], "there is no file none.nii.gz"),
        (["simulate", "PHANTOM", "-o", "y.txt"], "must end in .npz"),
        (["simulate", "PHANTOM", "-o", "/dev/null/y.npz"], "cannot write"),
        (["simulate", "PHANTOM"], "option '-o'"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--slice", "3"], "slices 0 to 2"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--slices", "2:2"], "slices 0 to 2"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--slices", "b"], "as A:B"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--counts", "-5"], "counts must be"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--views", "0"], "--views"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--unit", "hu"], "unknown unit"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--unit", "none"], "needs an image of"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--unit", "1/mm"], "give --unit HU"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--pixel-mm", "-1"], "--pixel-mm"),
        (["simulate", "PHANTOM", "-o", "y.npz", "--operator", "cct"], "mean ct?"),
        (
            [
                "simulate",
                "PHANTOM",
                "-o",
                "y.npz",
                "--operator",
                "blur",
                "--sigma",
                "-1",
            ],
            "sigma must be > 0",
        ),
        (
            [
                "simulate",
                "PHANTOM",
                "-o",
                "y.npz",
                "--operator",
                "inpaint",
                "--keep",
                "2",
            ],
            "keep is a fraction",
        ),
        (["simulate", "PHANTOM", "-o", "y.npz", "--device", "tpu"], "unknown device"),
        (["solve", "none.npz", "-o", "out"], "there is no file"),
        (["solve", "Y", "-o", "out", "--prior", "ct-headnek"], "unknown prior"),
        (["solve", "Y", "-o", "out", "--sampler", "redif"], "did you mean reddiff?"),
        (["solve", "Y", "-o", "out", "--set", "step=3"], "did you mean steps?"),
        (["solve", "Y", "-o", "out", "--set", "solver=heum"], "did you mean heun?"),
        (["solve", "Y", "-o", "out", "--precision", "bf17"], "did you mean bf16?"),
        (["solve", "Y", "-o", "out", "--set", "steps"], "KEY=VALUE"),
        (["solve", "Y", "-o", "out", "--set", "steps=many"], "a whole number"),
        (["solve", "Y", "-o", "out", "--set", "eta=NaN"], "a finite number"),
        (["solve", "Y", "-o", "out", "--set", "steps=0"], "at least 1"),
        (["solve", "Y", "-o", "out", "--set", "sigma_range=2"], "a list of numbers"),
        (
            ["solve", "Y", "-o", "out", "--sampler", "dds3d", "--set", "init=2"],
            "has no option 'init'",
        ),
        (["solve", "Y", "-o", "out", "--steps", "0"], "--steps"),
        (["solve", "Y", "-o", "out", "--samples", "-1"], "--samples"),
        (["solve", "Y", "-o", "out", "--sampler", "fbp", "--steps", "3"], "no --steps"),
        (["solve", "Y", "-o", "out", "--window", "5"], "LO,HI"),
        (["solve", "Y", "-o", "out", "--window", "240,-160"], "the smaller"),
        (["solve", "Y", "-o", "out", "--pixel-mm", "3"], "is for a sinogram"),
        (["solve", "Y", "-o", "out", "--truth", "none.nii.gz"], "there is no file"),
        (["solve", "Y", "-o", "out", "--init", "PHANTOM"], "dds takes no --init"),
        (["solve", "Y", "-o", "out", "--seed", "-1"], "--seed"),
        (["solve", "Y", "-o", "PHANTOM"], "is a file"),
        (["solve", "Y", "-o", "FULL"], "is not empty"),
        (["solve", "Y", "-o", "out", "--smplr", "dds"], "No such option"),
        (["train", "none.toml", "--out", "out"], "cannot read none.toml"),
        (["train", "none.toml", "--out", "out", "--minutes", "0"], "--minutes"),
        (["priors", "nothing"], "unknown prior"),
        (["sove"], "No such command 'sove'"),
    ],
)
def test_bad_input_is_one_line(
    words, said, refused, phantom, measured, prior, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    stand = {"PHANTOM": phantom, "Y": measured, "FULL": tmp_path / "full"}
    given = [str(stand.get(word, word)) for word in words]
    if words[0] == "solve" and "--prior" not in words:
        given += ["--prior", str(prior)]
    assert said in refused(*given)


def test_bad_files_are_one_line(refused, measured, prior, phantom, tmp_path):
    out = tmp_path / "out"

    def solve(file, *more):
        return refused("solve", file, "-o", out, "--prior", prior, *more)

    short = tmp_path / "short.npz"
    short.write_bytes(measured.read_bytes()[:-500])
    assert "it is damaged" in solve(short)

    with np.load(measured) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for name, changed, said in (
        ("nan", {"y": np.where(arrays["y"] > 1, np.nan, arrays["y"])}, "are NaN"),
        ("shape", {"y": arrays["y"][..., :-1]}, "expects measurements of shape"),
        ("degrees", {"angles": np.degrees(arrays["angles"])}, "torch.deg2rad"),
        (
            "noise",
            {"meta": with_noise(arrays, {"name": "gaussian", "sigma": -1.0})},
            "sigma must be > 0",
        ),
        (
            "noises",
            {"meta": with_noise(arrays, {"name": "transmision", "counts": 1e5})},
            "did you mean transmission?",
        ),
        ("lacks", {"meta": with_noise(arrays, {"name": "gaussian"})}, "ill described"),
    ):
        file = tmp_path / f"{name}.npz"
        np.savez(file, **{**arrays, **changed})
        assert said in solve(file)

    other = tmp_path / "truth.npy"
    np.save(other, np.zeros((2, 16, 16), dtype=np.float32))
    assert "the measurements 2×32×32" in solve(measured, "--truth", other)
    begin = ("--sampler", "pnp", "--init", other)
    assert "the measurements 2×32×32" in solve(measured, *begin)
    np.save(other, np.full((2, 32, 32), np.nan, dtype=np.float32))
    assert "NaN or infinite" in solve(measured, *begin)
    grey = make_prior(tmp_path, "grey", "")
    error = refused("solve", measured, "-o", out, "--prior", grey)
    assert "the prior" in error and "no unit" in error
    grey.with_suffix(".safetensors").write_bytes(b"no weights")
    assert "cannot load the prior" in refused(
        "solve", measured, "-o", out, "--prior", grey
    )

    flat = io.read(phantom)
    affine = np.diag([-8.0, -9.0, 3.0, 1.0])
    io.write(tmp_path / "oblong.nii.gz", io.Image(flat.values, affine, "HU"))
    oblong = ("simulate", tmp_path / "oblong.nii.gz", "-o", tmp_path / "z.npz")
    assert "must be square" in refused(*oblong)


def with_noise(arrays, noise):
    return np.asarray(json.dumps(json.loads(str(arrays["meta"])) | {"noise": noise}))


def test_bad_sinograms_are_one_line(refused, tmp_path):
    out, sino = tmp_path / "out", tmp_path / "sino.npy"
    given = ("--pixel-mm", 8, "--size", 32, "--sampler", "fbp")
    np.save(sino, np.ones((6, 46)))
    assert "--sigma or --counts" in refused("solve", sino, "-o", out, *given)
    noisy = (*given, "--sigma", 0.1)
    both = (*noisy, "--counts", 1e5)
    assert "--sigma or --counts" in refused("solve", sino, "-o", out, *both)
    negative = (*given, "--sigma", -0.1)
    assert "sigma must be > 0" in refused("solve", sino, "-o", out, *negative)
    degrees = tmp_path / "degrees.npy"
    np.save(degrees, np.arange(0, 180, 30.0))
    wrong = ("--angles", degrees)
    assert "torch.deg2rad" in refused("solve", sino, "-o", out, *noisy, *wrong)
    np.save(degrees, np.zeros(7))
    assert "one angle for each" in refused("solve", sino, "-o", out, *noisy, *wrong)
    np.save(sino, np.full((6, 46), np.inf))
    assert "NaN or infinite" in refused("solve", sino, "-o", out, *noisy)
    np.save(sino, np.zeros(46))
    assert "(views, detectors)" in refused("solve", sino, "-o", out, *noisy)
    sino.write_bytes(b"\x93NUMPY")
    assert f"cannot read {sino}" in refused("solve", sino, "-o", out, *noisy)


def test_a_fault_while_writing_leaves_nothing(refused, measured, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr("invsolve.cli.files.save_page", fail)
    words = ("solve", measured, "-o", tmp_path / "out", "--sampler", "fbp")
    assert "report.html: No space left" in refused(*words)


def test_a_missing_extra_is_named(refused, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("solve", measured, "-o", tmp_path / "out", "--sampler", "fbp")
    assert "pip install 'invsolve[io]'" in refused(*words)


def test_a_fault_of_the_program_is_told_apart(refused, monkeypatch):
    monkeypatch.setattr("invsolve.priors.available", lambda: 1 / 0)
    assert "ZeroDivisionError" in refused("priors", code=1)
    with pytest.raises(ZeroDivisionError):
        main(["priors", "--debug"])


def test_every_command_shows_an_example(capsys):
    for command in ("demo", "simulate", "solve", "train", "priors", "doctor"):
        assert main([command, "--help"]) == 0
        assert f"Example: invsolve {command}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("invsolve ")


def test_the_doctor_never_fails(capsys, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("broken\ndriver")

    monkeypatch.setattr("invsolve.cli.doctor.subprocess.run", fail)
    monkeypatch.setattr("torch.cuda.is_available", fail)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CUDA        no: broken driver" in out and "python" in out


def test_the_names_are_the_documented_ones():
    assert set(SAMPLERS) == {
        *("reddiff", "dds", "diffpir", "dps", "tmpd", "pigdm", "mmps", "ddnm", "daps"),
        *("ddrm", "score_sde", "pnp", "red", "ensemble"),
        *("dds3d", "mbir", "dfm", "stsl", "psld", "ldps", "resample"),
        *("tv", "sirt", "cgls", "fbp"),
    }
    assert set(OPERATORS) == {"ct", "fan", "inpaint", "blur", "superres", "mri"}
    assert set(NOISES) == {"gaussian", "poisson", "transmission", "rician"}


def test_as_a_program(tmp_path):
    words = [sys.executable, "-m", "invsolve.cli", "solve", "none.npz", "-o", "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- priors evaluate


@pytest.fixture
def recipe(phantom, tmp_path, monkeypatch):
    """A configuration that reads the phantom as training and as validation images."""
    monkeypatch.setenv("INVSOLVE_DATA", str(phantom.parent))
    path = tmp_path / "recipe.toml"
    path.write_text(
        'name = "tiny"\n[data]\ntrain = "."\nval = "."\nunit = "HU"\nscale = 0.02\n'
    )
    return path


def test_priors_evaluate_writes_a_page_and_its_numbers(prior, recipe, tmp_path):
    page = tmp_path / "card.html"
    run("priors", "evaluate", prior, recipe, "-o", page, "--images", 2, "--samples", 2)
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert len(numbers["denoising"]) == 6 and numbers["counts"]["held_out"] == 2
    assert "data:image/png;base64," in page.read_text("utf-8")


def test_priors_evaluate_refuses_what_it_cannot_use(refused, prior, recipe, tmp_path):
    card = tmp_path / "card.html"
    refused("priors", "evaluate", prior, tmp_path / "no.toml", "-o", card)
    refused("priors", "evaluate", "nobody", recipe, "-o", card)
    refused("priors", "evaluate", prior, recipe, "-o", tmp_path / "card.txt")
