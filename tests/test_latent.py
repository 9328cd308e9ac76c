"""Latent priors: what codes and loads them, and the samplers that work in latents."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import image_prior, real, with_noise
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import invsolve as iv
from invsolve import InverseProblem, bf16, samplers
from invsolve.operators import (
    Downsample,
    GaussianNoise,
    Greyscale,
    Mask,
    Operator,
    PhaseRetrieval,
)
from invsolve.priors import Affine, AffineMap, EDMPrior, GaussianPrior, UNetConfig
from invsolve.priors.latent import (
    Autoencoder,
    AutoencoderConfig,
    Conditioned,
    KLAutoencoder,
    LatentPrior,
    Tiled,
    latent_card,
    load_card,
    load_latent,
)
from invsolve.priors.unet import UNet
from invsolve.random import spawn
from invsolve.samplers import daps, dps, pnp, reddiff
from invsolve.samplers.latents import Decoded, codec, ddpm_levels, in_latents
from invsolve.samplers.ldps import ldps
from invsolve.samplers.psld import gluing_pull, psld
from invsolve.samplers.resample import resample
from invsolve.samplers.stsl import stsl
from invsolve.volumes import peak_bytes


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Rotation(Autoencoder):
    """z = Q x on each block of 2×2 pixels, with Q orthogonal: Dec is Enc's inverse."""

    Q: Tensor

    def __init__(self, decoder_only: bool = False) -> None:
        super().__init__()
        self.channels, self.latent_channels, self.factor = 1, 4, 2
        g = Generator().manual_seed(5)
        Q = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
        self.register_buffer("Q", Q)
        self.decoder_only = decoder_only

    def encode(self, x: Tensor, generator: Any = None) -> Tensor:
        if self.decoder_only:
            return super().encode(x)
        blocks = F.pixel_unshuffle(x, 2)
        return torch.einsum("kc,nchw->nkhw", self.Q.to(x), blocks)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(torch.einsum("kc,nkhw->nchw", self.Q.to(z), z), 2)


ROTATION = Rotation()
PIXELS = image_prior(Generator().manual_seed(1))  # of 1×4×4


def rotated(prior: GaussianPrior) -> GaussianPrior:
    """The law of Enc(x) where x has this one."""
    basis = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
    E = ROTATION.encode(basis).flatten(1).T
    mean = ROTATION.encode(prior.mean[None])[0]
    return GaussianPrior(mean, E @ prior.cov @ E.T, prior.sigma_min, prior.sigma_max)


LATENT = LatentPrior(rotated(PIXELS), ROTATION)


def problem(A: Any = None, n: int = 3) -> InverseProblem:
    A = A or Downsample(2, (4, 4))
    g = Generator().manual_seed(2)
    x = PIXELS.sample(n, generator=g)
    noise = GaussianNoise(0.1)
    return InverseProblem(noise.sample(A(x), generator=g), A, noise)


# --- the prior


def test_a_latent_prior_speaks_of_images_and_denoises_latents() -> None:
    map = AffineMap(0.5, 0.25)
    prior = LatentPrior(rotated(PIXELS), ROTATION, map)
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    z = prior.encode(x)
    close(z, ROTATION.encode((x - 0.25) / 0.5))
    close(prior.decode(z), x)
    assert prior.latent_like(x).shape == z.shape
    close(prior.denoise(z, real(0.3)), rotated(PIXELS).denoise(z, real(0.3)))
    inner, told = prior.normalised
    assert told == map
    close(codec(inner).encode(x), ROTATION.encode(x))


def test_gradients_go_through_encoder_decoder_and_network() -> None:
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return LATENT.decode(LATENT.denoise(LATENT.encode(x), real(0.5)))

    assert torch.autograd.gradcheck(there_and_back, x)


def small_vae() -> KLAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = AutoencoderConfig(3, 4, (8, 8), 1, 2, 4).build()
    return net.eval().requires_grad_(False)


def test_the_encoder_gives_the_mean_unless_it_is_to_draw(generator: Generator) -> None:
    net = small_vae()
    x = torch.rand(1, 3, 16, 16, generator=generator)
    net.scale.fill_(2.0)
    net.shift.fill_(0.3)
    q = net.posterior(x)
    close(net.encode(x), (q.mean - 0.3) * 2, 1e-6)
    many = x.expand(4000, -1, -1, -1)[:, :, :8, :8]
    q = net.posterior(many[:1])
    drawn = net.encode(many, generator)
    expected = (q.mean[0] - 0.3) * 2
    error = 2 * q.std[0] / len(many) ** 0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(drawn.std(0), 2 * q.std[0], rtol=0.1, atol=0)


