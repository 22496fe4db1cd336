"""Tables from records: the same rows as HTML (notebooks), Markdown (README) and LaTeX (paper).

Each function takes the path of one record: NAME.json -> NAME.md and NAME.tex (or NAME-SUFFIX). No torch.
"""

from collections.abc import Callable

from wdat.report.rows import (
    ball,
    best_rows,
    chosen_runs,
    evaluation_rows,
    loss_name,
    mean,
    mean_std,
    names,
    norm_name,
    norm_symbol,
    norms_of,
    order_symbol,
    passes_of,
    percent,
    rank_rows,
    shown,
    signed,
    where,
)
from wdat.report.table import tabled


def _of_runs(
    found: dict, columns: dict[str, Callable[[dict], float]], extra: Callable[[list[dict]], dict]
) -> list[dict]:
    """A row for each network, pre-trained and by each method at the setting chosen on validation images."""
    runs = chosen_runs(found)
    exceeding = {(c["network"], c["variant"]) for c in found["chosen"] if not c["kept"]}
    grouped = {name: mean_std(runs, value) for name, value in columns.items()}
    rows = []
    for key in dict.fromkeys((r["network"], r["variant"]) for r in runs):
        own = where(runs, network=key[0], variant=key[1])
        method = shown(own[0]["method"]) + (" †" if key in exceeding else "")
        cells = {name: percent(*group[key]) if key in group else "–" for name, group in grouped.items()}
        rows.append({"network": key[0], "method": method, **cells, **extra(own)})
    return rows


@tabled("finetuning")
def finetuning(found: dict) -> tuple[list[dict], str]:
    """Networks pre-trained and fine-tuned: mean ± standard deviation over seeds, in percent.

    Of a method with several settings the one chosen on validation images; † if it loses more than 1 point of clean or
    0.5 of pointwise accuracy there, as all of its settings do.
    """
    columns = {"clean": lambda r: r["after"]["clean"]}
    for d in list(found["runs"][0]["after"]["pointwise"])[:1]:
        columns[f"W_∞ {d}"] = lambda r, d=d: r["after"]["pointwise"][d]
    for threat in found["threats"]:
        columns[f"A_δ {threat['written']}"] = lambda r, d=threat["written"]: r["after"]["optimal"][d]
    columns["worst class"] = lambda r: r["after"]["worst_class"]
    seeds = len(names(where(found["runs"], before=False), "seed"))
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ""
    pointwise = "; W_∞: pointwise, by the nearest adversarial examples found" * any("W_∞" in c for c in columns)
    caption = (
        f"Percent correct on {found['n_test']} test images{spread}. A_δ: under W₂ at radius δ, by optimal allocation "
        f"(upper bound){pointwise}; worst class: its A_δ at δ = {found['threats'][0]['written']}. † no setting keeps "
        "clean and pointwise accuracy."
    )
    return _of_runs(found, columns, lambda own: {}), caption


