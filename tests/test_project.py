"""The shape of the repository: what imports what, what notebooks look like, what must never be committed."""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from outputs import check_outputs
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from wdat import digest, records
from wdat.reproduce import profiles, staleness

ROOT = Path(__file__).parents[1]
# What each room may import of wdat, besides itself; a new room is put in its place here.
ROOMS = {
    "clock": set(),
    "digest": set(),
    "files": set(),
    "records": {"clock", "digest", "files"},
    "settings": set(),
    "threats": {"settings"},
    "attacks": {"threats", "settings"},
    "accuracy": {"threats", "settings"},
    "zoo": {"threats", "records", "files", "settings", "digest"},
    "tickets": {"threats", "attacks", "zoo", "settings"},
    "training": {"threats", "attacks", "accuracy", "zoo", "records", "settings", "digest", "clock"},
    "randomised": {"threats", "attacks", "accuracy", "zoo", "records", "settings", "digest"},
    "studies": {
        "threats", "attacks", "accuracy", "zoo", "tickets", "training", "randomised", "records", "settings", "digest",
        "clock",
    },
    "report": {"records"},
    "reproduce": {"records", "settings", "digest"},
}  # fmt: skip
ROOMS["cli"] = set(ROOMS)
TORCH_FREE = ("clock", "digest", "files", "records", "settings", "report", "reproduce", "cli")
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "wdat").rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
EXECUTED = sorted([*(ROOT / "notebooks").glob("[0-9]*.ipynb"), *(ROOT / "figures").glob("*/[0-9]*.ipynb")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def tracked() -> list[Path]:
    """Files of the repository, those not committed yet too, without what git ignores."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: there is no list of tracked files")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# The library


def imports(module: str) -> set[str]:
    """Files that a file imports, without the packages around them; all if it imports by the front door."""
    found = set()
    for _, dotted in digest.imported(parse(MODULES[module]), module.rpartition(".")[0]):
        name = dotted if dotted in MODULES else dotted.rpartition(".")[0]
        found |= set(MODULES) if name == "wdat" else {name} & set(MODULES)
    return {name for name in found if MODULES[name].name != "__init__.py"}


def test_a_room_imports_only_the_rooms_below_it():
    found = {(name.split(".")[1], used.split(".")[1]) for name in set(MODULES) - {"wdat"} for used in imports(name)}
    assert {room for room, _ in found} <= set(ROOMS), "a room without a place: put it into ROOMS"
    assert not sorted(f"{room} imports {used}" for room, used in found if used not in ROOMS[room] | {room})


def test_no_imports_go_round_in_a_circle():
    left = {name: imports(name) for name in MODULES}
    while free := {name for name, used in left.items() if not used & set(left)}:
        left = {name: used for name, used in left.items() if name not in free}
    assert not left, f"in circles: {sorted(left)}"


def test_every_room_says_what_lives_there():
    for folder in {path.parent for path in MODULES.values()}:
        text = ast.get_docstring(parse(folder / "__init__.py"))
        assert text and (folder.name == "wdat" or "mports" in text), f"wdat/{folder.name}/__init__.py"


def test_figures_records_and_the_command_need_no_torch():
    names = ", ".join(name for name in MODULES if [*name.split("."), ""][1] in TORCH_FREE)
    code = f"import sys, {names}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "torchvision", "robustbench"} & set(loaded.split())


def test_bars_say_nothing_in_a_notebook_without_ipywidgets():
    code = """
        import sys, types
        sys.modules["IPython"] = types.SimpleNamespace(get_ipython=object)  # what tqdm looks at
        sys.modules |= {"ipykernel.zmqshell": object(), "ipywidgets": None}
        import wdat
        from tqdm.auto import tqdm
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_only_one_module_imports_robustbench():
    def names(tree: ast.AST) -> set[str]:
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        sources = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {name.split(".")[0] for name in [alias.name for node in imports for alias in node.names] + sources}

    users = {name for name, path in MODULES.items() if names(parse(path)) & {"robustbench", "autoattack"}}
    assert users <= {"wdat.zoo.robustbench"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_public_is_documented(module):
    tree = parse(MODULES[module])
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    methods = [n for c in public if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, ast.FunctionDef)]
    public += [method for method in methods if not method.name.startswith("_") and method.name != "forward"]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert not [node.name for node in public if not ast.get_docstring(node)], f"undocumented in {module}"


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]])
def test_style(words):
    ran = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# Notebooks


def code_cells(notebook: nbformat.NotebookNode) -> list[str]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin(source):
    profiles.declared(source)  # one parameters cell, of literals
    code = "\n".join(code_cells(jupytext.read(source)))
    tree = ast.parse(code)
    logic = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.Try, ast.While)
    assert not [ast.unparse(node)[:60] for node in ast.walk(tree) if isinstance(node, logic)]
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 80, f"{len(lines)} lines of code; move some into the library"


