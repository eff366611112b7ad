"""How a run grows: with ranks, and with rows.

    nox -s bench -- scaling
    python bench/scaling.py --rows 60 --rounds 1                     a quick look
    python bench/scaling.py --figures FILE.json --plot FILE.png      and draw it
    python bench/scaling.py --drawn-from FILE.json --plot FILE.png   draw only

Ranks: proteins with ESM2-8M's geometry, by one rank of one thread, one of two, and two of one
thread each, in turn. Rows: short sequences with the tiny DNA model, one, ten and a hundred times
as many. Times are of whole processes; memory is the most that is no file's (RssAnon), of all ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import material
from processes import MB, Took, clock, mgen, ratios

PROTEINS, SHORT = 600, 5_000
TIMES = (1, 10, 100)
RANKS = {  # ranks, threads of each
    "1 rank, 1 thread": (1, 1),
    "1 rank, 2 threads": (1, 2),
    "2 ranks, 1 thread": (2, 1),
}
Figures = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure, tell, draw."""
    asked = arguments()
    if asked.drawn_from:
        draw(json.loads(asked.drawn_from.read_text()), asked.plot)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "ranks": over_ranks(folder, asked.rows or PROTEINS, asked.rounds),
            "rows": over_rows(folder, asked.rows or SHORT, asked.rounds),
        }
    if asked.figures:
        asked.figures.write_text(json.dumps(found, indent=1) + "\n")
    if asked.plot:
        draw(found, asked.plot)


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--rows", type=int, help=f"{PROTEINS} proteins, {SHORT:,} short sequences")
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--figures", type=Path, help="a JSON file for the figures")
    given.add_argument("--plot", type=Path, help="a PNG file for the picture")
    given.add_argument("--drawn-from", type=Path, help="a JSON file of earlier figures")
    asked = given.parse_args()
    if asked.drawn_from and not asked.plot:
        given.error("--drawn-from needs --plot FILE.png")
    return asked


# --------------------------------------------------------------------------- ranks


def over_ranks(folder: Path, rows: int, rounds: int) -> list[dict[str, Any]]:
    """The same proteins by each number of ranks and threads."""
    found = material.spread(material.sequences(material.PROTEINS), rows)
    fasta = material.write_fasta(folder / "proteins.fasta", found)
    weights = material.esm2(folder / "weights", "8m")
    came: dict[str, list[Took]] = {name: [] for name in RANKS}
    for _ in range(rounds):
        for name, (ranks, threads) in RANKS.items():
            words = ("--weights", weights, "--devices", str(ranks), "--too-long", "truncate")
            took = embed(folder, fasta, "esm2_8m", *words, threads=threads)
            came[name].append(took)
    print(f"{len(found)} proteins, esm2_8m{'':8} {'seconds':>8} {'times as fast':>14} {'MB':>6}")
    lines = []
    for name, all_of in came.items():
        speed = ratios(came["1 rank, 1 thread"], all_of)[0]
        peak = max(one.private for one in all_of)
        print(f"{name:26} {clock(all_of):8.1f} {speed:14.2f} {peak / MB:6.0f}", flush=True)
        lines.append({"name": name, "seconds": clock(all_of), "speed": speed, "bytes": peak})
    return lines


# --------------------------------------------------------------------------- rows


def over_rows(folder: Path, rows: int, rounds: int) -> list[dict[str, Any]]:
    """One table, one of ten and one of a hundred times its rows."""
    tables = {rows * times: write(folder / f"{times}.csv", rows * times) for times in TIMES}
    came: dict[int, list[Took]] = {count: [] for count in tables}
    for _ in range(rounds):
        for count, table in tables.items():
            came[count].append(embed(folder, table, "aido_dna_dummy"))
    print(f"\n{'rows':>12} {'seconds':>8} {'ms a row more':>14} {'MB':>6}")
    lines: list[dict[str, Any]] = []
    for count, all_of in came.items():
        peak = max(one.private for one in all_of)
        line = {"rows": count, "seconds": clock(all_of), "bytes": peak}
        print(f"{count:12,} {line['seconds']:8.1f} {grown(lines, line):>14} {peak / MB:6.0f}")
        lines.append(line)
    return lines


def grown(earlier: Sequence[dict[str, Any]], line: dict[str, Any]) -> str:
    """Milliseconds of each row that the table before it did not have: start-up is in neither."""
    if not earlier:
        return ""
    last = earlier[-1]
    return f"{1000 * (line['seconds'] - last['seconds']) / (line['rows'] - last['rows']):.2f}"


def write(path: Path, rows: int) -> Path:
    """A table of random sequences of 20 to 40 letters, no two of them alike."""
    random_ = random.Random(1)
    with path.open("w") as file:
        file.write("sequence\n")
        for _ in range(rows):
            file.write("".join(random_.choices("ACGT", k=random_.randint(20, 40))) + "\n")
    return path


def embed(folder: Path, data: Path, backbone: str, *words: str | Path, threads: int = 0) -> Took:
    """The whole process; what it wrote is removed. Without `threads`: as torch chooses."""
    run = folder / "run"
    environ = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    came = mgen("embed", data, "--backbone", backbone, "--output", run, *words, **environ)
    shutil.rmtree(run)
    print(".", end="", file=sys.stderr, flush=True)
    return came


# --------------------------------------------------------------------------- the picture


def draw(found: Figures, path: Path) -> None:
    """Time and memory over rows, speed over ranks: three small panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory, ranks) = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    rows = [line["rows"] for line in found["rows"]]
    time.loglog(rows, [line["seconds"] for line in found["rows"]], marker="o", label="measured")
    slope = found["rows"][-1]["seconds"] / rows[-1]
    time.loglog(rows, [slope * count for count in rows], "--", label="in proportion to rows")
    time.set(title="time", xlabel="rows", ylabel="seconds")
    time.legend(frameon=False, fontsize="small")
    memory.semilogx(rows, [line["bytes"] / MB for line in found["rows"]], marker="o")
    memory.set(title="memory", xlabel="rows", ylabel="peak, MB")
    memory.set_ylim(bottom=0)
    names = [line["name"].replace(", ", "\n") for line in found["ranks"]]
    bars = ranks.bar(names, [line["speed"] for line in found["ranks"]], width=0.6)
    ranks.bar_label(bars, fmt="%.2f", fontsize="small")
    ranks.set(title="two cores", ylabel="times as fast as 1 rank, 1 thread")
    ranks.tick_params(axis="x", labelsize="small")
    ranks.yaxis.label.set_fontsize("small")
    for panel in (time, memory, ranks):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
