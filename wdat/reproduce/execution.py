"""Run one notebook in a fresh kernel, and make its executed copy fit to commit."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdat import records
from wdat.reproduce.screen import Screen

if TYPE_CHECKING:
    from nbformat import NotebookNode


class CellFailed(Exception):
    """A notebook stopped; the message names it, the cell and the exception, and where the rest can be read."""


def execute(
    source: Path,
    executed: Path,
    passed: dict[str, Any],
    scratch: Path,
    told: dict[str, str],
    root: Path,
    screen: Screen,
) -> float:
    """Run one notebook in a fresh kernel, in the folder of its source as Jupyter would; put its copy in place.

    told: environment variables of its kernel. Returns the seconds of cells with figures and tables. Several may run in
    threads of one process; `stop` ends their kernels.
    """
    import papermill
    from jupyter_core.utils import ensure_event_loop
    from papermill.exceptions import PapermillExecutionError

    partial = scratch / "notebooks" / f"{source.stem}.partial.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    relay = screen.of(source.stem.split("_")[0])
    saved = f"as far as it ran: {relative(root, partial)}; mend the cause and run the same command to go on"
    with kernel(scratch, source.parent, told) as manager:
        try:
            notebook = papermill.execute_notebook(
                load(source),
                partial,
                parameters=passed,
                kernel_name="python3",
                language="python",
                kernel_manager_class=manager,
                progress_bar=False,
                stdout_file=relay,
                stderr_file=relay,
                coalesce_streams=True,
            )
        except PapermillExecutionError as error:
            where = f"{source.stem} failed in cell [{error.exec_count}], {_failing_line(error)}"
            raise CellFailed(f"{where}: {error.ename}: {_first_line(error.evalue)}\n{saved}") from None
        except (RuntimeError, TimeoutError) as error:  # what nbclient raises for a kernel that died or never came up
            reason = f"{type(error).__name__}: {_first_line(str(error))}"
            last = _first_line("\n".join(reversed(manager.said.read_text(errors="replace").splitlines())))
            reason += f"; its last words: {last}" if last else "; out of memory?"
            raise CellFailed(f"{source.stem} stopped with its kernel ({reason})\n{saved}") from None
        finally:
            relay.write("\r")  # its bar is over
            ensure_event_loop().close()  # of this thread, which nobody else would
    drawing = sum(
        cell.metadata["papermill"]["duration"] or 0
        for cell in notebook.cells
        if cell.cell_type == "code" and re.search(r"^(figures|tables|report)\.", cell.source, flags=re.M)
    )
    records.write_file(executed, tidy(notebook, root))
    partial.unlink()
    return drawing


def spent(written: Iterable[Path]) -> dict[str, float]:
    """Seconds by kind of work from the records that one notebook has written: each says what was spent so far."""
    found: dict[str, float] = {}
    for path in written:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # no record
            for kind, seconds in json.loads(path.read_text())["provenance"]["spent"].items():
                found[kind] = max(found.get(kind, 0), seconds)
    return found


_kernels: set[int] = set()  # processes of those that run
_stopped = threading.Event()


@contextmanager
def stoppable() -> Iterator[None]:
    """If this is left by an exception, no kernel started inside goes on; their workers end with them."""
    _stopped.clear()
    try:
        yield
    except BaseException:
        _stopped.set()
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it would complain of every kernel's end
        for process in list(_kernels):
            _end(process)
        raise


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


@contextmanager
def kernel(scratch: Path, folder: Path, told: dict[str, str]) -> Iterator[type]:
    """A kernel manager class for this very interpreter that opens no port and writes nothing to the user's home."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    own = tempfile.mkdtemp(prefix="wdat-")
    if len(own) > 60:  # the path of a socket must stay below 108 characters
        shutil.rmtree(own)
        own = tempfile.mkdtemp(prefix="wdat-", dir="/tmp")
    environment = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # what oneDNN compiles for batches of many sizes
        "IPYTHONDIR": f"{own}/ipython",
        "JUPYTER_RUNTIME_DIR": own,
        "JUPYTER_DATA_DIR": own,
        "JUPYTER_CONFIG_DIR": own,
        "MPLCONFIGDIR": str(scratch.parent / "matplotlib"),
        # tqdm would advise to install widgets; the tracker tells what it cleans up after an interrupt
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore:resource_tracker",
        **told,
    }

    (Path(own) / "stderr").touch()

    class Manager(AsyncKernelManager):
        said = Path(own) / "stderr"  # the kernel's own: what cells print there comes as messages

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
            return KernelSpec(argv=argv, env=environment, display_name="Python 3", language="python")

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, transport="ipc", connection_file=f"{own}/kernel.json")
            self.shutdown_wait_time = 1.0  # half of it until SIGTERM, which ends its workers, too

        async def start_kernel(self, **options: Any) -> None:
            with self.said.open("w") as file:
                await super().start_kernel(**options, stderr=file, cwd=str(folder))
            _kernels.add(self.provisioner.pid)
            if _stopped.is_set():
                _end(self.provisioner.pid)

        async def shutdown_kernel(self, *words: Any, **options: Any) -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:  # an interrupt leaves them waiting for the kernel; they would complain of its end
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await super().shutdown_kernel(*words, **options)

        async def cleanup_resources(self, *words: Any, **options: Any) -> None:
            _kernels.discard(self.provisioner.pid if self.provisioner else None)
            await super().cleanup_resources(*words, **options)

    try:
        yield Manager
    finally:
        shutil.rmtree(own, ignore_errors=True)


