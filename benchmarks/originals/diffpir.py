"""yuanzhi-zhu/DiffPIR: its scripts, run whole, with their constants set.

The algorithm stands inside ``main()`` of each script, among the reading and writing of
files. The script is parsed, the constants assigned in ``main`` are replaced, and the
functions that read, write or score files are stood in for.
"""

import ast
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Generator, Tensor

from invsolve.priors import Prior

from . import EpsNet, checkout, noise


def run(
    root: Path,
    task: str,
    prior: Prior,
    image: Tensor,
    constants: dict[str, Any],
    *,
    generator: Generator,
    mask: Tensor | None = None,
    double: bool = False,
) -> dict[str, Any]:
    """Its result and what it measured, all in its own units.

    Args:
        root: the checkout.
        task: ``inpainting`` or ``deblur``.
        prior: the denoiser behind its network, for three channels in [−1, 1].
        image: (3, h, w) in [0, 1]; it sees it in 8 bits.
        constants: what to assign in ``main``.
        generator: where ``torch.randn_like`` draws from.
        mask: (h, w), of ``inpainting``.
        double: compute in double precision where it asks for single.

    Returns:
        ``x``, its image in [0, 1]; ``y`` in [0, 1], as it measured; ``kernel``;
        ``sigmas``, the levels it took.
    """
    wide = torch.Tensor.double
    source = (root / f"main_ddpir_{task}.py").read_text("utf-8")
    tree = _Assign(constants).visit(ast.parse(source))
    seen: dict[str, Any] = {"t": []}
    with checkout(root) as load:
        import scipy.interpolate

        if not hasattr(scipy.interpolate, "interp2d"):
            scipy.interpolate.interp2d = None  # imported there, and not used here
        script = types.ModuleType("script")
        exec(compile(ast.fix_missing_locations(tree), str(root), "exec"), vars(script))
        factory = load("guided_diffusion.script_util")
        diffusion = factory.create_gaussian_diffusion()
        betas = np.linspace(0.1 / 1000, 20 / 1000, 1000, dtype=np.float32)
        abar = torch.from_numpy(1 - betas).cumprod(0)
        net = EpsNet(prior, abar)

        def forward(x: Tensor, t: Tensor, **_: Any) -> Tensor:
            seen["t"].append(int(t[0]))
            return EpsNet.forward(net, x, t)

        setattr(net, "forward", forward)  # noqa: B010
        util = script.util

        def single2tensor4(array: Any) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            tensor = tensor.permute(2, 0, 1).float()[None]  # double, where patched
            seen.setdefault("tensors", []).append(tensor)
            return tensor

        def keep(x: Tensor) -> Any:
            seen["x"] = x.detach().clone()
            return np.zeros(1)

        script.utils_logger.logger_info = lambda *_, **__: None
        patched = {
            "mkdir": lambda *_: None,
            "imsave": lambda *_: None,
            "get_image_paths": lambda *_: ["image.png"],
            "imread_uint": lambda *_, **__: np.round(
                255 * image.permute(1, 2, 0).numpy()
            ).astype(np.uint8),
            "single2tensor4": single2tensor4,
            "tensor2uint": keep,
            "calculate_psnr": lambda *_, **__: 0.0,
        }
        for name, value in patched.items():
            setattr(util, name, value)
        replaced: dict[str, Any] = {
            "create_model_and_diffusion": lambda **_: (net, diffusion)
        }
        if mask is not None:
            replaced["mask_generator"] = lambda **_: lambda x: mask.expand(x.shape)
        vars(script).update(replaced)
        # One draw for the start and then, of three a step, only the last is used.
        with (
            noise(generator, lambda k: k == 0 or (k - 1) % 3 == 2),
            patch.object(torch, "load", lambda *_, **__: {}),
            patch.object(torch.Tensor, "float", wide if double else torch.Tensor.float),
        ):
            script.main()
    levels = abar.double()[torch.tensor(seen["t"])]
    return {
        "x": seen["x"],
        "y": seen["tensors"][0],
        "kernel": seen["tensors"][1] if task == "deblur" else None,
        "sigmas": (1 / levels - 1).sqrt(),
    }


class _Assign(ast.NodeTransformer):
    """Other values for plain assignments inside ``main``."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.left = dict(constants)

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        (target,) = node.targets
        if isinstance(target, ast.Name) and target.id in self.left:
            node.value = ast.Constant(self.left.pop(target.id))
        return node


def data_step(root: Path, size: int, generator: Generator) -> dict[str, float]:
    """The errors of its data step and of ours in single precision, at a small ρ."""
    from invsolve.operators import Blur

    rho = 1e-7
    kernel = torch.rand(1, 1, 7, 7, generator=generator, dtype=torch.float64)
    kernel = kernel / kernel.sum()
    A = Blur.from_kernel(kernel[0, 0], (size, size))
    x = torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64)
    y = A(torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64))
    exact = A.prox(x, y, rho)
    with checkout(root) as load:
        import scipy.interpolate

        if not hasattr(scipy.interpolate, "interp2d"):
            scipy.interpolate.interp2d = None  # imported there, and not used here
        theirs = load("utils.utils_sisr")
        spectra = theirs.pre_calculate(y.float(), kernel.float(), 1)
        tau = torch.full((1, 1, 1, 1), rho)
        found = theirs.data_solution(x.float(), *spectra, tau, 1)
    ours = A.prox(x.float(), y.float(), rho)
    return {
        "rho": rho,
        "theirs": float((found - exact).abs().max()),
        "ours": float((ours - exact).abs().max()),
    }
