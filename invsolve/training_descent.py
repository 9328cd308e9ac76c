"""What a gradient step is: AdamW, or Muon on the kernels and AdamW on the rest.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (AdamW). Jordan et
al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from invsolve.bf16 import avoided

Descends = Literal["adamw", "muon"]


@final
class Descent:
    """θ ← θ − r η U, with U of AdamW; or, of a kernel's matrix, the nearest orthogonal one.

    Muon's U = 0.2 √max(m, n) · NS(momentum), where NS (Newton–Schulz) turns G = PΣQᵀ into
    about PQᵀ: every direction of a kernel learns as fast as another, and U is as long as
    AdamW's, so that one η serves both. A convolution's kernel is the matrix (out,
    in · taps). The first and the last kernel, embeddings, norms and biases are AdamW's.

    Args:
        net: on its device already.
        name: ``adamw`` or ``muon``.
        lr: η.

    Raises:
        ModuleNotFoundError: Muon is asked for, and torch is too old to have it.
    """

    def __init__(self, net: nn.Module, name: Descends, lr: float) -> None:
        self.lr, self.net = lr, net
        self.pairs: list[tuple[Tensor, nn.Parameter]] = []
        if name == "muon":
            self.pairs = [(p, nn.Parameter(_matrix(p, p))) for p in inner_kernels(net)]
        theirs = {id(kernel) for kernel, _ in self.pairs}
        rest = [p for p in net.parameters() if id(p) not in theirs]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0)
        ]
        if self.pairs:
            muon = _muon()
            made = muon(
                [matrix for _, matrix in self.pairs],
                lr,
                weight_decay=0,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.append(made)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.net.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """One step down the gradients, of r = ``rate``."""
        for kernel, matrix in self.pairs:
            grad = kernel.grad
            matrix.grad = None if grad is None else _matrix(grad, kernel)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            with avoided(next(self.net.parameters()).device):
                optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """What it remembers."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from there."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def inner_kernels(net: nn.Module) -> list[Tensor]:
    """Weights of its linear and convolutional layers, but for the first and the last."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kernels = [m.weight for m in net.modules() if isinstance(m, layers)]
    return cast(list[Tensor], kernels[1:-1])


def _matrix(values: Tensor, kernel: Tensor) -> Tensor:
    """(out, in · taps) of values like a kernel's, in the order in which it lies in memory.

    So the kernel's own is a view of it. In which order columns are makes no difference.
    """
    last = not kernel.is_contiguous()
    ordered = values.detach().movedim(1, -1) if last else values.detach()
    return ordered.reshape(len(values), -1)


def _muon() -> Any:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ModuleNotFoundError(
            'optimizer = "muon" needs torch 2.9 or newer: upgrade torch, or take "adamw"'
        )
    return muon
