"""What sharding by ZeRO-3 costs: time and memory to load, and the time of a pass.

    nox -s bench -- zero3

Needs 6 GB of disk and 20 GB of memory. Weights are random, in the published layouts, in bfloat16.

1. AIDO.RNA-1.6B's size: one process, then two ranks that hold half of it each, in turn. Seconds
   from the start of the process to the moment that the model is ready, and of loading alone, as
   mgen tells them; private memory up to the third part, of the rank that has most.
2. AIDO.Protein-16B at full width, four layers of it: two sharded ranks against one process, the
   largest difference of their embeddings.
3. A pass of a few layers of AIDO.RNA-1.6B on two sharded ranks over the same pass on two ranks
   with the whole model, in turn, at 512, 2,048 and 8,192 tokens a rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import loading
import torch
from genbio import opened, rows
from mgen_aido.config import parse
from mgen_aido.families import FM4BIO
from mgen_aido.geometry import GEOMETRY
from processes import family, sizes
from safetensors.torch import save_file

from mgen_core import launch
from mgen_core.api import TaskCard
from mgen_core.catalog import discover
from mgen_core.checkpoint import open_checkpoint
from mgen_core.cores import share_cores
from mgen_core.engine import Engine, LocalEngine, Placement
from mgen_core.join import join
from mgen_core.origin import find_origin
from mgen_core.ranks import Ranks

GB = 1e9
PAIRS = 5
PARTS = 3
RNA, PROTEIN = "aido_rna_1b600m", "aido_protein_16b"
LAYERS = {RNA: 4, PROTEIN: 4}
LETTERS = 510  # of a row: 512 tokens
TOKENS = (512, 2048, 8192)


def main() -> None:
    """All three parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts(folder)
        large(folder)
        passes(folder)


# --------------------------------------------------------------------------- starting


class Start(NamedTuple):
    """Seconds to the model's being ready, of loading alone, to the first part; private bytes."""

    ready: float
    load: float
    part: float
    private: int


def starts(folder: Path) -> None:
    """One process and two sharded ranks, in turn."""
    weights = folder / "rna"
    size = loading.write(weights, "bf16") * 2
    texts = ["A" * count + "C" * (40 - count) for count in range(40)]
    (folder / "rna.csv").write_text("\n".join(["sequence", *texts]))
    common = [str(folder / "rna.csv"), f"--backbone={RNA}", f"--weights={weights}"]
    common += ["--precision=bf16", "--batch-tokens=64"]
    sharded = ["--devices=2", "--strategy=zero3"]
    pairs = [(start(folder, common), start(folder, [*common, *sharded])) for _ in range(PAIRS)]
    print(f"AIDO.RNA-1.6B, bf16, {size / GB:.1f} GB of parameters; {PAIRS} pairs")
    for place, title in enumerate(("one process", "two sharded ranks")):
        found = [pair[place] for pair in pairs]
        ready, load, part = (
            f"{statistics.median(getattr(one, name) for one in found):.1f}"
            for name in ("ready", "load", "part")
        )
        private = max(one.private for one in found)
        print(
            f"  {title:18} ready after {ready} s, of which loading {load} s; first part after "
            f"{part} s; private {private / GB:.2f} GB, {private / size:.2f} of the parameters"
        )
    for name in ("ready", "part"):
        ratios = [getattr(two, name) / getattr(one, name) for one, two in pairs]
        print(f"  two / one, {name}: {told(ratios)}")
    shutil.rmtree(weights)


def start(folder: Path, words: Sequence[str]) -> Start:
    """Watch `mgen embed` until some parts are there; then end it."""
    run = folder / "run"
    command = [sys.executable, "-m", "mgen_core", "embed", *words, f"--output={run}"]
    begun = time.perf_counter()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if found := re.search(r"ready in ([\d.]+) s", line):
            break
    else:
        sys.exit(f"{' '.join(command)} ended with {child.wait()}")
    ready, part, private = time.perf_counter() - begun, 0.0, 0
    while (count := len(list(run.glob("parts/*/*.parquet")))) < PARTS:
        if count and not part:
            part = time.perf_counter() - begun
        private = max([private, *(sizes(rank).get("RssAnon", 0) for rank in family(child.pid))])
        time.sleep(0.01)
    child.terminate()
    child.communicate()
    shutil.rmtree(run)
    return Start(ready, float(found[1]), part or time.perf_counter() - begun, private)


# --------------------------------------------------------------------------- a large model


