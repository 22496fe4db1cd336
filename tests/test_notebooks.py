"""Every notebook runs headless in the smoke profile and leaves its records, figures and tables."""

import shutil
from pathlib import Path

import nbformat
import pytest
from outputs import FIGURES, TABLES, check_outputs

from wdat import records
from wdat.report import numbers
from wdat.reproduce.runner import reproduce
from wdat.reproduce.show import show

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks, run once: what a clone looks like after `wdat reproduce --profile smoke`."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "requirements.lock.txt"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns("*.ipynb", ".ipynb*"))
    ran = reproduce("smoke", root=root)
    assert sorted(ran) == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py"))
    return root


def test_every_notebook_leaves_a_record_with_its_origin(smoke):
    for notebook in (smoke / "notebooks").glob("[0-9]*.py"):
        own = list((smoke / "figures/smoke").glob(f"{notebook.stem[:2]}*.json"))
        assert own, f"{notebook.stem} left no record"
        for path in own:
            provenance = records.read(path)["provenance"]
            assert provenance["torch"] and provenance["device"] and provenance["date"]


@pytest.mark.parametrize(
    "figure",
    [
        "01_attack_derivation-slope", "01_attack_derivation-images", "01_attack_derivation-losses", "02_sensitivity",
        "02_upsilon_rules", "03_finetuning-variants", "03_finetuning-histories", "04_five_networks", "05_bounds",
        "06_how_robust-bracket-linf", "06_how_robust-bracket-l2", "06_how_robust-gap-linf",
        "06_how_robust-gap-l2", "06_how_robust-curves-linf",
        "06_how_robust-ranks-linf", "07_slow_start-cost", "07_slow_start-epochs", "08_classwise-bars",
        "08_classwise-spread", "08_classwise-budget", "08_classwise-confusion", "11_randomised-l2",
        "11_randomised-linf", "12_noise_training", "13_baselines-equal-clean",
        "09_distributed", "10_tickets", "10_tickets-kernel",
    ],
)  # fmt: skip
def test_every_figure_is_drawn_in_both_forms(smoke, figure):
    for ending, magic in ((".pdf", b"%PDF"), (".png", b"\x89PNG")):
        path = smoke / "figures/smoke" / (figure + ending)
        assert path.read_bytes().startswith(magic)
        assert path.stat().st_size > 3000


@pytest.mark.parametrize(
    "table",
    [
        "00_pretrain",
        "03_finetuning",
        "04_five_networks",
        "04_five_networks-attacks",
        "06_how_robust",
        "06_verification-convergence",
        "07_slow_start",
        "08_classwise",
        "08_classwise-temperatures",
        "08_worst_class",
        "09_distributed",
        "09_distributed-steps",
        "09_distributed-projected",
        "11_randomised",
        "11_randomised-aims",
        "12_noise_training",
        "13_baselines-validated",
        "13_baselines-causes",
    ],
)
def test_markdown_and_latex_hold_the_same_numbers(smoke, table):
    markdown, latex = ((smoke / "figures/smoke" / (table + ending)).read_text() for ending in (".md", ".tex"))
    rows = [line for line in markdown.splitlines()[2:] if line.startswith("|")]
    assert len(rows) == latex.count("\\\\\n") - 1 > 0
    first = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert all(cell.replace("%", r"\%") in latex for cell in first if cell.replace(".", "").isdigit())


def test_executed_copies_show_outputs_and_no_errors(smoke):
    for path in (smoke / "figures/smoke").glob("*.ipynb"):
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        outputs = [o for c in cells for o in c.outputs]
        assert outputs and not [o for o in outputs if o.output_type == "error"], path.name
        check_outputs(nbformat.read(path, 4))


def test_shown_from_records_a_notebook_computes_nothing_and_looks_the_same(smoke):
    """Records and scratch files untouched, not even there; outputs equal."""
    folder, made = smoke / "figures/smoke", smoke / ".wdat/smoke/made"

    def outputs() -> list:
        cells = [c for path in sorted(folder.glob("*.ipynb")) for c in nbformat.read(path, 4).cells]
        cells = [c for c in cells if c.cell_type == "code" and c.source.startswith(FIGURES + TABLES)]
        return [output["data"] for c in cells for output in c.outputs if "data" in output]

    def kept() -> dict:
        return {path: path.read_bytes() for path in (smoke / "figures").rglob("*.*") if path.suffix != ".ipynb"}

    before = outputs(), kept()
    made.rename(made.with_name("elsewhere"))
    shown = show("smoke", root=smoke)
    assert not made.exists()
    made.with_name("elsewhere").rename(made)
    assert (
        len(shown) == len(list((ROOT / "notebooks").glob("[0-9]*.py")))
        and outputs() == before[0]
        and kept() == before[1]
    )


def test_a_second_run_redoes_nothing_and_numbers_can_be_written(smoke):
    assert reproduce("smoke", root=smoke) == []
    found = numbers.numbers(smoke / "figures/smoke")
    assert len(found) > 20 and (smoke / "figures/smoke/numbers.tex").read_text().count(r"\csname") == len(found)


def test_the_published_attack_is_never_below_the_exact_allocation_by_more_than_the_search_misses(smoke):
    """Identity 16 on the smoke networks: exact <= W-PGD <= clean, up to one image for the three-step search."""
    for network in records.read(smoke / "figures/smoke/06_how_robust.json")["results"]["networks"]:
        for exact in network["optimal"]:
            for row in exact["threats"]:
                attacks = [
                    a["accuracy"] for a in network["attacks"] if a["attack"] == "w-pgd" and a["threat"] == row["threat"]
                ]
                assert attacks and max(attacks) <= network["clean"]["accuracy"]
                assert row["accuracy"] <= min(attacks) + 1 / 48


def test_the_exact_adversary_hands_out_what_it_claims(smoke):
    for row in records.read(smoke / "figures/smoke/06_verification.json")["results"]["sets"]:
        assert row["measured"] == pytest.approx(row["claimed"], abs=1e-9) and row["in_box"]
        assert row["measured_cost"] <= row["threat"]["delta"] * (1 + 1e-5)


def test_no_certificate_is_refuted(smoke):
    for network in records.read(smoke / "figures/smoke/06_how_robust.json")["results"]["networks"]:
        for certified in network["certified"]:
            assert certified["violations"] == 0 and certified["n"] == 8
            assert all(row["accuracy"] <= row["optimal"] + 1e-9 for row in certified["threats"])
