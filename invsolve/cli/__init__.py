"""The command line: files and names become objects here, and only here.

Each command is a module of its name; what they share is in the others.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from invsolve.report import versions

from . import demo, doctor, priors, segment, simulate, solve, train
from .options import CONTEXT

EXTRAS = {
    "astra": "ct",
    "highdicom": "medical",
    "nibabel": "io",
    "pydicom": "io",
    "skimage": "io",
    "jinja2": "report",
    "matplotlib": "report",
    "monai": "monai",
    "pooch": "hub",
}
"""Which extra brings a module that may be missing."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={**CONTEXT},
)
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=simulate.EXAMPLE)(simulate.simulate)
app.command(epilog=solve.EXAMPLE)(solve.solve)
app.command(epilog=segment.EXAMPLE)(segment.segment)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
app.add_typer(priors.priors_app, name="priors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    What the user can mend is one line on stderr and exit code 2; a fault of the program
    is one line and 1. ``--debug`` shows the traceback of either.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        code = app(
            [word for word in given if word != "--debug"],
            prog_name="invsolve",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
    except KeyboardInterrupt:
        if debug:
            raise
        message, code = "interrupted; nothing was written", 130
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, typer.Abort):
        return "interrupted", 130
    if hasattr(error, "format_message"):  # typer's own: it says what was misspelt
        ctx = getattr(error, "ctx", None)
        command = ctx.command_path if ctx is not None else "invsolve"
        message = error.format_message().rstrip(".")  # pyright: ignore
        return f"{message or 'nothing to do'}: see {command} --help", 2
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = EXTRAS[error.name]
        return f"{error.name} is not installed: pip install 'invsolve[{extra}]'", 2
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory: give fewer slices, or --samples 1", 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the path and its permissions", 2
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return str(error) or type(error).__name__, 2
    return (
        f"{type(error).__name__}: {error}: this is a fault of invsolve; please report "
        "it with what --debug shows",
        1,
    )


def _show_version(value: bool) -> bool:
    if value:
        typer.echo(f"invsolve {versions()['invsolve']}")
        raise typer.Exit
    return value


@app.callback(
    epilog="Example: invsolve simulate ct.nii.gz -o y.npz; invsolve solve y.npz -o o"
)
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, help="Show it and leave."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Posterior sampling for inverse problems in imaging, with diffusion priors."""
