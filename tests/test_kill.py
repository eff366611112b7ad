"""A run that is killed at random moments, and started again, ends in the same bytes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cells import cell_folder, h5ad_file

KILLS = int(os.environ.get("MGEN_TEST_KILLS", "5"))


def mgen(*words):
    return [sys.executable, "-m", "mgen_core", *map(str, words)]


def written(path, count):
    draw = random.Random(7)
    texts = ["".join(draw.choices("ACGT", k=draw.randint(20, 400))) for _ in range(count)]
    path.write_text("".join(f">g{n} gene\n{text}\n" for n, text in enumerate(texts)))
    return path


def command(data, output):
    return mgen("embed", data, "--backbone", "aido_dna_dummy", "--pool", "tokens", "--output",
                output, "--batch-tokens", 512)  # fmt: skip


def of_genes(folder):
    data = written(folder / "genes.fna", 2400)
    return lambda output: command(data, output)


def of_cells(folder):
    data = h5ad_file(folder / "cells.h5ad", 1500)
    weights = cell_folder(folder / "weights", num_hidden_layers=6)
    return lambda output: mgen("embed", data, "--backbone", "aido_cell_3m", "--weights", weights,
                               "--pool", "tokens", "--output", output, "--batch-tokens", 64,
                               )  # fmt: skip


def digest_of_merged(run):
    file = run.parent / f"{run.name}.parquet"
    subprocess.run(mgen("merge", run, "--to", file), check=True, capture_output=True)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def parts_done(run):
    log = run / "done/rank-00000.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.parametrize(("rows", "times"), [(of_genes, KILLS), (of_cells, KILLS // 2)])
def test_killed_again_and_again_the_merged_file_is_the_same(tmp_path, rows, times):
    command = rows(tmp_path)
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    expected = digest_of_merged(tmp_path / "whole")
    batches = parts_done(tmp_path / "whole")

    draw, kills, starts = random.Random(), 0, 1
    run = tmp_path / "killed"
    while kills < times:
        process = subprocess.Popen(command(run), stderr=subprocess.DEVNULL)
        # Waits for some parts, so that every start gets further and every kill hits computing.
        aim = parts_done(run) + draw.randint(0, max(batches // (times + 2), 1))
        while parts_done(run) <= aim and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        process.kill()
        if process.wait() == 0:  # it was over before: once more from the start
            kills, starts = 0, starts + 1
            assert starts < 5, "the run is too short to be killed"
            shutil.rmtree(run)
        else:
            kills += 1
    subprocess.run(command(run), check=True, capture_output=True)
    assert digest_of_merged(run) == expected
    assert not list(run.rglob("*.tmp")), "a temporary file was left behind"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_cleanly(tmp_path, number, code):
    data, run = written(tmp_path / "genes.fna", 1600), tmp_path / "run"
    process = subprocess.Popen(command(data, run), stderr=subprocess.PIPE, text=True)
    while parts_done(run) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on" in said and "Traceback" not in said
    assert not list(run.rglob("*.tmp"))
    status = subprocess.run(mgen("status", run, "--json"), capture_output=True, text=True)
    found = json.loads(status.stdout)
    assert 3 <= found["batches_done"] < found["batches"]
    assert "embed" in found["next"]
    refused = subprocess.run(mgen("merge", run), capture_output=True, text=True)
    assert refused.returncode == 1 and "are missing" in refused.stderr
    partial = mgen("merge", run, "--allow-missing", "--to", tmp_path / "partial.parquet")
    assert subprocess.run(partial, capture_output=True).returncode == 0


def test_ctrl_c_before_a_run_listens_for_it():
    """Most of a second goes by until then: the command line is built first."""
    build = "import os\nfrom mgen_core import cli\ncli.app = lambda: os.kill(os.getpid(), 2)\n"
    child = [sys.executable, "-c", f"{build}cli.main()"]
    ended = subprocess.run(child, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_a_second_process_in_the_same_directory_is_refused(tmp_path):
    data, run = written(tmp_path / "genes.fna", 1600), tmp_path / "run"
    first = subprocess.Popen(command(data, run), stderr=subprocess.DEVNULL)
    while parts_done(run) < 1:
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # it may not be over before the second has started
    second = subprocess.run(command(data, run), capture_output=True, text=True)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"process {first.pid}) is at work" in second.stderr
    assert first.wait() == 0
