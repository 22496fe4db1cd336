"""How robust networks are: evaluations, their bounds and the order of networks; what checks of them found."""

from wdat.report.rows import (
    ball,
    evaluation_rows,
    loss_name,
    norm_name,
    norm_symbol,
    norms_of,
    order_symbol,
    percent,
    rank_rows,
    where,
)
from wdat.report.table import tabled


@tabled("evaluation")
def evaluation(found: dict) -> tuple[list[dict], str]:
    """Optimal allocation beside W-PGD (PGD for p = inf) for every network and threat, in percent.

    The attack's loss is ReDLR, or the first one where that was not asked for. The order p has a column
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
