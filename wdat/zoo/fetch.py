"""Networks and images of other people, brought here: from a folder or archive at hand, or from their public address.

A file is the one meant if its size and digest say so, whatever it is called. Published networks lie in their authors'
containers; what a card names is the same weights as plain tensors, repackaged here and held to the card's digest.
Members of archives are read, never unpacked to where they say.
"""

import contextlib
import hashlib
import io
import lzma
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import torch

from wdat import records
from wdat.zoo.data import TORCHVISION, Data, load_data
from wdat.zoo.models import read_card
from wdat.zoo.weights import check_weights, read_weights, sha256, weight_file

CROWN = (
    "https://raw.githubusercontent.com/Verified-Intelligence/alpha-beta-CROWN/8250d5fbd530c76e5e3243db28b3cad5fbaef740"
    "/complete_verifier/models/"
)
PUBLISHED = {  # the file under CROWN, its bytes and sha256; the cards in notebooks/zoo say whose it is, and the licence
    "cifar_cnn_a_adv": (
        "sdp/cifar_cnn_a_adv.model", 862519, "e45d79e68342395f4ada6f89852ae41feba14b430a3b2462a04d7f5e02c65657"
    ),
    "cifar_cnn_a_adv4": (
        "sdp/cifar_cnn_a_adv4.model", 862519, "f872a69536be3f0ab98397094bb7c3952d747b08321b81eafd00d9fab5eca0e7"
    ),
    "cifar_cnn_a_mix": (
        "sdp/cifar_cnn_a_mix.model", 862519, "5a1370f41961766db169ad9f945e9cc3157c9afd7986eac73bf2786c35dc3773"
    ),
    "cifar_conv_small_pgd": (
        "eran/cifar_conv_small_pgd.pth", 504448, "01adb410a8f561aa19e53a2168ca5c71a795a72a2be18c80eb400cf2e54cdd50"
    ),
    "resnet2b": (
        "cifar10_resnet/resnet2b.pth", 453823, "ef824b47175668e924d7fd409b5ef7e239012b8f0c31fefa66c643efda1eb05b"
    ),
}  # fmt: skip
CIFAR = {"cifar10": 170498071, "cifar100": 169001437}  # bytes of the official archives; torchvision has their MD5
TERMS = "no formal licence; distributed for research, cite Krizhevsky, Learning Multiple Layers of Features, 2009"
LOSSLESS = 1017  # test images of the profile zoo: the first of the official order


@dataclass(frozen=True)
class Wanted:
    """A published file: where it is to be had, its size in bytes and its digest."""

    url: str
    bytes: int
    digest: str
    algorithm: str = "sha256"

    @property
    def name(self) -> str:
        """Its name where it was published."""
        return self.url.rpartition("/")[2]

    def is_in(self, file: IO[bytes]) -> bool:
        """Whether an open file holds it, of the right size as is known."""
        return hashlib.file_digest(file, self.algorithm).hexdigest() == self.digest


