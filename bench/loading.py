"""Memory and time that `mgen embed` takes to its first part, on weights of AIDO.RNA-1.6B's size.

    nox -s bench -- loading

Needs 7 GB of disk and 12 GB of memory. The weights are random, in the published layouts: two
`.bin` files in float32, one safetensors file in bfloat16; files are read from the page cache.

`peak` is the most memory that is no file's, RssAnon of /proc/PID/status. The last columns are of
/proc/PID/smaps_rollup when the first part is there; Rss has the pages of mapped files in it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import plain
import torch
from mgen_aido.config import parse
from mgen_aido.families import RNABERT
from mgen_aido.geometry import GEOMETRY
from processes import sizes
from safetensors.torch import save_file

BACKBONE = "aido_rna_1b600m"
CONFIG = {"model_type": "rnabert", "vocab_size": 16, **GEOMETRY[BACKBONE]}
BYTES = {"fp32": 4, "bf16": 2}
DISK = 7e9
GB = 1e9
PAUSE = 0.01  # seconds between two looks
HEADER = """\
                    seconds    seconds    peak   peak /   within 1.2     GB in smaps_rollup
file run  fuse      to part  processor      GB   weights     + 1 GB   Anonymous   Dirty     Rss"""


@dataclass(frozen=True)
class Start:
    """What a process took to its first part: seconds, and bytes of memory."""

    clock: float
    processor: float
    peak: int
    smaps: Mapping[str, int]


def main() -> None:
    """Every file in every precision, fused and not, one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < DISK:
            sys.exit(f"{folder}: {DISK / GB:.0f} GB of disk are needed (TMPDIR chooses another)")
        # A batch each: when the first one's part is there, the others keep the model in use.
        rows = ("A" * count + "C" * (40 - count) for count in range(40))
        (folder / "data.csv").write_text("\n".join(["sequence", *rows]))
        print(HEADER)
        report("a tiny model", started(folder, "aido_dna_dummy"))
        for file in BYTES:
            weights = folder / file
            parameters = write(weights, file)
            for run, fuse in itertools.product(BYTES, ("false", "true")):
                options = (f"--weights={weights}", f"--precision={run}", f"--option=fuse={fuse}")
                found = started(folder, BACKBONE, *options)
                report(f"{file} {run} {fuse}", found, parameters * BYTES[run])
            shutil.rmtree(weights)


def report(title: str, start: Start, size: int | None = None) -> None:
    """One line; `size` is the bytes of the parameters in the run's precision."""
    share = within = ""
    if size:
        share = f"{start.peak / size:.2f}"
        within = "yes" if start.peak <= 1.2 * size + GB else "NO"
    print(
        f"{title:17}{start.clock:10.1f}{start.processor:11.1f}{start.peak / GB:8.2f}{share:>9}"
        f"{within:>11}   ",
        *(
            f"{start.smaps.get(name, 0) / GB:9.2f}"
            for name in ("Anonymous", "Private_Dirty", "Rss")
        ),
        flush=True,
    )


# --------------------------------------------------------------------------- the weights


def write(folder: Path, kind: str) -> int:
    """Random weights in the layout of the kind; how many numbers they are."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        module = plain.Encoder(parse(CONFIG, RNABERT))
    shapes = {f"bert.{name}": tensor.shape for name, tensor in module.state_dict().items()}
    if kind == "bf16":
        save_file(drawn(shapes, torch.bfloat16), folder / "model.safetensors")
    else:
        write_shards(folder, shapes)
    os.sync()  # pages that still wait for the disk would count as dirty
    return sum(shape.numel() for shape in shapes.values())


def write_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    names = list(shapes)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[: len(names) // 2],
        "pytorch_model-00002-of-00002.bin": names[len(names) // 2 :],
    }
    for file, inside in shards.items():
        torch.save(drawn({name: shapes[name] for name in inside}, torch.float32), folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def drawn(shapes: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype).normal_(0, 0.02) for name, shape in shapes.items()
    }


# --------------------------------------------------------------------------- the process


def started(folder: Path, backbone: str, *options: str) -> Start:
    """Watch `mgen embed` until its first part is there; then look at its memory and end it."""
    run, log = folder / "run", folder / "log"
    command = [sys.executable, "-m", "mgen_core", "embed", str(folder / "data.csv")]
    command += ["--backbone", backbone, "--output", str(run), "--batch-tokens=64", *options]
    peak, begun = 0, time.perf_counter()
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream)
    while not any(run.glob("parts/*/*.parquet")):
        if child.poll() is not None:
            sys.exit(f"{' '.join(command)}:\n{log.read_text()}")
        peak = max(peak, sizes(child.pid, "status").get("RssAnon", 0))
        time.sleep(PAUSE)
    clock = time.perf_counter() - begun
    smaps = sizes(child.pid, "smaps_rollup")
    child.kill()
    used = os.wait4(child.pid, 0)[2]
    child.returncode = -signal.SIGKILL
    shutil.rmtree(run)
    return Start(clock, used.ru_utime + used.ru_stime, peak, smaps)


if __name__ == "__main__":
    main()
