"""Files of other people: taken if size and digest are right, from anywhere; a download goes on; the rest is refused."""

import contextlib
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import wdat
from wdat import cli
from wdat.zoo import fetch
from wdat.zoo.networks import build
from wdat.zoo.weights import sha256

INSIDE = "sdp/net.model"


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of `content` by path, or the part asked for; `cut` ends each answer after so many bytes."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        content = self.server.content.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        made.content, made.asked, made.cut, made.ranges = {}, [], 10**9, True
        made.url = f"http://{made.server_address[0]}:{made.server_port}/"
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A network published in a container with an epoch beside it, and a card of its plain weights."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = build("digits_cnn", width=2).state_dict()
    container = io.BytesIO()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 7}, container)
    (tmp_path / "plain").mkdir()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "plain/net.pt")
    plain = (tmp_path / "plain/net.pt").read_bytes()
    card = {"name": "net", "architecture": "digits_cnn", "arguments": {"width": 2}, "weights": "net.pt",
            "sha256": hashlib.sha256(plain).hexdigest(), "bytes": len(plain),
            "licence": "MIT", "source": "somebody"}  # fmt: skip
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(card))
    content = container.getvalue()
    monkeypatch.setitem(fetch.PUBLISHED, "net", (INSIDE, len(content), hashlib.sha256(content).hexdigest()))
    (tmp_path / "plain/net.pt").rename(tmp_path / "plain/called-otherwise.bin")
    return content