def large(folder: Path) -> None:
    """A model of full width, sharded and whole: the same embeddings."""
    weights, data = folder / "protein", folder / "protein.csv"
    size = write_protein(weights)
    texts = [row.data for row in rows("ACDEFGHIKLMNPQRSTVWY", [60, 90, 120, 150])]
    data.write_text("\n".join(["sequence", *texts]))
    common = [str(data), f"--backbone={PROTEIN}", f"--weights={weights}", "--precision=bf16"]
    common += ["--batch-tokens=160"]
    found = [
        embedded(folder / name, [*common, *more])
        for name, more in (("one", []), ("two", ["--devices=2", "--strategy=zero3"]))
    ]
    difference = float((found[0] - found[1]).abs().max())
    print(
        f"AIDO.Protein-16B, {LAYERS[PROTEIN]} of 36 layers, bf16, {size / GB:.1f} GB: two sharded "
        f"ranks and one process differ by {difference:.1e} (largest value "
        f"{float(found[0].abs().max()):.1f})"
    )
    shutil.rmtree(weights)


def write_protein(folder: Path) -> int:
    """Random weights of some layers, an expert a tensor as published; their bytes."""
    folder.mkdir()
    config = {**GEOMETRY[PROTEIN], "model_type": "fm4bio", "num_hidden_layers": LAYERS[PROTEIN]}
    (folder / "config.json").write_text(json.dumps(config))
    import plain

    with torch.device("meta"):
        module = plain.Encoder(parse(config, FM4BIO))
    tensors = {
        f"bert.{name}": torch.empty(
            tensor.shape, dtype=torch.float32 if "router" in name else torch.bfloat16
        ).normal_(0, 0.02)
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def embedded(run: Path, words: Sequence[str]) -> torch.Tensor:
    import mgen_core

    command = [sys.executable, "-m", "mgen_core", "embed", *words, f"--output={run}"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    table = mgen_core.read(run)
    shutil.rmtree(run)
    return torch.tensor(table["embedding"].to_pylist())


# --------------------------------------------------------------------------- passes


def passes(folder: Path) -> None:
    """Both engines in two ranks."""
    config = {**GEOMETRY[RNA], "model_type": "rnabert", "num_hidden_layers": LAYERS[RNA]}
    loading.CONFIG.clear()
    loading.CONFIG.update({"vocab_size": 16, **config})
    loading.write(folder / "few", "bf16")
    command = [sys.executable, __file__, "rank", str(folder / "few")]
    if code := launch.start_local(2, command=command):
        sys.exit(code)


def rank(folder: Path) -> None:
    """What each of the two ranks does; the first one tells."""
    world = join(os.environ)
    assert world is not None
    share_cores(world, os.environ)
    import torch.distributed as dist

    from mgen_core.zero3 import Group, Zero3Engine, connect

    ranks = Ranks(world)
    placement = Placement(torch.device("cpu"), "bf16")
    connect(ranks.store, world, placement.device)
    catalog = discover()
    backbone = opened(RNA, folder, fuse=False)
    card = catalog.find(TaskCard, "embed")
    task = card.load(card, card.options(), backbone)
    origin = find_origin(folder, None, None)
    filler = [backbone.prepare(row) for row in rows("ACGT", [1])]
    engines: Mapping[str, Engine] = {
        "whole": LocalEngine(backbone, task, placement, origin),
        "sharded": Zero3Engine(
            backbone, task, placement, origin, Group([range(world.size)]), filler
        ),
    }
    checkpoint = open_checkpoint(folder)
    moved = sum(info.dtype.itemsize * size(info.shape) for info in checkpoint.keys.values()) / 2
    for tokens in TOKENS:
        batch = [backbone.prepare(row) for row in rows("ACGT", [LETTERS] * (tokens // 512))]
        inputs = backbone.collate(batch)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(PAIRS + 1):
            for name, engine in engines.items():
                dist.barrier()
                begun = time.perf_counter()
                engine.forward(batch, inputs)
                dist.barrier()
                times[name].append(time.perf_counter() - begun)
        if world.rank == 0:
            whole, sharded = (found[1:] for found in times.values())  # the first warms up
            ratios = [two / one for one, two in zip(whole, sharded)]
            longer = statistics.median(two - one for one, two in zip(whole, sharded))
            print(
                f"{LAYERS[RNA]} layers of AIDO.RNA-1.6B, bf16, {tokens:5,} tokens a rank: "
                f"{statistics.median(whole):.2f} s whole; sharded / whole {told(ratios)}; "
                f"{moved / GB:.2f} GB come from the other rank, in {longer:.2f} s more",
                flush=True,
            )
    ranks.close()


def size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def told(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    rank(Path(sys.argv[2])) if sys.argv[1:2] == ["rank"] else main()
