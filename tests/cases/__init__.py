"""The table of linear operators, each of which has to pass every law.

A file for each kind of measurement; ``test_operators.py`` runs them all.
"""

from .bridge import BRIDGE
from .case import Case as Case, H as H, W as W, float64 as float64
from .core import CORE, blur as blur, weights as weights
from .ct import CT
from .imaging import IMAGING
from .mri import MRI

LINEAR: dict[str, Case] = {**CORE, **CT, **MRI, **IMAGING, **BRIDGE}
