"""Forward operators and noise: y = A(x) + noise."""

from . import kernels as kernels
from .base import (
    Chain as Chain,
    Compose as Compose,
    Identity as Identity,
    LinearOperator as LinearOperator,
    Operator as Operator,
    Rescale as Rescale,
    Scaled as Scaled,
    dottest as dottest,
)
from .blur import Blur as Blur, Crop as Crop, Pad as Pad, SpatialBlur as SpatialBlur
from .bridge import (
    as_operator as as_operator,
    from_deepinv as from_deepinv,
    from_scipy as from_scipy,
    to_deepinv as to_deepinv,
    to_scipy as to_scipy,
)
from .coils import (
    Compressed as Compressed,
    coil_maps as coil_maps,
    compress_coils as compress_coils,
    simulated_maps as simulated_maps,
)
from .colour import Bayer as Bayer, Greyscale as Greyscale
from .ct import (
    ConeBeam as ConeBeam,
    FanBeam as FanBeam,
    ParallelBeam as ParallelBeam,
)
from .masking import Mask as Mask
from .mri import (
    Coils as Coils,
    ComplexChannels as ComplexChannels,
    Fourier as Fourier,
    MultiCoil as MultiCoil,
    RealImage as RealImage,
)
from .noise import (
    GaussianNoise as GaussianNoise,
    Noise as Noise,
    PoissonNoise as PoissonNoise,
    RicianNoise as RicianNoise,
    TransmissionNoise as TransmissionNoise,
)
from .nonlinear import (
    JPEG as JPEG,
    NetworkOperator as NetworkOperator,
    PhaseRetrieval as PhaseRetrieval,
    Quantise as Quantise,
    Saturate as Saturate,
)
from .nufft import (
    NonCartesian as NonCartesian,
    density_compensation as density_compensation,
    radial as radial,
    spiral as spiral,
)
from .patterns import (
    equispaced_columns as equispaced_columns,
    gaussian_columns as gaussian_columns,
    gaussian_points as gaussian_points,
    poisson_disc as poisson_disc,
    random_columns as random_columns,
)
from .resample import (
    Decimate as Decimate,
    Downsample as Downsample,
    Separable as Separable,
    finer_pixels as finer_pixels,
)
from .sensing import CompressedSensing as CompressedSensing
from .stack import OnChannels as OnChannels, Stack as Stack, on_channels as on_channels
from .volume import SliceWise as SliceWise
from .warp import Warp as Warp