def load(source: Path) -> "NotebookNode":
    """The source of a notebook, read in the form that papermill runs."""
    import jupytext

    return jupytext.read(source)


def with_new_text(source: Path, executed: Path, passed: dict[str, Any]) -> "NotebookNode":
    """The source's text around the outputs of the executed copy, when only prose and looks have changed."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    made = load_notebook_node(load(source))
    made = parameterize_notebook(made, passed, kernel_name="python3", language="python")
    old, new = ([c for c in n.cells if c.cell_type == "code"] for n in (nbformat.read(executed, as_version=4), made))
    for done, cell in zip(old, new, strict=True):
        cell |= {"outputs": done.outputs, "execution_count": done.execution_count}
        if "injected-parameters" in cell.metadata.tags:
            cell.source = done.source  # what it was run with
    return made


def tidy(notebook: "NotebookNode", root: Path) -> str:
    """The executed notebook as text fit to commit: no machine's paths, no clock times, no progress bars."""
    import nbformat

    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags" and v})
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                bars = r"[^\n]*\d+%\|[^\n]*\n?|[^\n]*\d+(\.\d+)?(it/s|s/it)\][^\n]*\n?|[^\n]*\d+ of \d+ runs,[^\n]*\n?"
                output.text = re.sub(bars, "", output.text)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
    text = nbformat.writes(notebook, version=4)
    for path in {str(root), os.path.realpath(root)}:
        text = text.replace(f"{path}/", "").replace(path, ".")
    text = re.sub(r"[\w/.~-]*/site-packages/", "site-packages/", text)
    if sys.prefix.count("/") > 1:  # an environment, not /usr
        text = text.replace(sys.prefix, ".venv")
    if len(home := str(Path.home())) > 1:
        text = text.replace(f"{home}/", "~/")
    return re.sub(r"[\w/.-]*/ipykernel_\d+/\d+\.py", "<cell>", text) + "\n"


def relative(root: Path, path: Path) -> str:
    """A path as messages and the state on disk give it: from the root on, or whole if it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _failing_line(error: Any) -> str:
    """The line of the cell that raised, from the traceback; the cell's first line if there is none (bad syntax)."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    if arrow := re.search(r"-+> *(\d+) (.*)", plain):
        return f"line {arrow[1]} `{arrow[2].strip()[:80]}`"
    return f"`{_first_line(error.source)[:80]}`"


def _first_line(text: str) -> str:
    return next((line.strip()[:400] for line in text.splitlines() if line.strip()), "")