def run(capsys, *words: str) -> tuple[int, dict]:
    code = cli.main(["fetch", "net.yaml", "--to", "weights", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_a_network_is_brought_repackaged_and_loads(published, server, capsys):
    server.content[INSIDE] = published
    code, said = run(capsys, "--address", server.url)
    (file,) = said["files"]
    assert code == said["code"] == 0 and file["licence"] == "MIT" and file["from"] == server.url + INSIDE
    assert (
        sha256("weights/net.pt") == file["sha256"] and wdat.load_model("net.yaml", root="weights").card["name"] == "net"
    )
    assert [path.name for path in Path("weights").iterdir()] == ["net.pt"]
    code, said = run(capsys, "--address", server.url)
    assert said["files"][0]["from"] == "here" and len(server.asked) == 1  # what is here is checked, and kept
    Path("weights/net.pt").write_bytes(b"spoilt")
    assert run(capsys, "--address", server.url)[0] == 0 and sha256("weights/net.pt") == file["sha256"]


@pytest.mark.parametrize("ranges", [True, False], ids=["goes on", "server without ranges"])
def test_an_interrupted_download_goes_on(ranges, published, server, capsys):
    server.content[INSIDE], server.cut, server.ranges = published, 1000, ranges
    code, said = run(capsys, "--address", server.url)
    assert code == 3 and "1,000 of" in said["error"] and not Path("weights/net.pt").exists()
    server.cut = 10**9
    code, said = run(capsys, "--address", server.url)
    assert (
        code == 0 and server.asked == [None, "bytes=1000-"] and sha256("weights/net.pt") == said["files"][0]["sha256"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda good: b"<!DOCTYPE html><html>quota exceeded</html>", "gave an HTML page"),
        (lambda good: good[:-1] + b"?", "gave another file"),
        (lambda good: good + b"!", "gave more than"),
        (lambda good: good[:-1000], "the connection ended at"),
        (lambda good: None, "HTTP Error 404"),
    ],
    ids=["page", "altered", "longer", "shorter", "absent"],
)
def test_what_is_not_the_file_is_refused(content, words, published, server, capsys):
    if (given := content(published)) is not None:
        server.content[INSIDE] = given
    code, said = run(capsys, "--address", server.url)
    assert code in (2, 3) and words in said["error"] and server.url + INSIDE in said["error"]
    assert not Path("weights/net.pt").exists()
    server.content[INSIDE] = published
    if "another" in words or "page" in words or "more" in words:
        assert code == 2 and not list(Path("weights").iterdir())  # nothing that a later try would go on from
        assert run(capsys, "--address", server.url)[0] == 0


def archive(kind: str, name: str, content: bytes) -> Path:
    """An archive with the file under a name that would lead out of any folder it was unpacked in."""
    path = Path(f"archive.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as made:
            made.writestr("../../notes.txt", "x" * len(content))
            made.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as made:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz", "tar.xz", "file"])
@pytest.mark.parametrize("form", ["published", "plain"])
def test_what_is_at_hand_is_taken_whatever_it_is_called(kind, form, published, capsys, no_network):
    content = published if form == "published" else Path("plain/called-otherwise.bin").read_bytes()
    if kind in ("folder", "file"):
        place = Path("mine/deep/any.thing")
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
        (place.parent / "other").write_bytes(b"?" * len(content))
        place = Path("mine") if kind == "folder" else place
    else:
        place = archive(kind, "../../outside/net.model", content)
    code, said = run(capsys, "--from", str(place))
    assert code == 0 and said["files"][0]["from"] == str(place)
    assert sha256("weights/net.pt") == said["files"][0]["sha256"]
    assert not list(Path.cwd().parent.glob("outside")) and not list(Path.cwd().parent.parent.glob("outside"))


def test_offline_says_what_to_put_where(published, capsys, no_network):
    code, said = run(capsys, "--offline")
    _, size, digest = fetch.PUBLISHED["net"]
    assert code == 2 and all(words in said["error"] for words in (f"{size:,} bytes", digest, fetch.CROWN + INSIDE))
    Path("weights").mkdir()
    Path("weights/anything").write_bytes(published)
    assert run(capsys, "--offline", "--from", "weights")[0] == 0
    with tarfile.open("broken.tar.gz", "w:gz") as made:
        made.add("weights/anything")
    Path("broken.tar.gz").write_bytes(Path("broken.tar.gz").read_bytes()[:300])
    Path("weights/net.pt").unlink()
    code, said = run(capsys, "--offline", "--from", "broken.tar.gz")
    assert code == 2 and "can not be read as an archive" in said["error"]
    assert run(capsys, "--offline", "--from", "nowhere")[0] == 2


def test_names_are_known_or_said(published, capsys):
    assert cli.main(["fetch", "nothing"]) == 2 and "known here: zoo" in capsys.readouterr().err
    with contextlib.chdir(Path(__file__).parents[1]):
        assert cli.main(["fetch", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert "399f52da9f914c32" in said and "licence: MIT" in said and "(from package)" in said


def test_the_five_published_networks_are_those_of_the_cards(shared):
    """The repackaged files are what a card names; the published ones, where they are at hand, give these bytes."""
    zoo = Path(__file__).parents[1] / "notebooks/zoo"
    for name, (inside, _, _) in fetch.PUBLISHED.items():
        card = wdat.zoo.models.read_card(zoo / f"{name}.yaml")
        assert inside in card["source"] and card["licence"] == "BSD-3-Clause"
        try:
            repackaged = fetch._repackaged((shared / "models" / card["weights"]).read_bytes(), "any.model", card)
        except ValueError as error:
            locked = (Path(__file__).parents[1] / "requirements.lock.txt").read_text()
            assert f"torch=={torch.__version__.split('+')[0]}" not in locked and "use the torch of" in str(error)
            pytest.skip(str(error))
        assert hashlib.sha256(repackaged).hexdigest() == card["sha256"]


# Images


def batches(folder: Path, pixels: torch.Tensor, labels: torch.Tensor, kind: type) -> None:
    """CIFAR-10 as torchvision unpacks it, all batches of the same few images."""
    import pickle

    folder.mkdir(parents=True)
    for name, _ in [*kind.train_list, *kind.test_list]:
        held = {"data": pixels.flatten(1).numpy(), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(held))
    names = {"label_names": list(CLASSES)}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's form, which torchvision takes for the official one; its content, pixels, labels."""
    import torchvision

    kind = torchvision.datasets.CIFAR10
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(40) % 10
    batches(tmp_path / "made" / kind.base_folder, pixels, labels, kind)
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / kind.base_folder, kind.base_folder)
    content = (tmp_path / "made.tar.gz").read_bytes()

    def md5(name: str) -> str:
        return hashlib.md5((tmp_path / "made" / kind.base_folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, md5(name)] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, md5(name)] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5("batches.meta")})
    monkeypatch.setitem(fetch.CIFAR, "cifar10", len(content))
    monkeypatch.setattr(fetch, "LOSSLESS", 30)
    monkeypatch.chdir(tmp_path)
    return content, pixels, labels


def test_cifar10_is_brought_checked_and_written_as_a_folder(official, server, capsys, monkeypatch):
    content, pixels, labels = official
    server.content["cifar-10-python.tar.gz"], server.cut = content, 5000
    words = ["fetch", "cifar10", "--address", server.url]
    assert cli.main([*words, "--json"]) == 3 and "5,000 of" in json.loads(capsys.readouterr().out)["error"]
    server.cut = 10**9
    assert cli.main(words) == 0 and server.asked == [None, "bytes=5000-"]
    assert cli.main(words) == 0 and len(server.asked) == 2
    assert "(checked)" in capsys.readouterr().out
    data = wdat.load_data("cifar10", "test", "data/cifar10")
    assert torch.equal(data.pixels, pixels) and torch.equal(data.y, labels) and list(data.classes) == CLASSES
    assert cli.main(["fetch", "images"]) == 0
    read = wdat.load_data("data/cifar10_png", "test")
    order = labels[:30].argsort(stable=True)  # class by class, in the set's order
    assert torch.equal(read.pixels, pixels[order]) and torch.equal(read.y, labels[order])
    damaged = Path("data/cifar10/cifar-10-batches-py/test_batch")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert cli.main(words) == 0 and len(server.asked) == 2  # unpacked anew from the archive that is here
    assert torch.equal(wdat.load_data("cifar10", "test", "data/cifar10").pixels, pixels)


def test_cifar10_from_an_archive_at_hand_and_offline(official, capsys, no_network):
    content, pixels, _ = official
    assert cli.main(["fetch", "cifar10", "images", "--offline"]) == 2
    said = capsys.readouterr().err
    assert f"{len(content):,} bytes, md5" in said and "no folder" in said and not Path("data").exists()
    Path("downloads").mkdir()
    Path("downloads/c.tgz").write_bytes(content)
    assert cli.main(["fetch", "cifar10", "--from", "downloads"]) == 0
    assert torch.equal(wdat.load_data("cifar10", "train", "data/cifar10").pixels[:40], pixels)


def test_the_written_folder_is_that_of_the_third_party_records(png_test, tmp_path):
    """Their images are the first 1,017 of the test set as PNG files; a folder sorts them class by class."""
    x, y = png_test
    assert len(y) == fetch.LOSSLESS
    data = wdat.Data("cifar10", "test", (x * 255).round().to(torch.uint8), y, tuple(CLASSES))
    read = wdat.load_data(fetch.as_folder(data, tmp_path / "png", len(y)), "test")
    order = y.argsort(stable=True)
    assert torch.equal(read.pixels, data.pixels[order]) and torch.equal(read.y, y[order])
