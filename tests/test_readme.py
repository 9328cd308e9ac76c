"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

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
