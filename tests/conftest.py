"""Fixtures that several test modules share."""

import io
import os
import signal
import socket
import tarfile
from pathlib import Path

import pytest
import torch
from repository import notebook
from torch import Tensor, nn

from wdat import records
from wdat.reproduce import execution

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background: what the tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # busy OpenMP threads of parallel tests wait on each other, a hundred times slower than one


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of third-party weights and images: $WDAT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("WDAT_SHARED") or Path(__file__).parents[2] / "shared").absolute()
    if not folder.is_dir():
        pytest.skip(f"no third-party weights and images at {folder}; name their folder in WDAT_SHARED")
    return folder


@pytest.fixture(scope="session")
def png_test(shared: Path) -> tuple[Tensor, Tensor]:
    """Lossless CIFAR-10 test images in the official order: float32 (1017, 3, 32, 32) in [0, 1], int64 (1017,)."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    archive = shared / "data" / "cifar10_png_6k.tar"
    if not archive.is_file():
        pytest.skip(f"no lossless CIFAR-10 images at {archive}")
    with tarfile.open(archive) as tar:
        paths = sorted(
            (m.name for m in tar if m.name.startswith("test/") and m.isfile()), key=lambda name: name.split("/")[-1]
        )
        classes = sorted({path.split("/")[1] for path in paths})
        x = torch.stack([to_tensor(Image.open(io.BytesIO(tar.extractfile(path).read()))) for path in paths])
    return x, torch.tensor([classes.index(path.split("/")[1]) for path in paths])


@pytest.fixture
def tiny_model() -> nn.Module:
    """Seeded convolutional network, images (N, 3, 8, 8) -> 5 logits; untrained, without batch norm."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
        )


@pytest.fixture
def tiny_data(tiny_model: nn.Module) -> tuple[Tensor, Tensor]:
    """48 seeded images for `tiny_model` with its own predictions as labels, except every sixth, which is wrong."""
    x = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = tiny_model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 5
    return x, y


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection or look up a name fails the test."""

    def refuse(*arguments, **_):
        raise AssertionError(f"a network connection was attempted: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two notebooks; the second reads what the first wrote."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "wdat"\n')
    (tmp_path / "notebooks" / "profiles" / "digits.yaml").write_text("common: {n: 2}\n")
    notebook(tmp_path, "01_first", "(out / 'a.json').write_text(json.dumps({'n': n}))")
    notebook(tmp_path, "02_second", "(out / 'b.json').write_text((out / 'a.json').read_text())")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Notebooks that only pretend to run: each writes the files that `writes` names for it, with that content."""
    writes = {"01_first": {"figures/digits/a.json": "1"}, "02_second": {"figures/digits/b.json": "1"}}

    def execute(source, executed, passed, scratch, told, root, screen):
        for path, content in writes[source.stem].items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
        code = execution.load(source)
        records.write_file(executed, execution.tidy(code, root))
        return 0.0

    monkeypatch.setattr(execution, "execute", execute)
    return writes
