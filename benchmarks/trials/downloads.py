"""Downloads that break: `wdat.zoo.fetch` against a server on this machine that cuts, forgets or confuses.

Every fetch is a process, started again until it ends with the file. After each try a file with the final name must be
whole and right; at the end it must be there. How much was sent says whether tries go on where the last one ended.
"""

import hashlib
import http.server
import io
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from wdat.zoo import fetch
from wdat.zoo.networks import build

PAGE = b"<!DOCTYPE html><html><title>Try again later</title></html>"
CHUNK = 1 << 14  # bytes sent at a time
TRIES = 60  # of one fetch, after which it counts as one that does not end


class Server(http.server.ThreadingHTTPServer):
    """Gives `content` (`whole`: what it should be), up to `cut` bytes a request, waiting `pause` seconds a chunk."""

    whole, content, cut, pause, ranges, sent = b"", b"", 10**9, 0.0, True, 0

    def url(self) -> str:
        """Its address."""
        return f"http://{self.server_address[0]}:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    """One request: the file, or the part of it that was asked for."""

    server: Server

    def do_GET(self) -> None:
        """Send it."""
        content, asked = self.server.content, self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        start = start if start < len(content) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = min(len(content), start + self.server.cut)
        try:
            for place in range(start, end, CHUNK):
                part = content[place : min(place + CHUNK, end)]
                self.wfile.write(part)
                self.server.sent += len(part)
                time.sleep(self.server.pause)
        except OSError:
            return  # the other side was killed

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served() -> Iterator[Server]:
    """A server on this machine alone."""
    with Server(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(folder: Path) -> tuple[Path, bytes]:
    """A card, and the container in which its weights would be published."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = dict(build("digits_cnn", width=64).state_dict())
    container = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 7}, container)
    torch.save(state, folder / "net.pt")
    plain = (folder / "net.pt").read_bytes()
    card = {"name": "net", "architecture": "digits_cnn", "arguments": {"width": 64}, "weights": "net.pt",
            "sha256": hashlib.sha256(plain).hexdigest(), "bytes": len(plain), "licence": "MIT",
            "source": "nobody"}  # fmt: skip
    (folder / "net.yaml").write_text(yaml.safe_dump(card))
    return folder / "net.yaml", container.getvalue()


def _fetch(card: Path, folder: Path, address: str) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    try:
        fetch.network(card, folder, address=address)
    except (OSError, ValueError):
        raise SystemExit(3) from None


Mood = Callable[[Server, random.Random, int], float]  # sets the server for a try; seconds until a kill, 0 for none


def cuts(server: Server, draw: random.Random, number: int) -> float:
    """The connection ends anywhere."""
    server.cut = draw.randrange(1, len(server.content) // 2)
    return 0.0


def kills(server: Server, draw: random.Random, number: int) -> float:
    """The fetch is killed at any moment of a slow download."""
    server.pause = 0.3 * CHUNK / len(server.content)
    return draw.uniform(0.02, 0.4) if number < 8 else 0.0


def no_ranges(server: Server, draw: random.Random, number: int) -> float:
    """The server starts anew every time, and is cut three times."""
    server.ranges, server.cut = False, draw.randrange(1, len(server.content)) if number < 3 else 10**9
    return 0.0


def page(server: Server, draw: random.Random, number: int) -> float:
    """Between two parts comes a page."""
    server.content, server.cut = (PAGE if number == 1 else server.whole), len(server.whole) // 3
    return 0.0


def changed(server: Server, draw: random.Random, number: int) -> float:
    """After the first part the server has another file of the same size."""
    other = bytes(byte ^ 1 for byte in server.whole)
    server.content, server.cut = (other if number == 1 else server.whole), len(server.whole) // 2 + 1
    return 0.0


MOODS: tuple[Mood, ...] = (cuts, kills, no_ranges, page, changed)


def trial(mood: Mood, folder: Path, seed: int, repeats: int) -> dict[str, Any]:
    """Fetches under one fault: tries, bytes sent over those of the file, files that were not right, and arrived."""
    card, content = published(folder)
    right, draw = yaml.safe_load(card.read_text())["sha256"], random.Random(seed)
    row = {"fault": mood.__doc__.rstrip("."), "fetches": repeats, "tries": 0, "killed": 0, "wrong": 0, "arrived": 0}
    sent = 0
    fetch.PUBLISHED["net"] = ("net.model", len(content), hashlib.sha256(content).hexdigest())
    try:
        for repeat in range(repeats):
            own = folder / str(repeat)
            with served() as server:
                server.content = server.whole = content
                for number in range(TRIES):
                    limit = mood(server, draw, number)
                    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(card, own, server.url()))
                    process.start()
                    process.join(limit or None)
                    if process.exitcode is None:
                        process.kill()
                        process.join()
                        row["killed"] += 1
                    row["tries"] += 1
                    found = own / "net.pt"
                    row["wrong"] += found.is_file() and hashlib.sha256(found.read_bytes()).hexdigest() != right
                    if process.exitcode == 0:
                        row["arrived"] += found.is_file()
                        break
                sent += server.sent
    finally:
        del fetch.PUBLISHED["net"]
    return row | {"sent": sent / (repeats * len(content))}


def run(folder: Path, quick: bool) -> dict[str, Any]:
    """Every fault; quick: one fetch of each."""
    rows = [trial(mood, folder / mood.__name__, number, 1 if quick else 12) for number, mood in enumerate(MOODS)]
    return {"downloads": rows}
