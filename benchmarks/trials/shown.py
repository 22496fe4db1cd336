"""What the records of the trials say, as tables beside them. No torch."""

from wdat.report.table import tabled


@tabled("trials-kills")
def kills(found: dict) -> tuple[list[dict[str, str]], str]:
    """What was killed how often, and what was wrong afterwards."""
    rows = [
        {
            "killed": row["work"], "kills": str(row["kills"]), "of the kernel": str(row["of_kernels"]),
            "runs resumed to the end": str(row["runs"]), "with the same results": str(row["in_the_same"]),
            "files not whole": str(len(row["unreadable"])), "wrong results": str(len(row["wrong"])),
            "left while writing": str(row["left_writing"]), "still there at the end": str(row["left_after"]),
        }
        for row in found["works"]
    ]  # fmt: skip
    return rows, "SIGKILL at random moments, up to eight times a run."


@tabled("trials-downloads")
def downloads(found: dict) -> tuple[list[dict[str, str]], str]:
    """How often each fetch was tried, and what came of it."""
    rows = [
        {
            "fault": row["fault"], "fetches": str(row["fetches"]), "tries": str(row["tries"]),
            "killed": str(row["killed"]), "sent, of the file": f"{row['sent']:.2f}",
            "wrong files": str(row["wrong"]), "arrived": str(row["arrived"]),
        }
        for row in found["downloads"]
    ]  # fmt: skip
    return rows, "Fetches from a server on this machine, tried again until they end with the file."


@tabled("trials-inputs")
def inputs(found: dict) -> tuple[list[dict[str, str]], str]:
    """How many bad inputs each call got, and what it did with them."""
    rows = [
        {
            "call": row["call"], "inputs": f"{row['inputs']:,}", "refused": f"{row['refused']:,}",
            "harmless": f"{row['taken']:,}", "faults": str(len(row["faults"])),
        }
        for row in found["calls"]
    ]  # fmt: skip
    total = {key: sum(row[key] for row in found["calls"]) for key in ("inputs", "refused", "taken")}
    rows.append({
        "call": "all", "inputs": f"{total['inputs']:,}", "refused": f"{total['refused']:,}",
        "harmless": f"{total['taken']:,}", "faults": str(sum(len(row["faults"]) for row in found["calls"])),
    })  # fmt: skip
    return rows, "Generated bad inputs; harmless: changed texts and files whose result was still a right one."


@tabled("trials-stream")
def stream(found: dict) -> tuple[list[dict[str, str]], str]:
    """Largest memory and time of growing sets, and what each further image added, beside its own pixels."""
    rows = [
        {
            "images": f"{row['n']:,}", "attack": "pointwise" if row["p"] == "inf" else "W₂",
            "seconds": f"{row['seconds']:.0f}", "memory before, MB": f"{row['before'] / 1e6:.0f}",
            "largest, MB": f"{row['peak'] / 1e6:.0f}",
            "bytes a further image": f"{row['bytes_a_further_image']:.0f}" if "bytes_a_further_image" in row else "–",
            "clean": f"{100 * row['clean']:.1f}", "attacked": f"{100 * row['attacked']:.1f}",
            "optimal": f"{100 * row['optimal']:.1f}",
        }
        for row in found["rows"]
    ]  # fmt: skip
    caption = "Memory of the process that the system can not take back: neither pages of files nor the program's code."
    return rows, f"{caption} An image has {found['image_bytes']} bytes in 8 bits, its label 8."


@tabled("trials-files")
def files(found: dict) -> tuple[list[dict[str, str]], str]:
    """Every hostile file, and the sentence it was refused with."""
    rows = [
        {"file": row["file"], "refused": "yes" if row["refused"] and not row["ran"] else "NO",
         "seconds": f"{row['seconds']:.1f}", "sentence": row["said"][:140].replace("|", "/")}
        for row in found["files"]
    ]  # fmt: skip
    return rows, "Hostile files; nothing of them may run."


@tabled("trials-faults")
def faults(found: dict) -> tuple[list[dict[str, str]], str]:
    """What became of a run under each fault, and of the next run after it."""
    rows = [
        {
            "work": row["work"], "fault": row["fault"], "exit code": ", ".join(map(str, row["codes"])),
            "files not whole": str(len(row["unreadable"])), "wrong results": str(len(row["wrong"])),
            "the next run": "the same" if row["same_afterwards"] else "NOT the same",
        }
        for row in found["faults"]
    ]  # fmt: skip
    return rows, "Exit code 3: refused in a sentence, for the sake of a file; 0: done."
