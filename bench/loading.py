"""Memory and time that `mgen embed` takes to its first part, on weights of AIDO.RNA-1.6B's size.

    nox -s bench -- loading

Needs 7 GB of disk and 12 GB of memory. The weights are random, in the published layouts: two
`.bin` files in float32, one safetensors file in bfloat16. Private is memory that is no file's: the
kernel's `Anonymous`, at its peak; pages of the mapped files are `Rss` as well.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import plain
import torch
from mgen_aido.config import parse
from mgen_aido.families import RNABERT
from mgen_aido.geometry import GEOMETRY
from safetensors.torch import save_file

BACKBONE = "aido_rna_1b600m"
CONFIG = {"model_type": "rnabert", "vocab_size": 16, **GEOMETRY[BACKBONE]}
BYTES = {"fp32": 4, "bf16": 2}
DISK = 7e9
GB = 1e9
PAUSE = 0.02  # seconds between two looks
HEADER = """\
                     seconds   seconds   private  resident   private /  within
file  run   fuse     to part  processor       GB        GB  parameters  1.2 x parameters + 1 GB"""


@dataclass
class Start:
    """What a process took: seconds to its first part and of processor time, peaks in bytes."""

    clock: float = 0.0
    processor: float = 0.0
    private: int = 0
    resident: int = 0


def main() -> None:
    """Every file in every precision, fused and not, one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < DISK:
            sys.exit(f"{folder}: {DISK / GB:.0f} GB of disk are needed (TMPDIR chooses another)")
        (folder / "data.csv").write_text("sequence\n" + "ACGT" * 8 + "\n")
        print(HEADER)
        print(f"{'a tiny model':19}{told(started(folder, 'aido_dna_dummy'))}", flush=True)
        for file in BYTES:
            weights = folder / file
            parameters = write(weights, file)
            for run, fuse in itertools.product(BYTES, ("false", "true")):
                options = (f"--weights={weights}", f"--precision={run}", f"--option=fuse={fuse}")
                found = started(folder, BACKBONE, *options)
                size = parameters * BYTES[run]
                verdict = "yes" if found.private <= 1.2 * size + GB else "NO"
                share = f"{found.private / size:10.2f}   {verdict}"
                print(f"{file:6}{run:6}{fuse:7}{told(found)}{share}", flush=True)
            shutil.rmtree(weights)


def told(start: Start) -> str:
    private, resident = start.private / GB, start.resident / GB
    return f"{start.clock:10.1f}{start.processor:10.1f}{private:10.2f}{resident:10.2f}"


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
    """Run `mgen embed` on one short row to its end, and watch its memory and its first part."""
    run, log = folder / "run", folder / "log"
    command = [sys.executable, "-m", "mgen_core", "embed", str(folder / "data.csv")]
    command += ["--backbone", backbone, "--output", str(run), *options]
    start, begun = Start(), time.perf_counter()
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream)
    while True:
        ended, status, used = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        look(child.pid, start)
        if not start.clock and any(run.glob("parts/*/*.parquet")):
            start.clock = time.perf_counter() - begun
        time.sleep(PAUSE)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}:\n{log.read_text()}")
    start.processor = used.ru_utime + used.ru_stime
    shutil.rmtree(run)
    return start


def look(process: int, start: Start) -> None:
    """Raise the peaks to what the kernel counts now."""
    with contextlib.suppress(OSError):  # it may have ended just now
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(size) * 1024 for name, size, _ in map(str.split, lines)}
        start.private = max(start.private, sizes["Anonymous:"])
        start.resident = max(start.resident, sizes["Rss:"])


if __name__ == "__main__":
    main()
