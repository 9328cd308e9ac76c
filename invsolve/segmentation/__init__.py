"""Masks as draws from a posterior: what is where, and how sure one can be of it."""

from . import fusion as fusion, metrics as metrics, uncertainty as uncertainty
from .cases import Case as Case, Modality as Modality, prepared as prepared
from .hecktor import hecktor_cases as hecktor_cases
from .masks import MaskPrior as MaskPrior
from .pet import simulate_pet as simulate_pet
from .result import Segmentation as Segmentation
from .segmenter import (
    Segmenter as Segmenter,
    available as available,
    load as load,
    segment as segment,
    segment_case as segment_case,
)