@tabled("finetuning", "attacks")
def attacked(found: dict) -> tuple[list[dict], str]:
    """The same networks, the settings chosen, and what attacks leave: W-PGD, pointwise, AutoAttack; Υ and passes.

    AutoAttack may have run on fewer seeds and on part of the images, of how many the heading says where the
    record does: in brackets what the nearest adversarial examples leave of those.
    """
    columns = {f"W-PGD {t['written']}": lambda r, d=t["written"]: r["after"]["w_pgd"][d] for t in found["threats"]}
    for d in found["runs"][0]["after"]["pointwise"]:
        columns[f"W_∞ {d}"] = lambda r, d=d: r["after"]["pointwise"][d]

    n = found["runs"][0]["after"].get("autoattack_n")
    beside = f"nearest, n = {n}" if n else "nearest"

    def extra(own: list[dict]) -> dict:
        cells = {}
        for d in found["runs"][0]["after"].get("autoattack", {}):
            met = [r["after"] for r in own if d in r["after"].get("autoattack", ())]
            both = [percent(mean([after[key][d] for after in met])[0]) for key in ("autoattack", "nearest") if met]
            cells[f"AutoAttack {d} ({beside})"] = "{} ({})".format(*both) if both else "–"
        upsilon = mean([r["after"]["upsilon"] for r in own])[0]
        setting = own[0]["variant"].removeprefix(own[0]["method"]).strip(" ,")
        first = {} if own[0]["before"] else {"setting": setting}
        return {**cells, "Υ": f"{upsilon:.2f}", "passes": "0" if own[0]["before"] else passes_of(own[0]), **first}

    rows = _of_runs(found, columns, extra)
    columns = [name for name in dict.fromkeys(k for row in rows for k in row) if any(row.get(name) for row in rows)]
    rows = [{name: row.get(name) or "–" for name in columns} for row in rows]
    part = f"; AutoAttack on {n or 'part'} of them, in brackets what the nearest adversarial examples leave of those"
    part *= any(name.startswith("AutoAttack") for name in columns)
    caption = (
        f"Percent correct on {found['n_test']} test images by attack{part}; Υ of ReDLR; passes: gradient passes per "
        "training image."
    )
    return rows, caption


