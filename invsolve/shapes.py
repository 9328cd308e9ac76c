"""Shape annotations, written once.

``X`` is a batch of images and ``Y`` a batch of measurements. Within one call every
``X`` has one shape and every ``Y`` another; the tests check them as they run.
"""

from jaxtyping import Float, Inexact
from torch import Tensor

X = Inexact[Tensor, "batch *x"]
Y = Inexact[Tensor, "batch *y"]
PerItem = Float[Tensor, " batch"]
Sigma = Float[Tensor, ""] | Float[Tensor, " batch"]


def per_item(value: Tensor, like: Tensor) -> Tensor:
    """A scalar, or one value for each item, shaped to broadcast against ``like``.

    >>> import torch
    >>> per_item(torch.ones(2), torch.ones(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    return value.reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim else value
