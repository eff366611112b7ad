"""Memory and time of reading and planning a large .h5ad: no model runs.

    nox -s bench -- cells                     100,000 cells of 20,000 genes, 150 million counts
    python bench/cells.py --cells 1000

The file is CSR, compressed as AnnData does it on request (lzf). `reading` is the reader alone,
`plan` all that a run does before its first batch: reading, genes put in the model's order, digests
of windows. Seconds are processor time; memory is the most that is no file's (RssAnon) above what
the process had when all was imported. TMPDIR chooses the disk, of which it needs 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch  # noqa: F401  # what a run has in memory anyway
from processes import sizes

from mgen_core.catalog import discover
from mgen_core.config import make_config
from mgen_core.job import open_job
from mgen_core.plan import survey
from mgen_core.table import open_sources

GENES, SEEN, KNOWN = 20_000, 1_500, 19_000
AT_ONCE = 2_000
PAUSE = 0.005  # seconds between two looks


def write_counts(path: Path, cells: int) -> None:
    """Each cell has counts of as many genes, spread over all of them."""
    draw = np.random.default_rng(0)
    stride = GENES // SEEN
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "shape": (cells, GENES)})
        layout = {"shape": (cells * SEEN,), "chunks": (1 << 17,), "compression": "lzf"}
        data = group.create_dataset("data", dtype="f4", **layout)
        places = group.create_dataset("indices", dtype="i4", **layout)
        group["indptr"] = np.arange(cells + 1, dtype=np.int64) * SEEN
        for first in range(0, cells, AT_ONCE):
            count = min(AT_ONCE, cells - first)
            some = slice(first * SEEN, (first + count) * SEEN)
            steps = draw.integers(0, stride, (count, SEEN))
            places[some] = (np.arange(SEEN) * stride + steps).ravel()
            data[some] = 1 + draw.poisson(0.7, count * SEEN)
        for name, index in (("var", GENES), ("obs", cells)):
            file.create_group(name).attrs["_index"] = "_index"
            file[f"{name}/_index"] = [f"{name}-{number}" for number in range(index)]


def write_model(folder: Path) -> None:
    """What is read of a model to plan: its sizes, and its genes."""
    folder.mkdir()
    config = {
        "model_type": "cellfoundation",
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 320,
        "max_position_embeddings": KNOWN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = "\n".join(f"var-{number}" for number in range(KNOWN))
    (folder / "OS_scRNA_gene_index.19264.tsv").write_text(names)


def measured(work: Callable[[], int]) -> str:
    """Rows, processor time and memory of a piece of work."""
    start, before, over = sizes(os.getpid())["RssAnon"], time.process_time(), threading.Event()
    peak = start

    def watch() -> None:
        nonlocal peak
        while not over.wait(PAUSE):
            peak = max(peak, sizes(os.getpid())["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rows = work()
    finally:
        over.set()
        watcher.join()
    seconds = time.process_time() - before
    return f"{rows:,} cells, {seconds:.1f} s of a core, {(peak - start) / 1e6:.0f} MB above start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, default=100_000)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory(prefix="mgen-") as folder:
        path, model = Path(folder) / "cells.h5ad", Path(folder) / "model"
        write_counts(path, cells)
        write_model(model)
        print(f"{path.stat().st_size / 1e6:.0f} MB, {cells * SEEN:,} counts")
        catalog = discover()
        values = {"task": "embed", "backbone": "aido_cell_3m", "data": str(path)}
        config = make_config({**values, "weights": str(model), "output": Path(folder) / "run"})

        def reading() -> int:
            (rows,) = open_sources(config, catalog)
            return sum(len(chunk["X"]) for chunk in rows.chunks(["X", "obs_names"]))

        def planning() -> int:
            job = open_job(config, catalog, download=False)
            (total,) = deque(survey(job.windows(job.settings(2048)), job.row_bytes), maxlen=1)
            return int(total.rows)

        print(f"reading  {measured(reading)}")
        print(f"plan     {measured(planning)}")


if __name__ == "__main__":
    main()