def _differences(rows: list[dict]) -> list[dict]:
    """A row for each network and proposed method: its differences to the best baseline by radius, with intervals."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        first = {"network": row["network"], "method": shown(row["proposed"]), "clean": percent(row["clean"])}
        best = row["differences"]["best baseline"]
        value, low, high = ("–" if best[key] is None else signed(best[key]) for key in ("value", "low", "high"))
        cells = table.setdefault((row["network"], row["proposed"]), first)
        cells[f"δ = {row['delta']}"] = value if value == "–" else f"{value} [{low}, {high}]"
    return list(table.values())


def _equal_caption(found: dict, offset: float) -> str:
    return (
        f"Accuracy by optimal allocation (upper bound) above the best of {', '.join(found['baselines'])}, in points, "
        f"where both give up at most {abs(100 * offset):g} points of clean accuracy; 95 % over the draw of test "
        "images, mean of the seeds."
    )


@tabled("finetuning", "equal-clean")
def compared(found: dict, offset: float = -0.01) -> tuple[list[dict], str]:
    """Proposed methods against the best baseline at equal clean accuracy, `offset` from the pre-trained one's.

    Differences in points with the interval of a paired bootstrap over test images.
    """
    return _differences(where(found["comparison"], offset=offset)), _equal_caption(found, offset)


@tabled("finetuning", "best")
def best_proposed(found: dict, offset: float = -0.01) -> tuple[list[dict], str]:
    """Of `compared` the rows of the best proposed method alone."""
    return _differences(best_rows(found, offset)), _equal_caption(found, offset)


@tabled("evaluation")
def evaluation(found: dict) -> tuple[list[dict], str]:
    """Optimal allocation beside W-PGD (PGD for p = inf) for every network and threat, in percent.

    The attack's loss is ReDLR, or the first one of a network without it (two classes). The order p has a column
    unless it is 2 throughout. The bracket, certified to optimal allocation (beside it the lower end before branch and
    bound), and AutoAttack (beside it what the nearest adversarial examples leave) are of the same images, of how many
    the heading says.
    """
    rows = []
    for network in found["networks"]:
        kinds = [a["loss"] for a in network["attacks"]]
        loss = "redlr" if "redlr" in kinds else next(iter(kinds), None)
        own = [a for a in network["attacks"] if a["attack"] in ("w-pgd", "pgd") and a["loss"] == loss]
        attacks = {ball(a["threat"]): a for a in own}
        auto = {ball(a["threat"]): a for a in network.get("autoattack", [])}
        for number, exact in enumerate(network["optimal"]):
            certified = network.get("certified", [None] * len(network["optimal"]))[number]
            for i, row in enumerate(exact["threats"]):
                key = ball(row["threat"])
                if key not in attacks:
                    continue
                low, high = row["band"]
                cells = {
                    "network": network["network"] + "*" * bool(network.get("findings")), "norm": norm_symbol(key[1]),
                    "p": order_symbol(key[2]), "δ": key[0],
                    "clean": percent(network["clean"]["accuracy"]), "W-PGD": percent(attacks[key]["accuracy"]),
                    "optimal (upper bound)": percent(row["accuracy"]), "95 %": f"{100 * low:.1f}–{100 * high:.1f}",
                }  # fmt: skip
                if certified:
                    proved = certified["threats"][i]
                    ends = percent(proved["accuracy"]), percent(proved.get("optimal", row["accuracy"]))
                    cells[f"bracket (n = {certified.get('n', found['n'])})"] = "–".join(ends)
                    if "branching" in certified:
                        cells["CROWN alone"] = percent(proved["crown"])
                if auto:
                    n, same = min(a.get("n", found["n"]) for a in auto.values()), auto.get(key, {}).get("optimal")
                    beside = f" ({percent(same)})" if same is not None else ""
                    cells[f"AutoAttack (n = {n})"] = percent(auto[key]["accuracy"]) + beside if key in auto else "–"
                rows.append(cells)
    if all(row["p"] == "2" for row in rows):
        rows = [{name: text for name, text in row.items() if name != "p"} for row in rows]
    caption = (
        f"Percent correct on {found['n']} test images under Wasserstein threats: by W-PGD, by optimal allocation "
        "(upper bound) with its 95 % band, and the bracket, certified (lower bound) to optimal allocation on the n "
        "images certified. AutoAttack: on n images, in brackets what the nearest adversarial examples leave of these."
    )
    if any("CROWN alone" in row for row in rows):
        caption += " CROWN alone: the lower end before branch and bound."
        rows = [row | {"CROWN alone": row.get("CROWN alone", "–")} for row in rows]
    for network in found["networks"]:
        if network.get("findings"):
            caption += f" * {network['network']}: {'; '.join(network['findings'])}."
    return rows, caption


@tabled("evaluation", "overview-{r}")
def overview(found: dict, r: float | str = "inf") -> tuple[list[dict], str]:
    """One row a network at p = 2 in one norm: clean accuracy, then W-PGD / optimal allocation at every radius.

    Known: of the images certified that are classified correctly, those whose minimal distance is known within 1 %.
    """
    frame: dict[str, dict[str, str]] = {}
    for row in evaluation_rows(found, float(r)):
        cells = frame.setdefault(row["network"], {"network": row["network"], "clean": percent(row["clean"])})
        cells[f"δ = {row['written']}"] = f"{percent(row['w-pgd'])} / {percent(row['optimal'])}"
    caption = f"Percent correct on {found['n']} test images under W₂, {norm_name(r)}"
    caption += ": W-PGD / optimal allocation, both upper bounds."
    known = {
        network["network"]: c["known"] for network in found["networks"] for c in network.get("certified", [])
        if float(c["r"]) == float(r) and "known" in c
    }  # fmt: skip
    if known:
        caption += " Known: minimal distances known within 1 %, of the images right and certified."
        frame = {
            name: cells | {"known": percent(known[name]) if name in known else "–"} for name, cells in frame.items()
        }
    return list(frame.values()), caption


@tabled("verification", "sets")
def verified(found: dict) -> tuple[list[dict], str]:
    """The handed-out adversarial sets: claimed against re-measured accuracy and W_p cost."""
    rows = [
        {"network": row["network"], "claimed %": percent(row["claimed"]), "measured %": percent(row["measured"]),
         "W_p / δ": f"{row['measured_cost'] / row['threat']['delta']:.6f}", "in the box": str(row["in_box"])}
        for row in found["sets"]
    ]  # fmt: skip
    return rows, "The adversarial distribution of the optimal allocation, measured again."


@tabled("verification", "convergence")
def converged(found: dict) -> tuple[list[dict], str]:
    """What a longer search still gains, in points of accuracy, at the radius where it gains most."""
    rows = []
    for row in found["convergence"]:
        gains = {t["threat"]["written"]: t["accuracy"] - t["longer"] for t in row["threats"]}
        worst = max(gains, key=gains.get)
        rows.append({
            "network": row["network"], "norm": norm_symbol(row["r"]),
            "passes": f"{row['passes']:.0f}", "longer": f"{row['longer_passes']:.0f}",
            "largest gain (points)": f"{100 * gains[worst]:.2f}", "at δ": worst,
            "last restart (% of d)": f"{100 * row['gains'][-1]:.2f}" if row.get("gains") else "–",
        })  # fmt: skip
    return rows, "Forward equivalents per image, and what the longer search gains."


@tabled("verification", "probes")
def probed(found: dict) -> tuple[list[dict], str]:
    """Probes inside certified balls, and how many changed the prediction: one would refute the certificates."""
    rows = [
        {"network": row["network"], "norm": norm_symbol(row["r"]), "certified images": str(row["images"])}
        | {name: str(row[name]) for name in ("probes", "violations")}
        for row in found.get("probes", [])
    ]
    return rows, "Attacks inside the certified balls."


@tabled("evaluation", "ranks")
def ranks(found: dict) -> tuple[list[dict], str]:
    """How far W_∞ and W₂ order the networks alike, at each radius: Kendall's tau and the pairs in reversed order."""
    rows = [
        {"norm": row["norm"], "δ": row["written"], "Kendall's τ": f"{row['tau']:.2f}",
         "pairs reversed": f"{row['reversed']} of {row['pairs']}"}
        for row in rank_rows(found)
    ]  # fmt: skip
    return rows, "Order of the networks under W_∞ and under W₂ at the same radius (ties count as neither)."


