"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

from invsolve.cli.samplers import SAMPLERS

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_readme_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    names: dict = {}
    exec(block, names)
    assert names["solution"].samples.shape == (4, 1, 1, 128, 128)
    assert names["solution"].stats.network_forwards == 4 * 50


def test_the_readme_has_an_example() -> None:
    assert BLOCKS


PAGES = [README, *README.parent.glob("*.md"), *README.parent.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", sorted(set(PAGES)), ids=lambda p: p.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_sampler_has_its_place_in_the_docs() -> None:
    page = (README.parent / "docs" / "samplers.md").read_text("utf-8")
    for name in SAMPLERS:
        assert f"`{name}`" in page, name
