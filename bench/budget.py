"""`--batch-tokens auto` against budgets that are given: tokens a second of each, on real rows.

    nox -s bench -- budget                                      all models; half an hour and more
    python bench/budget.py --models esm2_8m --rounds 1          a quick look

First `auto` chooses, as in a run: nothing is remembered. Then batches of the plan at each budget
take turns, at the same places of the plan, which are others than those where `auto` looked. A model
is compared by its geometry: weights are random.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import material
import torch

from mgen_core import budget
from mgen_core.catalog import discover
from mgen_core.config import RunConfig
from mgen_core.engine import LocalEngine, place
from mgen_core.job import Job, open_job
from mgen_core.origin import find_origin

BUDGETS = (256, 512, 1024, 2048, 4096)
PLACES = (0.15, 0.4, 0.85)
LONGEST = 1024  # tokens; longer rows are set aside


class Model(NamedTuple):
    """A backbone, its rows and how its weights are drawn."""

    source: Path
    weights: Callable[[Path], Path]


MODELS = {
    "esm2_8m": Model(material.PROTEINS, lambda folder: material.esm2(folder, "8m")),
    "esm2_35m": Model(material.PROTEINS, lambda folder: material.esm2(folder, "35m")),
    "esm2_150m": Model(material.PROTEINS, lambda folder: material.esm2(folder, "150m")),
    "aido_dna_300m": Model(material.GENES, material.dna),
}


def main() -> None:
    """Each model in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--processor", action="store_true", help="processor time, not the clock's")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.precision}")
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MGEN_CACHE"] = folder
            job, engine = opened(name, Path(folder), asked.precision)
            compare(job, engine, asked.rounds, asked.processor)


def opened(name: str, folder: Path, precision: str) -> tuple[Job, LocalEngine]:
    source, weights = MODELS[name]
    data = material.write_fasta(folder / "rows.fasta", material.sequences(source))
    drawn = weights(folder / name)
    config = RunConfig(
        "embed", name, (str(data),), folder / "run", weights=str(drawn), max_length=LONGEST
    )
    job = open_job(config, discover())
    placement = place("bf16" if precision == "bf16" else "fp32")
    return job, LocalEngine(job.backbone, job.task, placement, find_origin(drawn, None, None))


def compare(job: Job, engine: LocalEngine, rounds: int, processor: bool) -> None:
    """Print what `auto` took and what each budget comes to."""
    begun = time.perf_counter()
    choice, _ = budget.find(job, engine.placement, lambda: engine, lambda: None)
    took = time.perf_counter() - begun
    why = choice.why or "the usual number, the input is small"
    print(f"\n{job.backbone.card.name}: auto takes {choice.tokens:,} in {took:.1f} s: {why}")
    sample = budget.sampled(job, engine.placement)
    lap = budget.laps(job, engine, sample, lambda: None)
    budgets = sorted({*BUDGETS, choice.tokens})
    lap(256, 0.5)
    taken = [
        {
            tokens: [per_token(lap(tokens, where), processor) for where in PLACES]
            for tokens in budgets
        }
        for _ in range(rounds)
    ]
    seconds = {tokens: [statistics.mean(taking[tokens]) for taking in taken] for tokens in budgets}
    best = min(budgets, key=lambda tokens: statistics.median(seconds[tokens]))
    print(f"{'budget':>8} {'tokens/s':>9} {'of the best':>12}  lowest to highest, by round")
    for tokens in budgets:
        speed = 1 / statistics.median(seconds[tokens])
        shares = sorted(there / here for here, there in zip(seconds[tokens], seconds[best]))
        mark = "  <- auto" if tokens == choice.tokens else ""
        print(
            f"{tokens:8,} {speed:9,.0f} {statistics.median(shares):12.2f}  "
            f"{shares[0]:.2f} to {shares[-1]:.2f}{mark}",
            flush=True,
        )


def per_token(lap: budget.Lap, processor: bool) -> float:
    return (lap.cost if processor else lap.seconds) / lap.tokens


if __name__ == "__main__":
    main()
