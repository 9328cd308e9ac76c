"""invsolve priors: list, inspect, fetch and evaluate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from torch import Generator

from invsolve import priors
from invsolve.priors.weights import read_card, sha256

from .files import check_writable, write_json
from .options import CONTEXT, Seed, data_home


class _Group(typer.core.TyperGroup):
    """Takes `invsolve priors [NAME]` for `invsolve priors list [NAME]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["list"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["list", *args])


priors_app = typer.Typer(
    cls=_Group,
    help="List, inspect and fetch priors.",
    epilog="Example: invsolve priors inspect model.pt",
    rich_markup_mode=None,
    context_settings={**CONTEXT},
)


@priors_app.command("list", epilog="Example: invsolve priors list ct-headneck-128")
def list_priors(
    name: Annotated[
        str | None, typer.Argument(help="A name, or the path of a card.")
    ] = None,
) -> None:
    """List the priors that are bundled and those that can be fetched; or show a card."""
    if name is not None:
        card, path = read_card(name)
        typer.echo(
            json.dumps({"file": str(path), **card}, indent=2, ensure_ascii=False)
        )
        return
    names = priors.available()
    if not names:
        typer.echo("no prior is bundled; train one: invsolve train --help")
    for known in names:
        card, _ = read_card(known)
        about = card.get("data", "")
        typer.echo(f"{known}  unit {card.get('unit') or 'none'}  {about}")
    typer.echo("public, by invsolve priors fetch NAME:")
    for known, entry in priors.hub.NAMED.items():
        typer.echo(f"{known}  {entry.about}  {entry.licence}")


@priors_app.command(
    "inspect", epilog="Example: invsolve priors inspect model.pt --card card.json"
)
def inspect_prior(
    file: Annotated[str, typer.Argument(help="A name, a checkpoint or a folder.")],
    card: Annotated[
        Path | None, typer.Option(help="What overrides the file (.json).")
    ] = None,
) -> None:
    """Tell what a checkpoint is and what was decided of it; nothing of it is run."""
    prior = priors.load(file, card)
    for fact, value in prior.info:
        typer.echo(f"{fact:<16}  {value}")
    for decision in prior.decisions:
        typer.echo(f"{'decided':<16}  {decision}")


@priors_app.command(
    "fetch", epilog="Example: invsolve priors fetch google/ddpm-cifar10-32"
)
def fetch_prior(
    name: Annotated[str, typer.Argument(help="As invsolve priors list names it.")],
) -> None:
    """Download a public checkpoint; one that was interrupted goes on."""
    path = priors.fetch(name)
    entry = priors.hub.NAMED[name]
    for file in entry.files:
        kept = path / file.name if path.is_dir() else path
        known = "as published" if file.sha256 else "nobody published one to compare"
        typer.echo(f"{kept}  sha256 {sha256(kept)} ({known})")
    typer.echo(f"licence: {entry.licence}; use it with --prior {name}")


@priors_app.command(
    "evaluate",
    epilog="Example: invsolve priors evaluate mr-brain-128 configs/mr-brain-128.toml "
    "-o card.html --other configs/ct-headneck-128.toml",
)
def evaluate_prior(
    name: Annotated[str, typer.Argument(help="A name, a card or a checkpoint.")],
    config: Annotated[
        Path, typer.Argument(help="Its training configuration (TOML): which images.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (.html).")],
    other: Annotated[
        Path | None, typer.Option(help="Another prior's: images of another kind.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Of each kind.")] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Unconditional ones.")] = 16,
    seed: Seed = 0,
) -> None:
    """Measure a prior on images it never saw: one page, and its numbers beside it (.json).

    Denoising beside total variation, samples and the training images nearest to them,
    likelihoods, spectrum. A prior of latents is measured in them, beside the best linear
    denoiser, and its autoencoder by what it leaves of images.
    """
    from tqdm import tqdm

    from invsolve import report_card
    from invsolve.training_latent import LatentConfig

    if out.suffix != ".html":
        raise ValueError(f"--out is a page: {out} should end in .html")
    check_writable(out)
    prior = priors.load(name)
    home = data_home(config)
    card = report_card.evaluate(
        Path(name).name.removesuffix(".json"),
        prior,
        LatentConfig.read(config).data,
        home,
        other=None if other is None else LatentConfig.read(other).data,
        images=images,
        samples=samples,
        generator=Generator().manual_seed(seed),
        progress=lambda loop: tqdm(loop, "flow", unit="step", delay=1),
    )
    report_card.save_card(out, card)
    write_json(out.with_suffix(".json"), card.numbers())
    typer.echo(f"wrote {out} and {out.with_suffix('.json')}")
