"""What `mgen embed` costs beside the forward passes of its model: the whole process over them.

    nox -s bench -- ceiling                                     all models; long, see --models
    python bench/ceiling.py --models esm2_8m --rows 60 --rounds 1    a quick look

The ceiling is mgen's own model and batches in a process of its own: tokenised and collated before
the clock starts, forward passes only, nothing pooled or kept, with the token budget that was the
fastest of a few on batches of the same rows. It and `mgen embed`, with settings as they are by
default, take turns; mgen remembers no budget, so every run that is long enough measures its own.

`beside start-up` leaves out of mgen's time what a run of one row takes more than its pass; `of the
least` has the fastest round of each: what disturbs a machine only adds. The last lines are that
start-up: one row and ten against `import torch` and the pass. On a machine with other work,
processor time with one thread tells more than the clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import material
from processes import Took, clock, mgen, ratios, took

if TYPE_CHECKING:
    from mgen_core.engine import LocalEngine
    from mgen_core.job import Job
    from mgen_core.plan import Batch

BUDGETS = (256, 512, 1024, 2048, 4096)
SAMPLE = 20_000  # tokens on which each budget is tried
OUTPUTS = {
    "pooled": ("--pool", "mean"),
    "per residue, float16": ("--pool", "tokens", "--dtype", "float16"),
}
HEADER = f"""\
{"":10} {"":22} {"mgen s":>8} {"passes s":>9} {"ratio":>6} {"by processor":>13} \
{"beside start-up":>16} {"of the least":>13}"""
START_HEADER = f"""\
{"":10} {"rows":>4} {"mgen s":>8} {"import torch s":>15} {"passes s":>9} {"ratio":>6} \
{"by processor":>13}"""


@dataclass(frozen=True)
class Model:
    """A backbone, its rows and how its weights are drawn."""

    name: str
    source: Path
    rows: int
    weights: Callable[[Path], Path]

    def sequences(self, most: int | None) -> Sequence[str]:
        found = material.sequences(self.source)
        # The genes by their order, proteins from all of the proteome: few of them are long.
        if self.source == material.GENES:
            return found[: min(self.rows, most or self.rows)]
        return material.spread(found, min(self.rows, most or self.rows))


MODELS = {
    model.name: model
    for model in (
        Model("esm2_8m", material.PROTEINS, 2100, lambda folder: material.esm2(folder, "8m")),
        Model("esm2_35m", material.PROTEINS, 2100, lambda folder: material.esm2(folder, "35m")),
        Model("aido_dna_300m", material.GENES, 20, material.dna),
    )
}


def main() -> None:
    """Each model in turn; the process that only computes is this program too."""
    asked = arguments()
    if asked.alone:
        name, weights, fasta = asked.alone
        print(json.dumps(only_passes(name, weights, fasta, asked.budgets, asked.most)))
        return
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(MODELS[name], asked.rows, asked.rounds, Path(folder))


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given.add_argument("--rows", type=int, help="of each model, for a quick look")
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--alone", nargs=3, metavar=("BACKBONE", "WEIGHTS", "FASTA"))
    given.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="of --alone")
    given.add_argument("--most", type=int, help="tokens of --alone")
    return given.parse_args()


# --------------------------------------------------------------------------- the ceiling


class Passes(NamedTuple):
    """Forward passes: the tokens of their rows, seconds, seconds of processors."""

    tokens: int
    clock: float
    processor: float

    def took(self) -> Took:
        return Took(self.clock, self.processor)


def only_passes(
    name: str, weights: str, fasta: str, budgets: Sequence[int], most: int | None
) -> list[Passes]:
    """Those of each token budget, collated before; with `most`, of about so many tokens only."""
    import torch

    job, engine = opened(name, weights, fasta)
    found = []
    for budget in budgets:
        batches = some_batches(job, budget, most)
        inputs = [engine.collate([entry.rows[0] for entry in batch.entries]) for batch in batches]
        with torch.inference_mode():
            engine.call(inputs[-1])  # what torch sets up once is no part of a pass
            begun, used = time.perf_counter(), time.process_time()
            for one in inputs:
                engine.call(one)
        seconds = time.perf_counter() - begun, time.process_time() - used
        found.append(Passes(sum(batch.tokens for batch in batches), *seconds))
    return found


def opened(name: str, weights: str, fasta: str) -> tuple[Job, LocalEngine]:
    """The rows, and the model in memory, as `mgen embed` has them."""
    from mgen_core.catalog import discover
    from mgen_core.config import make_config
    from mgen_core.engine import LocalEngine, place
    from mgen_core.job import open_job
    from mgen_core.origin import find_origin

    values = {"task": "embed", "backbone": name, "data": fasta, "weights": weights}
    job = open_job(make_config({**values, "too_long": "truncate"}), discover())
    origin = find_origin(job.backbone.options.weights, None, None)
    return job, LocalEngine(job.backbone, job.task, place("auto"), origin)


def some_batches(job: Job, budget: int, most: int | None) -> Sequence[Batch]:
    """The plan's batches; with `most`, some of them, from the longest rows to the shortest."""
    windows = job.windows(job.settings(budget))
    batches = [batch for window in windows for batch in window.batches]
    if most is None:
        return batches
    tokens = sum(batch.tokens for batch in batches)
    step = min(max(1, tokens // most), len(batches))
    return batches[step // 2 :: step]


def alone(
    model: Model, weights: Path, fasta: Path, *budgets: int, most: int | None = None
) -> list[Passes]:
    """`only_passes` in a process of its own."""
    words: list[str | Path] = [sys.executable, __file__, "--alone", model.name, weights, fasta]
    words += ["--budgets", *map(str, budgets)]
    if most is not None:
        words += ["--most", str(most)]
    return [Passes(*one) for one in json.loads(took(words).said)]


def best_budget(model: Model, weights: Path, fasta: Path) -> int:
    """The fastest on a sample of the batches; tells how fast each was."""
    tried = dict(zip(BUDGETS, alone(model, weights, fasta, *BUDGETS, most=SAMPLE)))
    speed = {budget: passes.tokens / passes.clock for budget, passes in tried.items()}
    best = max(speed, key=lambda budget: speed[budget])
    told = ", ".join(f"{budget:,}: {fast:,.0f}" for budget, fast in speed.items())
    print(f"tokens a second of each budget: {told}; the ceiling has {best:,}", flush=True)
    return best


# --------------------------------------------------------------------------- the comparison


def measure(model: Model, most: int | None, rounds: int, folder: Path) -> None:
    """A line an output, and the lines of the start-up."""
    found = model.sequences(most)
    weights = model.weights(folder / "weights")
    fasta = material.write_fasta(folder / "rows.fasta", found)
    embed(model, weights, material.write_fasta(folder / "warm.fasta", found[:2]), folder)
    print(f"\n{model.name}, {len(found)} rows of {sum(map(len, found)):,} letters")
    budget = best_budget(model, weights, fasta)
    print(HEADER)
    first = started(model, weights, found[:1], budget, rounds, folder)
    over = median(ours.clock - under.clock for ours, _, under in first)
    passes: list[Took] = []
    whole: dict[str, list[Took]] = {output: [] for output in OUTPUTS}
    for _ in range(rounds):
        passes.append(alone(model, weights, fasta, budget)[0].took())
        for output, words in OUTPUTS.items():
            whole[output].append(embed(model, weights, fasta, folder, *words))
    for output, took_by in whole.items():
        by_clock, by_processor = ratios(took_by, passes)
        beside = median((a.clock - over) / b.clock for a, b in zip(took_by, passes))
        least = min(one.clock for one in took_by) / min(one.clock for one in passes)
        print(
            f"{'':10} {output:22} {clock(took_by):8.2f} {clock(passes):9.2f} {by_clock:6.2f} "
            f"{by_processor:13.2f} {beside:16.2f} {least:13.2f}",
            flush=True,
        )
    print(START_HEADER)
    tell_start(1, first)
    few = found[:10]
    tell_start(len(few), started(model, weights, few, budget, rounds, folder))


def embed(model: Model, weights: Path, fasta: Path, folder: Path, *words: str) -> Took:
    """The whole process; what it wrote is removed."""
    run = folder / "run"
    settings: list[str | Path] = ["--backbone", model.name, "--weights", weights]
    settings += ["--too-long", "truncate", "--output", run]
    found = mgen("embed", fasta, *settings, *words, MGEN_CACHE=str(folder / "cache"))
    shutil.rmtree(run)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return found


def started(
    model: Model, weights: Path, found: Sequence[str], budget: int, rounds: int, folder: Path
) -> list[tuple[Took, Took, Took]]:
    """Of few rows in each round: mgen, a process that imports torch, the passes."""
    fasta = material.write_fasta(folder / "few.fasta", found)
    return [
        (
            embed(model, weights, fasta, folder),
            took([sys.executable, "-c", "import torch"]),
            alone(model, weights, fasta, budget)[0].took(),
        )
        for _ in range(rounds)
    ]


def tell_start(rows: int, rounds: Sequence[tuple[Took, Took, Took]]) -> None:
    """The whole process over what cannot be spared."""
    ours, torch, passes = zip(*rounds)
    by_clock, by_processor = ratios(ours, [a + b for a, b in zip(torch, passes)])
    print(
        f"{'':10} {rows:4} {clock(ours):8.2f} {clock(torch):15.2f} {clock(passes):9.3f} "
        f"{by_clock:6.2f} {by_processor:13.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
