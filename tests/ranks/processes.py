"""Runs as a user starts them, with real ranks; what is left of them; what they wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa

import mgen_core
from mgen_core.catalog import discover
from mgen_core.merge import Selection, merge

FULL = bool(os.environ.get("MGEN_TEST_FULL"))
PATIENCE_S = 300.0
"""After which a run counts as hanging. A loaded machine takes a minute to start four ranks."""

RESIDUES = {"dna": "ACGT", "protein": "ACDEFGHIKLMNPQRSTVWY"}
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def sequences(path: Path, modality: str, lengths: list[int]) -> Path:
    """A FASTA file with a random sequence of each length."""
    draw = random.Random(7)
    texts = ("".join(draw.choices(RESIDUES[modality], k=length)) for length in lengths)
    path.write_text("".join(f">s{number} drawn\n{text}\n" for number, text in enumerate(texts)))
    return path


def lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Random ones, always the same."""
    draw = random.Random(11)
    return [draw.randint(shortest, longest) for _ in range(count)]


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it and its ranks said on stderr."""

    code: int
    said: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """What the user was told, without the hints."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


class Started:
    """A command at work on a run directory."""

    def __init__(self, words: tuple[object, ...], output: Path, environ: dict[str, str]) -> None:
        self.output = output
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*words, "--output", str(output)],
            env=environ,
            cwd=output.parent,  # not the checkout: what is installed is meant
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def end(self, within: float = PATIENCE_S) -> Ended:
        """Wait until it and all that it started have ended."""
        began = time.monotonic()
        try:
            # Ranks write to the same pipe: it is at its end when the last one is.
            _, said = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            states = {rank: process.status() for rank, process in self.ranks().items()}
            for process in processes(self.output):
                process.kill()
            _, said = self.process.communicate()
            raise AssertionError(f"hangs after {within:.0f} s, ranks {states}: {said}") from None
        return Ended(self.process.returncode, said, time.monotonic() - began)

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks that are alive."""
        found = {}
        for process in processes(self.output):
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None:
                    found[int(rank)] = process
        return found

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for the condition, which the run must reach before it ends."""
        while not reached():
            assert self.process.poll() is None, f"over already: {self.end()}"
            assert time.monotonic() - self.began < PATIENCE_S, "not reached"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL to the command and all its ranks, as good as at once."""
        for process in [*processes(self.output)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.end()


def processes(output: Path) -> Iterator[psutil.Process]:
    """Those whose command names the run directory, and that are alive."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(output) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def start(
    *words: object, output: Path, devices: int = 1, strategy: str = "auto", **environ: str
) -> Started:
    """Start `mgen` with these words on so many ranks."""
    command = [sys.executable, "-m", "mgen_core", *map(str, words)]
    command += ["--devices", str(devices), "--strategy", strategy]
    return Started(tuple(command), output, settings(**environ))


def settings(**also: str) -> dict[str, str]:
    """An environment in which nothing depends on how many cores are free."""
    kept = {name: value for name, value in os.environ.items() if name not in PLACE}
    return {**kept, "OMP_NUM_THREADS": "1", **also}


def run(*words: object, output: Path, **more: object) -> Ended:
    """Run to the end, which must be a good one."""
    ended = start(*words, output=output, **more).end()
    assert ended.code == 0, ended.said
    assert "Traceback" not in ended.said
    return ended


def batches_done(output: Path, rank: int | None = None) -> int:
    """How many batches the done-logs hold, of one rank or of all."""
    logs = output.glob(f"done/rank-{'*' if rank is None else f'{rank:05d}'}.jsonl")
    whole = [log.read_bytes().rpartition(b"\n")[0] for log in logs]  # one may be being written
    return sum(len(json.loads(line)["batches"]) for lines in whole for line in lines.splitlines())


def merged(output: Path) -> Path:
    """The run's rows in one file."""
    path = output.with_suffix(".parquet")
    merge(output, path, discover(), Selection())
    return path


def digest(output: Path) -> str:
    """Of the bytes of the merged file."""
    return hashlib.sha256(merged(output).read_bytes()).hexdigest()


def table(output: Path) -> pa.Table:
    return mgen_core.read(output)