@tabled("evaluation", "dual")
def dual(found: dict) -> tuple[list[dict], str]:
    """Mean cross-entropy V(δ) reached by W-PGD (its highest iterate) and by the dual attack, and its estimate."""
    rows = []
    for network in found["networks"]:
        for row in where(network.get("dual", []), p=2):
            r, written = row["threat"]["r"], row["threat"]["written"]
            for attack in where(network["attacks"], attack="w-pgd", loss="ce", p=2, r=r, written=written):
                values = {
                    "V(0)": network["clean"]["losses"]["ce"]["v0"], "W-PGD": attack["highest_loss"],
                    "dual attack": row["loss_value"], "estimate": row["estimate"],
                }  # fmt: skip
                cells = {name: f"{value:.3f}" for name, value in values.items()}
                rows.append({"network": network["network"], "norm": norm_symbol(r), "δ": written, **cells})
    return rows, "Mean cross-entropy under W₂ threats: clean, by W-PGD, by the dual attack; the dual's own estimate."


@tabled("evaluation", "failures")
def failures(found: dict) -> tuple[list[dict], str]:
    """The smallest radius measured at which the first-order R^l of each loss lies above the optimal allocation, W₂."""
    frame: dict[tuple[str, float], dict[str, str]] = {}
    for r in norms_of(found):
        rows = evaluation_rows(found, r)
        for network, loss in dict.fromkeys((row["network"], loss) for row in rows for loss in row["bounds"]):
            cells = frame.setdefault((network, r), {"network": network, "norm": norm_symbol(r)})
            own = [row for row in where(rows, network=network) if loss in row["bounds"]]
            bounds = [(row["written"], row["bounds"][loss]["r_l"], row["ratio"]) for row in own]
            above = [f"{written} ({r_l:.2f} > {ratio:.2f})" for written, r_l, ratio in bounds if r_l > ratio + 1e-9]
            cells[loss_name(loss)] = next(iter(above), "–")
    caption = "Smallest radius measured at which R^l exceeds the ratio by optimal allocation (R^l > R); – if at none."
    return list(frame.values()), caption


@tabled("pretraining")
def pretraining(found: dict) -> tuple[list[dict], str]:
    """The networks a run trained for itself."""
    rows = [
        {"network": n["name"], "training": n["training"], "train accuracy": percent(n["history"][-1]["accuracy"])}
        for n in found["networks"]
    ]
    return rows, "Networks trained by this run."
