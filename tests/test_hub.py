"""Fetching public checkpoints: interrupted, damaged, refused; from a server of our own."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from checkpoint_files import fill

from invsolve import priors
from invsolve.cli import main
from invsolve.priors import hub
from invsolve.priors.networks.adm import ADMConfig, ADMUNet

CONTENT = random.Random(0).randbytes(3 * 10**6)
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """What a server gives, how many bytes before it hangs up, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/model.bin": CONTENT}
        self.hangs_up_after: list[int] = []
        self.knows_ranges = True
        self.asked: list[tuple[str, str | None]] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.asked.append((self.path, wanted))
                whole = server.files.get(self.path)
                if whole is None:
                    self.send_error(404)
                    return
                start = 0
                if wanted and server.knows_ranges:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(whole):
                        self.send_error(416)
                        return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(whole) - start))
                self.end_headers()
                stop = len(whole)
                if server.hangs_up_after:
                    stop = start + server.hangs_up_after.pop(0)
                self.wfile.write(whole[start:stop])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Callable[..., None]]]:
    """A server, and how to name a checkpoint of its files."""
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), state.handler())
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("INVSOLVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    named: dict[str, hub.Entry] = {}
    monkeypatch.setattr(hub, "NAMED", named)

    def name(*files: str, sha256: str | None = None, **card: Any) -> None:
        url = f"http://127.0.0.1:{http.server_port}/"
        parts = tuple(hub.File(f, url + f, sha256) for f in files)
        named["test/model"] = hub.Entry("noise", "CC0-1.0", parts, card)

    name("model.bin", sha256=SUM)
    yield state, name
    http.shutdown()
    thread.join()
    http.server_close()


def fetch() -> Path:
    return hub.fetch("test/model", progress=False)


def kept() -> list[str]:
    return sorted(p.name for p in hub.folder().rglob("*") if p.is_file())


def test_a_fetched_file_is_the_servers_and_is_not_fetched_again(server: Any) -> None:
    path = fetch()
    assert path.read_bytes() == CONTENT
    assert path == hub.folder() / "test/model" / "model.bin"
    assert fetch() == path == hub.fetched("test/model")
    assert len(server[0].asked) == 1 and kept() == ["model.bin"]


def test_an_interrupted_download_goes_on_where_it_ended(server: Any) -> None:
    # Within one call as long as something comes …
    server[0].hangs_up_after = [2**20, 2**19]
    assert fetch().read_bytes() == CONTENT
    ranges = [wanted for _, wanted in server[0].asked]
    assert ranges[0] is None and ranges[1:] == ["bytes=1048576-", "bytes=1572864-"]


def test_a_second_call_goes_on(server: Any) -> None:
    # … and in the next one after nothing did.
    server[0].hangs_up_after = [2**20, 0]
    with pytest.raises(OSError, match="run it again to go on") as refused:
        fetch()
    assert "\n" not in str(refused.value)
    assert kept() == ["model.bin.part"]
    with pytest.raises(ValueError, match="not here yet"):
        hub.fetched("test/model")
    assert fetch().read_bytes() == CONTENT and kept() == ["model.bin"]
    assert server[0].asked[-1][1] == "bytes=1048576-"


def test_a_server_without_ranges_begins_again(server: Any) -> None:
    server[0].knows_ranges = False
    server[0].hangs_up_after = [2**20]
    assert fetch().read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server: Any) -> None:
    part = hub.folder() / "test/model" / "model.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"more")
    assert fetch().read_bytes() == CONTENT


def test_a_file_of_another_sum_is_refused_and_nothing_is_left(server: Any) -> None:
    state, name = server
    state.files["/model.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match="sha256") as refused:
        fetch()
    assert "\n" not in str(refused.value) and kept() == []
    # Also where a wrong part was gone on from.
    part = hub.folder() / "test/model" / "model.bin.part"
    part.write_bytes(b"y" * 1000)
    state.files["/model.bin"] = CONTENT
    with pytest.raises(ValueError, match="sha256"):
        fetch()
    assert kept() == [] and fetch().read_bytes() == CONTENT
    # And what was changed on the disk since is fetched again.
    name("model.bin", sha256=SUM)
    fetch().write_bytes(b"changed")
    assert fetch().read_bytes() == CONTENT


def test_what_is_not_there_is_said(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server[1]("none.bin")
    with pytest.raises(OSError, match="the server says 404") as refused:
        fetch()
    assert "\n" not in str(refused.value) and kept() == []
    with pytest.raises(ValueError, match="no checkpoint is named 'x'"):
        hub.fetch("x")
    monkeypatch.setenv("INVSOLVE_CACHE", "")
    with pytest.raises(ValueError, match="keeps nothing"):
        fetch()


def test_a_named_checkpoint_loads_with_its_card(server: Any, tmp_path: Path) -> None:
    state, name = server
    config = ADMConfig(1, 1, 32, (32,), 1, (True,), None, 4, False, True, "pool", None)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ADMUNet(config).state_dict().items()}
    file = tmp_path / "model.pt"
    torch.save(fill(shapes), file)
    state.files["/model.pt"] = file.read_bytes()
    name("model.pt", network={"heads": 4}, licence="CC0-1.0")
    with pytest.raises(ValueError, match="invsolve priors fetch test/model"):
        priors.load("test/model")
    assert state.asked == []  # nothing is fetched unasked
    fetch()
    prior = priors.load("test/model")
    assert prior.info.licence == "CC0-1.0" and prior.info.family == "adm"
    x = torch.ones(1, 1, 8, 8)
    expected = priors.load(file, {"network": {"heads": 4}}).denoise(
        x, torch.tensor(1.0)
    )
    assert torch.equal(prior.denoise(x, torch.tensor(1.0)), expected)


def test_a_checkpoint_of_several_files_is_a_folder(server: Any) -> None:
    state, name = server
    state.files |= {"/config.json": json.dumps({"a": 1}).encode(), "/w.bin": b"w"}
    name("config.json", "w.bin")
    folder = fetch()
    assert folder.is_dir() and kept() == ["config.json", "w.bin"]
    (folder / "w.bin").unlink()
    with pytest.raises(ValueError, match="not here yet"):
        hub.fetched("test/model")


def test_the_command_line_fetches(server: Any, capsys: Any) -> None:
    assert main(["priors", "fetch", "test/model"]) == 0
    out = capsys.readouterr().out
    assert SUM in out and "as published" in out and "licence: CC0-1.0" in out
    assert main(["priors", "fetch", "nothing"]) == 2
    assert "no checkpoint is named" in capsys.readouterr().err


def test_the_public_checkpoints_are_spelt_out() -> None:
    for name, entry in hub.NAMED.items():
        assert entry.licence and entry.about and entry.files, name
        for file in entry.files:
            assert file.url.startswith("https://") and "/" not in file.name
            known = file.sha256
            assert known is None or (len(known) == 64 and int(known, 16))
