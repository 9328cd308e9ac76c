"""invsolve doctor: what this machine can do."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import torch
import typer

from invsolve import demo as demonstration, priors
from invsolve.report import machine, versions

EXAMPLE = "Example: invsolve doctor"


def doctor() -> None:
    """Tell what this machine can do."""
    checks: dict[str, Callable[[], str]] = {
        "invsolve": lambda: versions()["invsolve"],
        "python": lambda: versions()["python"],
        "machine": lambda: machine(torch.device("cpu")),
        "memory": _memory,
        "torch": lambda: f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": _cuda,
        "ASTRA": _astra,
        "images": lambda: _extra("nibabel", "skimage", "pydicom"),
        "reports": lambda: _extra("jinja2", "matplotlib", "skimage"),
        "deepinv": lambda: _extra("deepinv"),
        "priors": lambda: ", ".join(priors.available()) or "none bundled",
        "demo data": lambda: demonstration.bundled(demonstration.SLICES).name,
    }
    for name, check in checks.items():
        try:
            answer = check()
        except Exception as error:
            answer = f"no: {' '.join(str(error).split()) or type(error).__name__}"
        typer.echo(f"{name:<10}  {answer}")


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no"
    free, total = torch.cuda.mem_get_info()
    gib = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{torch.cuda.get_device_name()}, {gib}"


def _astra() -> str:
    # In a process of its own, for a broken driver can end the one that asks.
    ask = "import astra; print(astra.__version__, astra.use_cuda())"
    answer = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=60
    )
    if answer.returncode:
        return "no: pip install 'invsolve[ct]' (GPL-3; not needed for small images)"
    number, cuda = answer.stdout.split()[-2:]
    return f"{number}, with{'' if cuda == 'True' else 'out'} CUDA"


def _extra(*modules: str) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"missing {', '.join(missing)}" if missing else f"yes ({', '.join(modules)})"