def test_checkpointing_changes_no_number(generator: Generator) -> None:
    net = small_vae()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(4, (8, 8), 1, 1, 4))
    edm = EDMPrior(unet.eval().requires_grad_(False), 1.0, 0.01, 20.0)
    z = torch.randn(2, 4, 4, 4, generator=generator, requires_grad=True)
    grads, saved = [], []
    for checkpointing in (False, True):
        prior = LatentPrior(edm, net, checkpointing=checkpointing)
        kept: list[int] = []

        def keep(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = prior.decode(prior.denoise(z, torch.tensor(0.7)))
        grads.append(torch.autograd.grad(x.square().sum(), z)[0])
        saved.append(sum(kept))
    close(grads[0], grads[1], 1e-6)
    assert saved[1] < saved[0] / 20


def test_a_draw_has_the_same_gradient_with_checkpointing(generator: Generator) -> None:
    """Computed again, its noise would be another: it is not."""
    edm, x = EDMPrior(nn.Identity()), torch.rand(1, 3, 16, 16, generator=generator)
    x.requires_grad_()
    grads = []
    for checkpointing in (False, True):
        prior = LatentPrior(edm, small_vae(), checkpointing=checkpointing)
        z = prior.encode(x, Generator().manual_seed(7))
        grads.append(torch.autograd.grad(z.square().sum(), x)[0])
    close(grads[0], grads[1], 1e-6)


def test_coding_in_bf16_is_near_and_its_results_stay_in_float32(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU", True)
    edm, x = EDMPrior(nn.Identity()), torch.rand(2, 3, 16, 16, generator=generator)
    plain = LatentPrior(edm, small_vae())
    faster, map = LatentPrior(edm, small_vae(), bf16_coding=True).normalised
    assert isinstance(faster, LatentPrior)
    z = plain.encode(map.inverse(x))
    drawn = [p.encode(x, Generator().manual_seed(7)) for p in (plain, faster)]
    pairs = [
        (plain.encode(x), faster.encode(x)),
        (plain.decode(z), faster.decode(z)),
        (drawn[0], drawn[1]),
    ]
    for a, b in pairs:
        assert b.dtype == torch.float32
        assert 0 < (a - b).std() < 0.02 * a.std()
    u = x.clone().requires_grad_()
    grads = [torch.autograd.grad(p.encode(u).sum(), u)[0] for p in (plain, faster)]
    close(grads[0], grads[1], 0.05)


# --- tiles


class Convolutions(Autoencoder):
    """Latents that see 7 pixels further than their own, and pixels likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.latent_channels, self.factor = 1, 2, 2
        double: Any = {"dtype": torch.float64}
        self.into = nn.Sequential(
            nn.Conv2d(1, 2, 4, 2, 1, **double), nn.Conv2d(2, 2, 5, 1, 2, **double)
        )
        self.out = nn.Sequential(
            nn.Conv2d(2, 2, 5, 1, 2, **double),
            nn.ConvTranspose2d(2, 1, 4, 2, 1, **double),
        )

    def encode(self, x: Tensor, generator: Any = None) -> Tensor:
        return self.into(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.out(z)


@pytest.mark.parametrize("shape", [(60, 80), (48, 48), (32, 70), (150, 20)])
def test_tiles_are_seamless_where_the_network_sees_no_further(
    shape: tuple[int, int], generator: Generator
) -> None:
    """With a receptive field within a quarter of the overlap nothing differs at all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = Convolutions()
    tiled, narrow = Tiled(whole, 48, 24), Tiled(whole, 48, 4)
    x = torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        z = whole.encode(x)
        close(tiled.encode(x), z)
        close(tiled.decode(z), whole.decode(z))
        # With too small an overlap the seams are seen, if there are any.
        seams = (narrow.decode(z) - whole.decode(z)).abs().amax((0, 1))
        assert (float(seams.max()) > 1e-3) == (max(shape) > 48)


def test_tiles_have_gradients_and_bounds() -> None:
    tiled = Tiled(ROTATION, 4, 2)
    z = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiled.decode, z)
    for tile, overlap in ((5, 2), (8, 3), (8, 6), (8, 0)):
        with pytest.raises(ValueError, match="multiples of 2 and the overlap at most"):
            Tiled(ROTATION, tile, overlap)


def test_the_memory_of_tiles_is_that_of_one_with_gradients_too() -> None:
    """The peak of a backward pass does not grow with the image as the untiled one's."""
    whole = small_vae()
    tiled = Tiled(whole, 32, 16)

    def peak(coding: Autoencoder, side: int) -> int:
        def run() -> None:
            x = torch.zeros(1, 3, side, side, requires_grad=True)
            y = coding.decode(coding.encode(x))
            torch.autograd.grad(y.sum(), x)

        return peak_bytes(run)

    image = 3 * 96**2 * 4
    assert peak(whole, 96) > 8 * peak(whole, 32)
    assert peak(tiled, 96) < peak(whole, 32) + 8 * image


def test_checkpointing_around_tiles_computes_each_but_once_more(
    generator: Generator,
) -> None:
    net = small_vae()
    edm, runs = EDMPrior(nn.Identity()), []
    net.vae.decoder.register_forward_pre_hook(lambda *_: runs.append(1))
    z = torch.randn(1, 4, 16, 8, generator=generator, requires_grad=True)
    grads = []
    for checkpointing in (False, True):
        runs.clear()
        prior = LatentPrior(edm, Tiled(net, 32, 16), checkpointing=checkpointing)
        grads.append(torch.autograd.grad(prior.decode(z).square().sum(), z)[0])
        assert len(runs) == 2 * 3
    close(grads[0], grads[1], 0)


# --- files


def test_a_card_of_our_own_comes_back(tmp_path: Path, generator: Generator) -> None:
    coding = AutoencoderConfig(3, 4, (8, 8), 1, 2, 4)
    network = UNetConfig(4, (8, 8), 1, 1, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, unet = coding.build(), UNet(network)
    vae.scale.copy_(torch.arange(1.0, 5.0).reshape(4, 1, 1))
    parts = {"autoencoder": vae, "network": unet}
    state = {
        f"{k}.{name}": v.contiguous()
        for k, net in parts.items()
        for name, v in net.state_dict().items()
    }
    save_file(state, tmp_path / "small.safetensors")
    map = AffineMap(0.5, 0.5)
    card = latent_card(
        "small", coding, network, sigma_data=1.0, map=map, unit="", training={}
    )
    path = tmp_path / "small.json"
    path.write_text(json.dumps(card))
    prior = load_card(path)
    x = torch.rand(1, 3, 16, 16, generator=generator)
    z = vae.encode(2 * x - 1)
    close(prior.encode(x), z, 1e-6)
    close(prior.decode(z), vae.decode(z) / 2 + 0.5, 1e-6)
    sigma = torch.tensor(0.4)
    close(prior.denoise(z, sigma), EDMPrior(unet, 1.0).denoise(z, sigma), 1e-6)
    assert (prior.info.channels, prior.info.multiple_of) == (3, 8)
    for key in ("autoencoder", "sigma_data", "scale"):
        path.write_text(json.dumps({k: v for k, v in card.items() if k != key}))
        with pytest.raises(ValueError, match=f"its card lacks '{key}'"):
            load_card(path)
    path.write_text(json.dumps({**card, "family": "edm-unet"}))
    with pytest.raises(ValueError, match="no latent prior's card"):
        load_card(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not an object"):
        load_card(path)


def randomised(net: Any) -> Any:
    """With every parameter random: some begin as zeros, and would hide a mistake."""
    g = Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=g))
    return net.eval()


def folder_of(
    path: Path,
    *,
    conditional: bool = True,
    scheduler: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """A tiny latent diffusion model, as diffusers saves it, and its parts."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    code = AutoencoderKL(
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        **{"scaling_factor": 0.18215, **blocks, **(vae or {})},
    )
    shared = {"in_channels": 3, "out_channels": 3, **blocks}
    if conditional:
        net: Any = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=6,
            attention_head_dim=2,
            **{**shared, **(unet or {})},
        )
    else:
        net = UNet2DModel(
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            layers_per_block=2,
            add_attention=False,
            **{**shared, **(unet or {})},
        )
    told = {"beta_schedule": "scaled_linear", "clip_sample": False, **(scheduler or {})}
    schedule = DDIMScheduler(**told)
    randomised(code).save_pretrained(path / "vae")
    randomised(net).save_pretrained(path / "unet")
    schedule.save_pretrained(path / "scheduler")
    return code, net, schedule


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("shape", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_parity_with_diffusers(
    kind: str, conditional: bool, shape: str, tmp_path: Path, generator: Generator
) -> None:
    told = {"prediction_type": kind, "beta_schedule": shape, "beta_end": 0.012}
    code, net, schedule = folder_of(tmp_path, conditional=conditional, scheduler=told)
    prior = load_latent(tmp_path)
    x = torch.rand(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        z = code.encode(2 * x - 1).latent_dist.mean * 0.18215
        close(prior.encode(x), z, 1e-5)
        close(prior.decode(z), code.decode(z / 0.18215).sample / 2 + 0.5, 1e-5)
        # In double precision, since t is found from σ and the networks are steep in it.
        net.double()
        vars(prior.prior)["net"].double()
        levels = vars(prior.prior)["log_sigmas"].exp()
        table = schedule.alphas_cumprod
        torch.testing.assert_close(
            1 / (1 + levels**2), table.double(), rtol=1e-3, atol=1e-6
        )
        schedule.set_timesteps(1000)
        for t in (50, 300, 700):
            abar = 1 / (1 + levels[t] ** 2)
            x_t = abar.sqrt() * z.double() + (1 - abar).sqrt()
            more = (torch.zeros(2, 1, 6).double(),) if conditional else ()
            out = net(x_t, t, *more).sample
            expected = schedule.step(out, t, x_t).pred_original_sample
            D = prior.denoise(x_t / abar.sqrt(), levels[t])
            close(D / expected.abs().max(), expected / expected.abs().max(), 1e-5)


def test_shift_means_and_spreads_of_latents_are_read(
    tmp_path: Path, generator: Generator
) -> None:
    x = torch.rand(1, 3, 16, 16, generator=generator)
    code, _, _ = folder_of(
        tmp_path / "a", vae={"shift_factor": 0.6, "scaling_factor": 2.0}
    )
    with torch.no_grad():
        mean = code.encode(2 * x - 1).latent_dist.mean
    close(load_latent(tmp_path / "a").encode(x), (mean - 0.6) * 2.0, 1e-5)
    told = {"latents_mean": [0.1, 0.2, 0.3], "latents_std": [1.0, 2.0, 4.0]}
    code, _, _ = folder_of(tmp_path / "b", vae={"scaling_factor": 0.5, **told})
    with torch.no_grad():
        mean = code.encode(2 * x - 1).latent_dist.mean
    means, stds = (torch.tensor(told[k]).reshape(3, 1, 1) for k in told)
    close(load_latent(tmp_path / "b").encode(x), (mean - means) * 0.5 / stds, 1e-5)


def test_old_names_and_shards(tmp_path: Path, generator: Generator) -> None:
    """Stable Diffusion 1 names its attention otherwise; large files come in parts."""
    from safetensors.torch import load_file

    folder_of(tmp_path)
    x = torch.rand(1, 3, 16, 16, generator=generator)
    expected = load_latent(tmp_path).encode(x)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = load_file(file), 0
    for new, name in old.items():
        for key in [k for k in state if "attentions" in k and f".{new}." in k]:
            state[key.replace(f".{new}.", f".{name}.")] = state.pop(key)
            renamed += 1
    assert renamed == 16
    file.unlink()
    parts = {"one.safetensors": {}, "two.safetensors": {}}
    for i, (key, value) in enumerate(state.items()):
        list(parts.values())[i % 2][key] = value
    for name, part in parts.items():
        save_file(part, file.with_name(name))
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    file.with_name(file.name + ".index.json").write_text(json.dumps(index))
    close(load_latent(tmp_path).encode(x), expected, 1e-6)


def test_guidance(tmp_path: Path, generator: Generator) -> None:
    """∅ + w (c − ∅); w = 1 asks once, and what is told is heard."""
    _, net, schedule = folder_of(tmp_path)
    c, null = torch.randn(2, 5, 6, generator=generator)
    z = torch.randn(2, 3, 8, 8, generator=generator)
    sigma = (1 / schedule.alphas_cumprod[500] - 1).sqrt()

    def at(**told: Any) -> Tensor:
        return load_latent(tmp_path, **told).denoise(z, sigma)

    told = {"condition": {"encoder_hidden_states": c}}
    nothing = {"encoder_hidden_states": null}
    a, b = at(**told), at(condition=nothing)
    assert float((a - b).abs().max()) > 1e-4
    close(at(**told, null=nothing, guidance=3.0), b + 3 * (a - b), 1e-3)
    asked = []
    net.register_forward_hook(lambda *_: asked.append(1))
    Conditioned(net, told["condition"])(z, torch.zeros(2))
    assert len(asked) == 1


def test_class_labels(tmp_path: Path, generator: Generator) -> None:
    folder_of(tmp_path, conditional=False, unet={"num_class_embeds": 3})
    z, sigma = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor(1.0)

    def at(label: int) -> Tensor:
        told = {"class_labels": torch.tensor(label)}
        return load_latent(tmp_path, condition=told).denoise(z, sigma)

    assert float((at(0) - at(1)).abs().max()) > 1e-4
    close(at(2), at(2), 0)


def refused(folder: Path, match: str, **told: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_latent(folder, **told)
    assert "\n" not in str(caught.value)


def rewrite(file: Path, **told: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))


def test_what_a_folder_is_refused_for(tmp_path: Path) -> None:
    refused(tmp_path, "cannot read the configuration .*No such file")
    folder_of(tmp_path, conditional=False)
    refused(tmp_path, "takes no text: leave the prompt out", condition="a cat")
    refused(tmp_path, "unconditional, .* leave guidance out", guidance=2.0)
    told = {"encoder_hidden_states": torch.zeros(1, 6)}
    refused(tmp_path, "unconditional: leave the embedding out", condition=told)
    refused(
        tmp_path, "a condition 'text' is unknown", condition={"text": torch.ones(1)}
    )
    vae = tmp_path / "vae" / "config.json"
    rewrite(vae, _class_name="VQModel")
    refused(tmp_path, "its VQModel is not known here: known are AutoencoderKL")
    rewrite(vae, _class_name="AutoencoderKL", latent_channels=4)
    refused(tmp_path, "the weights do not fit the network")
    rewrite(vae, latent_channels=3)
    schedule = tmp_path / "scheduler" / "scheduler_config.json"
    rewrite(schedule, prediction_type="noise")
    refused(tmp_path, "its prediction type 'noise'")
    rewrite(schedule, prediction_type="epsilon", beta_schedule="wavy")
    refused(tmp_path, "noise schedule 'wavy' is unknown")
    rewrite(schedule, _class_name="FlowMatchEulerDiscreteScheduler")
    refused(tmp_path, "is of a flow")
    rewrite(schedule, _class_name="DDIMScheduler", beta_schedule="linear")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(tmp_path, "cannot read the checkpoint")
    file.unlink()
    refused(tmp_path, "no weights")


def test_a_prompt_needs_its_encoder(tmp_path: Path) -> None:
    folder_of(tmp_path)
    assert "no text encoder" in load_latent(tmp_path).decisions[0]
    pytest.importorskip("transformers")
    refused(tmp_path, "which is not in the folder", condition="a cat")


def test_guidance_needs_the_null_condition() -> None:
    with pytest.raises(ValueError, match="needs the null condition"):
        Conditioned(nn.Identity(), {}, guidance=2.0)


# --- the samplers

EVERY: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (ldps, {"steps": 6, "zeta": 0.3}),
    (psld, {"steps": 6, "omega": 0.3, "gamma": 0.1}),
    (psld, {"steps": 6, "omega": 0.3, "gamma": 0.1, "glue": "pinv", "eta": 0.5}),
    (stsl, {"steps": 4, "averages": 2, "lam": 0.1}),
    (stsl, {"steps": 4, "averages": 1, "lam": 0.1, "inversion": "ddim"}),
    (stsl, {"steps": 4, "averages": 1, "lam": 0.1, "init": "pinv", "trace": "bound"}),
    (resample, {"steps": 6, "every": 2}),
    (resample, {"steps": 6, "every": 3, "consistency": "latent"}),
]
PLAIN: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (reddiff, {"steps": 6, "optimizer": "sgd", "lr": 0.01, "normalize": "bayes"}),
    (reddiff, {"steps": 6, "optimizer": "sgd", "init": "zeros", "antithetic": True}),
    (dps, {"steps": 6, "zeta": 0.3}),
    (daps, {"steps": 3, "inner": "langevin"}),
    (pnp, {"steps": 6, "method": "pgd", "lr": 0.005}),
]
"""Samplers of images that know nothing of latents."""


@pytest.mark.parametrize(("sampler", "options"), EVERY)
def test_a_rotation_changes_nothing(
    sampler: Callable[..., Tensor], options: dict[str, Any], generator: Generator
) -> None:
    """With Enc orthogonal the latent sampler is the pixel sampler on rotated noise."""
    given = problem(Mask(torch.rand(1, 4, 4, generator=generator).round().double()))
    drawn: list[Tensor] = []

    def draws(like: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        n = torch.randn(40, *like.shape, generator=generator, dtype=torch.float64)
        drawn.append(n)
        return torch.stack([make(v) for v in n])

    x = given.image_like()
    pixel = count(sampler, given, PIXELS, options)
    noise = draws(x, lambda v: v)[:pixel]
    a = with_noise(noise, sampler, given, PIXELS, **options)
    rotated_noise = torch.stack([ROTATION.encode(v) for v in noise])
    b = with_noise(rotated_noise, sampler, given, LATENT, **options)
    if options.get("consistency") == "latent":  # Adam goes by coordinates
        assert float((a - b).abs().max()) < 1.0
    else:
        close(a, b, 1e-8)


@pytest.mark.parametrize(("sampler", "options"), PLAIN)
def test_a_sampler_of_images_works_in_latents(
    sampler: Callable[..., Tensor], options: dict[str, Any], generator: Generator
) -> None:
    """With Enc orthogonal it is the sampler itself, on rotated noise."""
    given = problem(Mask(torch.rand(1, 4, 4, generator=generator).round().double()))
    n = count(sampler, given, PIXELS, options)
    like = given.image_like()
    noise = torch.randn(n, *like.shape, generator=generator, dtype=torch.float64)
    a = with_noise(noise, sampler, given, PIXELS, **options)
    close(a, with_noise(noise, in_latents(sampler), given, PIXELS, **options))
    turned = [ROTATION.encode(v) for v in noise]
    turned = torch.stack(turned) if turned else noise
    close(a, with_noise(turned, in_latents(sampler), given, LATENT, **options), 1e-8)


def test_solve_takes_a_sampler_of_images_to_latents(generator: Generator) -> None:
    given = problem()
    options: dict[str, Any] = {"steps": 5, "optimizer": "sgd", "lr": 0.01}
    prior = LatentPrior(rotated(PIXELS), ROTATION, AffineMap(0.5, 0.25))
    begin = torch.rand(3, 1, 4, 4, generator=generator).double()

    def run(seed: int = 0, **more: Any) -> iv.Solution:
        g = Generator().manual_seed(seed)
        return iv.solve(given, prior, partial(reddiff, **options), generator=g, **more)

    got = run(init=begin)
    assert (got.sampler, got.kind) == ("reddiff", "point_estimate")
    assert got.stats.network_forwards == 3 * 5
    close(got.samples, run(init=begin, chunk=1).samples, 1e-9)
    inner, map = prior.normalised
    own = in_latents(reddiff)(
        given.seen_through(map),
        inner,
        init=map.inverse(begin),
        generator=spawn(Generator().manual_seed(0), 3),
        **options,
    )
    close(got.samples[0], map(own), 1e-9)

    def coding(problem: InverseProblem, prior: Any, **_: Any) -> Tensor:
        """A user's own that encodes by itself is as it is."""
        images = codec(prior)
        return images.decode(images.encode(problem.image_like()))

    g = Generator()
    assert iv.solve(given, prior, coding, generator=g).samples.shape[-2:] == (4, 4)


def test_what_the_autoencoder_loses_of_the_first_image_is_kept(
    generator: Generator,
) -> None:
    """Enc and Dec lose half of an image, and a descent that stands still nothing."""
    net = LatentPrior(EDMPrior(nn.Identity()), small_vae())
    x = torch.rand(2, 3, 16, 16, generator=generator)
    given = InverseProblem(Greyscale()(x), Greyscale(), GaussianNoise(0.1))
    seen: list[Tensor] = []

    def still(problem: InverseProblem, prior: Any, *, init: Tensor) -> Tensor:
        seen.append(problem.operator(init))
        return init

    made = in_latents(still)(given, net, init=x)
    assert float((net.decode(net.encode(x)) - x).std()) > 0.3 * float(x.std())
    close(made, x, 1e-5)
    close(seen[0], given.y, 1e-5)


def test_what_is_measured_of_latents_has_its_derivative(generator: Generator) -> None:
    """A jump of z moves A(Dec(z)) by J, of which the pull-back is the adjoint."""
    given = problem(PhaseRetrieval((4, 4)))
    net = small_vae().double()
    one = Decoded(given.operator, LATENT)
    z, v = torch.randn(2, 3, 4, 2, 2, generator=generator).double()
    y = torch.randn(one(z).shape, generator=generator).double()
    step = 1e-6
    moved = (one(z + step * v) - one(z - step * v)) / (2 * step)
    close((moved * y).sum(), (v * one.vjp(z, y)).sum(), 1e-6)
    grey = Decoded(Greyscale(), LatentPrior(EDMPrior(nn.Identity()), net))
    z = torch.randn(2, 4, 4, 4, generator=generator).double()
    y = torch.randn(grey(z).shape, generator=generator).double()
    own = Operator.vjp(grey, z, y)
    close(grey.vjp(z, y), own, 1e-8)


def test_a_descent_in_latents_decodes_once_a_step(generator: Generator) -> None:
    """A(Dec(z)) and what is pulled back from it are of one pass of the decoder."""
    net, passes = small_vae(), []
    net.vae.decoder.register_forward_hook(lambda *_: passes.append(1))
    A = Decoded(Greyscale(), LatentPrior(EDMPrior(nn.Identity()), net))
    z = torch.randn(2, 4, 4, 4, generator=generator)
    given = InverseProblem(torch.zeros_like(A(z)), A, GaussianNoise(1.0))
    passes.clear()
    grad = given.residual_grad(z)
    assert len(passes) == 1
    close(grad, A.vjp(z, A(z)), 1e-5)
    close(given.misfit_grad(z), grad, 1e-5)
    assert len(passes) == 4


def count(
    sampler: Callable[..., Tensor], given: InverseProblem, prior: Any, options: Any
) -> int:
    """How many draws of noise a sampler makes."""
    endless = Endless(given.image_like())
    with pytest.raises(AssertionError, match="fewer draws"):
        with_noise(endless, sampler, given, prior, **options)  # pyright: ignore[reportArgumentType]
    return endless.given - 1


class Endless:
    """Noise without end, that knows how much was taken."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.given = like, 0

    def __iter__(self) -> "Endless":
        return self

    def __next__(self) -> Tensor:
        self.given += 1
        g = Generator().manual_seed(self.given)
        return torch.randn(self.like.shape, generator=g, dtype=self.like.dtype)


def test_ldps_of_images_is_dps(generator: Generator) -> None:
    given = problem()
    sigmas = real([20.0, 5.0, 1.0, 0.1])
    noise = torch.randn(4, *given.image_like().shape, generator=generator).double()
    options = {"sigmas": sigmas, "zeta": 0.4}
    extra = torch.randn(1, *given.image_like().shape, generator=generator).double()
    noise = torch.cat([noise, extra])
    a = with_noise(noise, ldps, given, PIXELS, **options)
    close(a, with_noise(noise, dps, given, PIXELS, **options))


def test_psld_without_glue_is_ldps(generator: Generator) -> None:
    given = problem()
    sigmas = real([20.0, 5.0, 1.0, 0.1])
    like = LATENT.latent_like(given.image_like())
    noise = torch.randn(1, *like.shape, generator=generator).double()
    a = with_noise(noise, psld, given, LATENT, sigmas=sigmas, gamma=0.0, omega=0.4)
    b = with_noise(noise, ldps, given, LATENT, sigmas=sigmas, zeta=0.4, eta=0.0)
    close(a, b)
    c = with_noise(noise, psld, given, LATENT, sigmas=sigmas, gamma=0.1, omega=0.4)
    assert float((a - c).abs().max()) > 1e-3


def test_the_gluing_term(generator: Generator) -> None:
    """It is ‖Aᴴr‖ of a projection, and 0 where the image fits; its gradients are right."""
    m = torch.rand(1, 4, 4, generator=generator).round().double()
    given = problem(Mask(m))

    def at(x: Tensor, z0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gluing_pull(given, LATENT, x, z0, given.linear.adjoint)

    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    z0 = LATENT.encode(x)
    to_x, to_z0, norm = at(x, z0)
    close(norm, (m * (given.y - x)).flatten(1).norm(dim=1))
    fits = m * given.y + (1 - m) * x
    to_x, to_z0, norm = at(fits, LATENT.encode(fits))
    assert not to_x.any() and not to_z0.any() and not norm.any()
    # Away from consistency, against finite differences.
    z0 = z0 + 0.3 * torch.randn(z0.shape, generator=generator, dtype=torch.float64)
    to_x, to_z0, _ = at(x, z0)
    dx, dz = torch.randn_like(x), torch.randn_like(z0)
    h = 1e-6
    slope = (at(x + h * dx, z0 + h * dz)[2] - at(x - h * dx, z0 - h * dz)[2]) / (2 * h)
    close(slope, (to_x * dx).flatten(1).sum(1) + (to_z0 * dz).flatten(1).sum(1), 1e-7)


def test_resample_lands_on_data_that_allow_one_image(generator: Generator) -> None:
    """With A invertible and hardly any noise the last move gives x itself."""
    A = Mask(torch.full((1, 4, 4), 2.0, dtype=torch.float64))
    x = PIXELS.sample(3, generator=generator)
    given = InverseProblem(A(x), A, GaussianNoise(1e-6))
    close(resample(given, LATENT, steps=3, generator=generator), x, 1e-6)
    options = {"consistency": "latent", "descent_steps": 3000, "steps": 3, "every": 9}
    close(resample(given, LATENT, **options, generator=generator), x, 1e-3)


def test_levels_are_the_ddpms_within_the_prior_s() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    levels = ddpm_levels(PIXELS, like, 100, None)
    assert len(levels) == 100 and (levels.diff() < 0).all()
    narrow = GaussianPrior(PIXELS.mean, PIXELS.cov, 0.05, 10.0)
    levels = ddpm_levels(narrow, like, 2000, None)
    assert len(levels.unique()) == 2000
    assert 0.05 <= float(levels[-1]) < 0.06 and 9.9 < float(levels[0]) <= 10.0


@pytest.mark.parametrize(("sampler", "options"), EVERY)
def test_solve_seeds_chunks_and_counts(
    sampler: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    """In the image's unit, with a stream for each sample; seed 0 is a seed."""
    map = AffineMap(0.5, 0.5)
    prior = LatentPrior(rotated(PIXELS), ROTATION, map)
    A = Downsample(2, (4, 4))
    g = Generator().manual_seed(2)
    x = map(PIXELS.sample(2, generator=g))
    noise = GaussianNoise(0.05)
    given = InverseProblem(noise.sample(A(x), generator=g), A, noise)

    def run(seed: int, **more: Any) -> iv.Solution:
        g = Generator().manual_seed(seed)
        return iv.solve(given, prior, sampler, generator=g, **options, **more)

    whole = run(0, samples=3)
    assert whole.samples.shape == (3, 2, 1, 4, 4) and whole.kind == "steered"
    close(whole.samples, run(0, samples=3, chunk=2).samples, 1e-9)
    close(whole.samples[:1], run(0).samples, 1e-9)
    other = run(1, samples=3).samples
    if (
        options.get("inversion") == "ddim"
    ):  # nothing is drawn but the trace's n, in vain
        close(whole.samples, other, 0)
    else:
        assert float((whole.samples - other).abs().max()) > 1e-6
    steps, n = options["steps"], 6
    K = options.get("averages", 0)
    F = steps * (2 * K + 1) + (steps - 1) * (options.get("inversion") == "ddim")
    B = {ldps: steps, psld: steps, stsl: 3 * steps * K, resample: 0}[sampler]
    assert whole.stats.network_forwards == n * F
    assert whole.stats.network_backwards == n * B


# --- refusals


def says(
    match: str, sampler: Callable[..., Tensor], given: Any, prior: Any, **more
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        iv.solve(given, prior, sampler, generator=Generator(), **more)
    assert "\n" not in str(caught.value)


def test_refusals() -> None:
    given = problem()
    blind = LatentPrior(rotated(PIXELS), Rotation(decoder_only=True))
    for sampler, more in ((psld, {}), (stsl, {}), (resample, {"every": 1})):
        says("no encoder", sampler, given, blind, steps=2, **more)
    without: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (ldps, {}),
        (stsl, {"init": "gaussian"}),
    ]
    for sampler, more in without:
        iv.solve(given, blind, sampler, generator=Generator(), steps=2, **more)
    with pytest.raises(ValueError, match="denoises latents of 4 channels, not images"):
        dps(given, LATENT, generator=Generator(), steps=2)
    for sampler in (samplers.dds, samplers.mmps):
        says(
            "of latents, through a decoder, none is: use reddiff",
            sampler,
            given,
            LATENT,
            steps=2,
        )
    odd = InverseProblem(
        torch.zeros(1, 1, 5, 4).double(), Mask(torch.ones(5, 4)), given.noise
    )
    says("needs image sizes divisible by 2, got 5×4", ldps, odd, LATENT)
    two = InverseProblem(
        torch.zeros(1, 2, 4, 4).double(), Mask(torch.ones(4, 4)), given.noise
    )
    says("have 1 channel", ldps, two, LATENT)
    nonlinear = InverseProblem(
        torch.ones(1, 1, 8, 8).double(), PhaseRetrieval((4, 4)), given.noise
    )
    for sampler in (psld, stsl, resample):
        says("needs a linear operator", sampler, nonlinear, LATENT, steps=2)
    iv.solve(nonlinear, LATENT, ldps, generator=Generator(), steps=2)
    with pytest.raises(ValueError, match=r"through invsolve\.solve"):
        codec(Affine(LATENT, AffineMap(2.0, 0.0)))


def test_the_latents_size_rule_is_told_in_pixels() -> None:
    unet = UNet(UNetConfig(4, (8, 8), 1, 1, 4))
    prior = LatentPrior(EDMPrior(unet, multiple_of=2, channels=4), ROTATION)
    prior.check((1, 8, 4))
    with pytest.raises(ValueError, match="needs image sizes divisible by 4, got 6×4"):
        prior.check((1, 6, 4))


def test_what_else_the_latents_must_be_is_told_with_their_size() -> None:
    prior = LatentPrior(EDMPrior(nn.Identity(), channels=3), ROTATION)
    with pytest.raises(ValueError, match="images of 6×4 have latents of 3×2, and "):
        prior.check((1, 6, 4))


# --- the bundled one


def photograph() -> Tensor:
    """Squares of a photograph that no bundled prior was trained on, (4, 3, 64, 64)."""
    import skimage
    from skimage.io import imread

    x = imread(Path(skimage.__file__).parent / "data" / "astronaut.png")[..., :3]
    x = torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255
    x = F.interpolate(x, size=(320, 320), mode="bilinear", antialias=True)
    return torch.cat([x[..., a : a + 64, 96:160] for a in (0, 64, 128, 192)])


def psnr_over(x: Tensor, truth: Tensor) -> float:
    mse = (x.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float((-10 * mse.log10()).mean())


@pytest.fixture(scope="module")
def bundled() -> Any:
    return iv.priors.load("latent-photos-64")


def test_the_bundled_autoencoder_keeps_a_photograph(bundled: Any) -> None:
    """Eight numbers for 48: far better than the three means of each 4×4 pixels."""
    x = photograph()
    with torch.no_grad():
        coded = bundled.decode(bundled.encode(x))
    blocks = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="nearest")
    assert psnr_over(coded, x) > psnr_over(blocks, x) + 6


def test_the_bundled_prior_denoises_latents(bundled: Any) -> None:
    with torch.no_grad():
        z = bundled.encode(photograph())
        n = torch.randn(z.shape, generator=Generator().manual_seed(0))
        for sigma in (0.3, 1.0, 3.0):
            denoised = bundled.denoise(z + sigma * n, torch.tensor(sigma))
            # A Gaussian of the latents' own variance leaves v σ²/(v + σ²).
            v = z.var()
            gaussian = v * sigma**2 / (v + sigma**2)
            assert float((denoised - z).square().mean()) < 0.95 * float(gaussian)


def test_stsl_sharpens_a_photograph_with_it(bundled: Any) -> None:
    x = photograph()[:2]
    A, noise = Downsample(4, (64, 64)), GaussianNoise(0.02)
    y = noise.sample(A(x), generator=Generator().manual_seed(1))
    got = iv.solve(
        InverseProblem(y, A, noise),
        bundled,
        stsl,
        steps=20,
        lam=10.0,  # what docs/latent.md's search found, with earlier weights
        averages=2,
        trace="off",
        generator=Generator().manual_seed(0),
    )
    assert psnr_over(got.samples[0], x) > psnr_over(A.pinv(y), x)
