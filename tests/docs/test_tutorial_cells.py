"""The commands of `tutorial-cells.md` run as they stand there, on a small model.

Blocks marked `<!-- scanpy -->` need scanpy; without it the commands have a file that is made up.
"""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from cells import cell_folder, h5ad_file
from docs.pages import DOCS, blocks

PAGE = DOCS / "tutorial-cells.md"
MGEN = f'mgen() {{ "{sys.executable}" -m mgen_core "$@"; }}\n'


def run(marks, folder):
    for block in blocks(PAGE):
        if block.mark not in marks:
            continue
        program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euc"]
        text = block.text if block.language == "python" else MGEN + block.text
        done = subprocess.run(
            [*program, text],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"line {block.line}:\n{done.stdout}{done.stderr}"


def test_the_commands_run_on_a_file_that_is_made_up(tmp_path):
    cell_folder(tmp_path / "aido_cell_3m")
    h5ad_file(tmp_path / "pbmc.h5ad", 9)
    run(["cells"], tmp_path)
    with h5py.File(tmp_path / "out.h5ad") as file:
        found = np.isfinite(file["obsm/X_aido_cell_3m"][:]).all(axis=1)
        reasons = file["obs/aido_cell_3m_error/codes"][:]
    assert found.tolist() == [number != 6 for number in range(9)]  # which has no counts
    assert (reasons < 0).tolist() == found.tolist()


def test_the_whole_page_runs_on_real_cells(tmp_path):
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed")
    genes = scanpy.datasets.pbmc68k_reduced().raw.var_names
    cell_folder(tmp_path / "aido_cell_3m", genes=list(genes))
    run(["scanpy", "cells"], tmp_path)
    with h5py.File(tmp_path / "umap.h5ad") as file:
        assert file["obsm/X_umap"].shape == (700, 2) and np.isfinite(file["obsm/X_umap"]).all()
        assert file["uns/neighbors/params/use_rep"].asstr()[()] == "X_aido_cell_3m"
    assert (tmp_path / "figures/umap.png").exists()