def network(card_path: str | Path, folder: str | Path, place: str | Path | None = None, offline: bool = False,
            address: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Bring the weights that a card names into `folder`; what they are and where they came from.

    Args:
        card_path: a card whose weights are published (`PUBLISHED`), or come with an installed package.
        place: a folder (searched below, by content) or a tar or zip archive that may hold the published or the
            repackaged file.
        offline: look, but ask no server. address: another one that has the published files.

    Raises FileNotFoundError with what to put where if they can not be had, ValueError for what is not what it should
    be, OSError for a server that does not answer.
    """
    card, folder = read_card(card_path), Path(folder)
    said = {key: card.get(key) for key in ("name", "bytes", "sha256", "licence", "source")}
    if card["weights"].startswith("package:"):
        return said | {"path": str(weight_file(card["weights"], folder, card.get("source"))), "from": "package"}
    if card["name"] not in PUBLISHED:
        raise ValueError(f"{card_path}: where its weights are published is not known; put {card['weights']} into "
                         f"{folder} (source: {card.get('source') or 'not stated'})")  # fmt: skip
    path, (inside, size, digest) = folder / card["weights"], PUBLISHED[card["name"]]
    said["path"] = str(path)
    if path.is_file() and sha256(path) == card["sha256"]:
        return said | {"from": "here"}
    packed, plain = Wanted((address or CROWN) + inside, size, digest), Wanted("", card["bytes"], card["sha256"])
    for wanted in (plain, packed):
        with _found(place, wanted) as file:
            if file:
                content = file.read()
                records.write_file(path, content if wanted is plain else _repackaged(content, packed.name, card))
                return said | {"from": str(place)}
    if offline:
        raise FileNotFoundError(_by_hand(packed, path, f"then: wdat fetch {card['name']} --from {folder}"))
    part = download(packed, path.with_name(f".{packed.name}.part"))
    records.write_file(path, _repackaged(part.read_bytes(), packed.name, card))
    part.unlink()
    return said | {"from": packed.url}


def _repackaged(content: bytes, name: str, card: dict[str, Any]) -> bytes:
    """The plain tensors in a published container, as the file that a card names."""
    with tempfile.TemporaryDirectory() as folder:
        container, path = (
            Path(folder) / name,
            Path(folder) / card["weights"],
        )  # torch.save writes the name into the file
        container.write_bytes(content)
        check_weights(container, "fetch it again")
        state = read_weights(container)
        torch.save({key: value.contiguous().clone() for key, value in state.items()}, path)
        if (found := sha256(path)) != card["sha256"]:
            raise ValueError(
                f"{name} is the published file, but torch {torch.__version__} packs its weights into another file "
                f"(sha256 {found}) than the card's; use the torch of requirements.lock.txt for this"
            )
        return path.read_bytes()


def images(name: str, root: str | Path, place: str | Path | None = None, offline: bool = False,
           address: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Bring CIFAR-10 or CIFAR-100 to where `load_data(name, root=root)` reads it: torchvision's archive and its check.

    Arguments and errors as of `network`; `place` may be the archive itself.
    """
    import torchvision

    kind, root = getattr(torchvision.datasets, TORCHVISION[name][0]), Path(root)
    wanted = Wanted((address or kind.url.rpartition("/")[0] + "/") + kind.filename, CIFAR[name], kind.tgz_md5, "md5")
    said = {"name": name, "bytes": wanted.bytes, "md5": wanted.digest, "licence": TERMS, "source": kind.url}
    said["path"] = str(root / kind.base_folder)
    try:
        kind(root, download=False)
        return said | {"from": "here"}
    except RuntimeError:
        pass  # not there, or not all of it
    archive, origin = root / kind.filename, "here"
    if not (archive.is_file() and _is(archive, wanted)):
        with _found(place, wanted) as file:
            if file:
                origin = str(place)
                records.write_file(archive, file.read())
            elif offline:
                raise FileNotFoundError(_by_hand(wanted, archive, "then run this again"))
            else:
                origin = wanted.url
                os.replace(download(wanted, root / f".{kind.filename}.part"), archive)
    with warnings.catch_warnings():  # of the missing filter, from Python 3.12 on: the archive is known by its digest
        warnings.filterwarnings("ignore", "Python 3.14 will, by default, filter", DeprecationWarning)
        kind(root, download=True)  # unpacks what is there, and checks every file
    return said | {"from": origin}


def as_folder(data: Data, folder: str | Path, n: int) -> Path:
    """Write the first n images of a set as folder/test/CLASS/NNNNN.png, lossless, numbered in the set's order.

    `load_data` reads them back, class by class. Those that are there are written again.
    """
    from PIL import Image

    first = data.take(n)
    for number, (pixels, label) in enumerate(zip(first.pixels, first.y.tolist(), strict=True)):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        path = Path(folder) / data.split / data.classes[label] / f"{number:05d}.png"
        records.write_file(path, file.getvalue())
    return Path(folder)


def lossless(folder: str | Path, root: str | Path) -> dict[str, Any]:
    """The test images of the profile zoo, out of CIFAR-10 under `root`, into `folder`; what was written."""
    data = load_data("cifar10", "test", root)
    as_folder(data, folder, LOSSLESS)
    said = {"name": "images", "bytes": None, "sha256": load_data(folder, "test").sha256, "licence": TERMS}
    return said | {"source": f"the first {LOSSLESS} test images of {root}", "path": str(folder), "from": str(root)}


def download(wanted: Wanted, part: Path) -> Path:
    """Bring a file to the path `part`, going on where an earlier try ended; checked by size and digest.

    ValueError if what comes is another file or a page, which is removed; OSError, with how much has come, if the
    connection fails, after which the same call goes on.
    """
    from tqdm.auto import tqdm

    have = part.stat().st_size if part.is_file() else 0
    try:
        if have < wanted.bytes:
            request = urllib.request.Request(wanted.url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                have = have if goes_on else 0
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("ab" if goes_on else "wb") as file, tqdm(
                    desc=wanted.name, total=wanted.bytes, initial=have, unit="B", unit_scale=True, leave=False
                ) as bar:  # fmt: skip
                    while have <= wanted.bytes and (chunk := answer.read(1 << 16)):
                        file.write(chunk)
                        have += len(chunk)
                        bar.update(len(chunk))
    except (OSError, HTTPException) as error:
        kept = f"; {have:,} of {wanted.bytes:,} bytes have come: run the same command to go on" if have else ""
        raise OSError(f"cannot fetch {wanted.url} ({error}){kept}; or fetch it elsewhere and pass --from") from error
    with part.open("rb") as file:
        page = file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html"))
    if page or have > wanted.bytes or (have == wanted.bytes and not _is(part, wanted)):
        part.unlink()
        what = (
            "an HTML page" if page else f"more than {wanted.bytes:,} bytes" if have > wanted.bytes else "another file"
        )
        raise ValueError(f"{wanted.url} gave {what}, not the file of {wanted.bytes:,} bytes and {wanted.algorithm} "
                         f"{wanted.digest}; nothing was kept. Try again later, or pass --from")  # fmt: skip
    if have < wanted.bytes:
        raise OSError(f"{wanted.url}: the connection ended at {have:,} of {wanted.bytes:,} bytes; run the same command "
                      "to go on")  # fmt: skip
    return part


def _is(path: Path, wanted: Wanted) -> bool:
    with path.open("rb") as file:
        return path.stat().st_size == wanted.bytes and wanted.is_in(file)


def _by_hand(wanted: Wanted, path: Path, then: str) -> str:
    return (
        f"{path} is not here, and no server was asked. Fetch {wanted.url} ({wanted.bytes:,} bytes, {wanted.algorithm} "
        f"{wanted.digest}) where there is a network, put it into {path.parent}, {then}"
    )


@contextmanager
def _found(place: str | Path | None, wanted: Wanted) -> Iterator[IO[bytes] | None]:
    """The wanted file in a folder, in an archive, or as it is, open at its start; None if it is not there."""
    with contextlib.ExitStack() as opened:
        yield next(_candidates(Path(place), wanted, opened), None) if place else None


def _candidates(place: Path, wanted: Wanted, opened: contextlib.ExitStack) -> Iterator[IO[bytes]]:
    if not place.exists():
        raise FileNotFoundError(f"{place} is not here; name a folder or an archive that holds {wanted.name}")
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file() and _is(path, wanted):
            yield opened.enter_context(path.open("rb"))
    try:
        inside: Iterator[IO[bytes]] = iter(())
        if place.is_file() and zipfile.is_zipfile(place):
            zipped = opened.enter_context(zipfile.ZipFile(place))
            inside = (zipped.open(m) for m in zipped.infolist() if m.file_size == wanted.bytes)
        elif place.is_file() and tarfile.is_tarfile(place):
            tar = opened.enter_context(tarfile.open(place))  # noqa: SIM115
            inside = (tar.extractfile(m) for m in tar if m.isfile() and m.size == wanted.bytes)
        for file in inside:
            if wanted.is_in(file):
                file.seek(0)
                yield file
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{place} can not be read as an archive ({error}); fetch it again") from error
