"""Forward operators and noise: y = A(x) + noise."""

from .base import (
    Compose as Compose,
    Identity as Identity,
    LinearOperator as LinearOperator,
    Operator as Operator,
    Scaled as Scaled,
    dottest as dottest,
)
from .blur import Blur as Blur
from .ct import ParallelBeam as ParallelBeam
from .masking import Mask as Mask
from .mri import (
    ComplexChannels as ComplexChannels,
    Fourier as Fourier,
    RealImage as RealImage,
)
from .noise import (
    GaussianNoise as GaussianNoise,
    Noise as Noise,
    PoissonNoise as PoissonNoise,
    TransmissionNoise as TransmissionNoise,
)
from .resample import Downsample as Downsample
