"""Posterior sampling for inverse problems in imaging, with diffusion priors."""

from . import operators as operators, priors as priors, samplers as samplers
from .problem import InverseProblem as InverseProblem
from .solve import Solution as Solution, Stats as Stats, solve as solve
