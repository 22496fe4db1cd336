"""Small records made by hand, for the tests of tables and figures."""

import json

from wdat import records

RADII = ("1/16", "2/16", "3/16")


def write(path, kind, results, seconds=60.0):
    made = {"device": "a CPU", "threads": 1, "torch": "2.0", "python": "3.11", "seconds": seconds}
    record = {"schema": records.SCHEMA, "kind": kind, "config": {}, "results": results, "provenance": made}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def values(text):
    """The first number of a cell or key: '12.3 ± 0.4' -> 12.3, '−1.5' -> -1.5."""
    return float(text.replace("−", "-").split()[0])


def run(network, variant, seed, clean, exact, upsilon=1.0):
    after = {
        "clean": clean, "optimal": dict(zip(RADII, exact, strict=True)), "w_pgd": dict.fromkeys(RADII, 0.5),
        "pointwise": {"1/16": 0.6}, "autoattack": {}, "worst_class": min(exact), "upsilon": upsilon,
    }  # fmt: skip
    own = {"network": network, "variant": variant, "method": variant, "seed": seed, "before": seed is None,
           "after": after}  # fmt: skip
    terms = [{"threat": "W_2", "realised_delta": 0.125, "norm_ratio": 0.5}]
    history = [{"epoch": 1, "validation_accuracy": 0.5, "terms": terms}]
    return own | ({} if seed is None else {"cost": {"gradients": 10, "full": 2}, "epochs": 3, "history": history})


def finetuning(runs):
    threats = [{"p": 2.0, "r": "inf", "delta": i / 16, "written": d} for i, d in enumerate(RADII, 1)]
    pairs = dict.fromkeys((r["network"], r["variant"]) for r in runs if not r["before"])
    chosen = [{"network": n, "method": v, "variant": v, "kept": v != "bold"} for n, v in pairs]
    return {"n_train": 90, "n_validation": 10, "n_test": 50, "threats": threats, "runs": runs, "chosen": chosen,
            "diverged": [], "comparison": [], "proposed": [], "baselines": []}  # fmt: skip


RUNS = [
    run("a", "before", None, 0.90, (0.60, 0.40, 0.20), 4.0),
    run("a", "safe", 0, 0.90, (0.62, 0.43, 0.20), 2.0),
    run("a", "safe", 1, 0.90, (0.64, 0.45, 0.20), 2.0),
    run("a", "bold", 0, 0.80, (0.70, 0.50, 0.30), 4.0),
    run("a", "bold", 1, 0.80, (0.70, 0.50, 0.30), 4.0),
    run("b", "before", None, 0.80, (0.50, 0.30, 0.10), 8.0),
    run("b", "safe", 0, 0.80, (0.50, 0.28, 0.10), 8.0),
    run("b", "safe", 1, 0.80, (0.50, 0.28, 0.10), 8.0),
    run("b", "bold", 0, 0.70, (0.50, 0.40, 0.10), 8.0),
    run("b", "bold", 1, 0.70, (0.50, 0.40, 0.10), 8.0),
]