def test_notebooks_name_their_place_in_the_paper():
    """Sections are counted as LaTeX counts them."""
    paper = ROOT / "paper"
    order = re.findall(r"\\input\{(sections/\w+)\}", (paper / "main.tex").read_text(encoding="utf-8"))
    text = "".join((paper / f"{name}.tex").read_text(encoding="utf-8") for name in order)
    places, section, part = {}, 0, 0
    for sub, title in re.findall(r"\\(sub)?section\{([^}]*)\}", text):
        section, part = (section, part + 1) if sub else (section + 1, 0)
        places[title] = f"{section}.{part}" if sub else f"{section}"
    others = f"; third-party networks: {places['Networks trained by others']}"
    found = [
        re.search(r"\*Place in the paper: ([\d.]+) (.*)\.\*", path.read_text(encoding="utf-8")) for path in NOTEBOOKS
    ]
    assert all(places[where[2].removesuffix(others)] == where[1] for where in found)
    assert [where[2].endswith(others) for where in found] == [False] + [True] * (len(found) - 1)


@pytest.mark.parametrize("copy", EXECUTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_executed_copy_is_of_this_source(copy):
    source, executed = ROOT / "notebooks" / f"{copy.stem}.py", nbformat.read(copy, as_version=4)
    assert code_cells(executed) == code_cells(jupytext.read(source))
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    prose = [[c.source for c in nb.cells if c.cell_type == "markdown"] for nb in (executed, jupytext.read(source))]
    assert prose[0] == prose[1]


@pytest.mark.parametrize("copy", EXECUTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_cell_that_draws_shows_a_picture_and_every_table_a_table(copy):
    """In the committed copy, as a reader on the web sees it: images a page can bear, no progress bars."""
    source = ROOT / "notebooks" / f"{copy.stem}.py"
    seen = check_outputs(nbformat.read(copy, as_version=4))
    assert seen == len(re.findall(r"^(?:figures|tables|report)\.", source.read_text(encoding="utf-8"), re.M)) > 0


@pytest.mark.parametrize(
    "profile", sorted((ROOT / "notebooks" / "profiles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_parameter_in_a_profile_is_declared(profile):
    sources = profiles.notebooks(ROOT)
    settings = profiles.read_profile(ROOT, profile.stem, sources)
    profiles.parameters(sources, list(sources), settings, {}, {})


def test_every_figure_and_table_lies_beside_the_record_it_is_drawn_from():
    for folder in {path.parent for path in (ROOT / "figures").rglob("*.*")}:
        stems = [path.stem for path in folder.glob("*.json")]
        for path in folder.iterdir():
            if path.suffix in staleness.SHOWN and path.name != "numbers.tex":  # drawn from all of them
                assert any(path.stem == stem or path.stem.startswith(stem + "-") for stem in stems), (
                    f"{path} has no record"
                )
        for path in folder.glob("*.json"):
            assert records.read(path)["provenance"]["torch"]


# What is committed

FORBIDDEN = {
    "a path on some machine": r"(?<![\w.~])/(?:home|root|Users|work|mnt|scratch)/\w",
    "a package index": r"(?<!no-emit-)(?:index-url|find-links)|https?://[^\s/]*(?:pypi|artifactory|nexus|proxy|mirror)",
    "a local server": r"https?://(?:localhost|\d+\.\d+\.\d+\.\d+)",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_committed_file_names(what):
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a PDF or an image
        if path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in re.finditer(FORBIDDEN[what], text)]
    assert not found


def test_no_committed_file_is_large():
    assert not [f"{path.relative_to(ROOT)}" for path in tracked() if path.stat().st_size > 5 * 2**20]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# One set of versions


def pins() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock.txt").read_text(encoding="utf-8").splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    used = [r for r in required if r.marker is None or r.marker.evaluate()]
    assert all(re.fullmatch(r"==[^*]+", str(r.specifier)) for r in used), "every line of the lock pins one version"
    return {r.name.lower(): Version(str(r.specifier)[2:]) for r in used}


def test_the_lock_has_every_dependency_in_its_range():
    locked = pins()
    extras = PROJECT["optional-dependencies"]
    for line in [
        *PROJECT["dependencies"],
        *(line for extra in extras.keys() - {"cluster", "completion", "peers"} for line in extras[extra]),
    ]:
        wanted = Requirement(line)
        assert wanted.name in locked, f"{wanted.name} is not locked: run make lock"
        assert wanted.specifier.contains(locked[wanted.name]), f"{wanted} but locked at {locked[wanted.name]}"


def test_the_conda_environment_has_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "wdat" and environment["channels"] == ["conda-forge"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    (python,) = [entry.split("=")[1] for entry in plain if entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    assert "pip" in plain and len(plain) == 2  # anything else would come from conda, in another version
    assert pip == ["-r requirements.lock.txt", "-e ."]
    assert "-r requirements.lock.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_ci_runs_the_documented_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    assert commands == ["make test", "make test-slow"]
    assert all(command in (ROOT / "README.md").read_text(encoding="utf-8") for command in commands)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert {str(citation["version"]), re.search(r"^## (\S+)", changelog, re.M)[1]} == {PROJECT["version"]}
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    for field in ("cff-version", "message", "title", "authors", "date-released"):
        assert citation[field]
