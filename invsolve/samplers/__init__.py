"""Posterior samplers, one paper to a file, and the classical methods beside them."""

from . import solvers as solvers
from .classical import cgls as cgls, fbp as fbp, sirt as sirt, tv as tv
from .core import Kind as Kind, Sampler as Sampler
from .daps import daps as daps
from .ddnm import ddnm as ddnm
from .ddrm import ddrm as ddrm
from .dds import dds as dds
from .dds3d import dds3d as dds3d
from .dfm import dfm as dfm
from .diffpir import diffpir as diffpir
from .dps import dps as dps
from .ensemble import ensemble as ensemble
from .ldps import ldps as ldps
from .mbir import mbir as mbir
from .mmps import mmps as mmps
from .p2l import p2l as p2l
from .pigdm import pigdm as pigdm
from .pnp import pnp as pnp
from .psld import psld as psld
from .red import red as red
from .reddiff import reddiff as reddiff
from .resample import resample as resample
from .score_sde import score_sde as score_sde
from .stsl import stsl as stsl
from .tmpd import tmpd as tmpd
from .unconditional import unconditional as unconditional
