"""Ranks of two hosts: started in three ways, in both strategies, and one host lost.

`nox -s nodes` runs these, as root: they make networks (`hosts.py`).
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes.hosts import INTERFACE, two_hosts, why_not

ASKED = os.environ.get("MGEN_TEST_NODES") == "1"
REASON = why_not() if ASKED else "they make networks: nox -s nodes runs them"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PATIENCE = 300
SILENT = 10  # seconds, where mgen would wait for 60
# One thread each, so that the last digit is the same for any number of ranks.
ENVIRON = {
    "HOME": "/nowhere",
    "PATH": os.environ["PATH"],
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "MGEN_SILENT_SECONDS": str(SILENT),
}
STRATEGIES = pytest.mark.parametrize(
    ("strategy", "told"),
    [("replicate", "4 ranks, each with the whole model"), ("zero3", "sharded in 2 groups of 2")],
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as hosts:
        ENVIRON["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        yield hosts


@pytest.fixture(autouse=True)
def nothing_left_running(request):
    yield
    if "hosts" in request.fixturenames:
        for host in request.getfixturevalue("hosts"):
            host.kill()


@pytest.fixture(scope="module")
def genes(tmp_path_factory):
    """A run long enough to lose a host in the midst of it, and what one process makes of it."""
    folder, draw = tmp_path_factory.mktemp("genes"), random.Random(7)
    texts = ["".join(draw.choices("ACGT", k=draw.randint(20, 400))) for _ in range(2000)]
    data = folder / "genes.fna"
    data.write_text("".join(f">g{n}\n{text}\n" for n, text in enumerate(texts)))
    words = ["embed", data, "--backbone", "aido_dna_dummy", "--pool", "tokens"]
    return expected(words, folder)


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    """Experts, of which each rank uses others."""
    data = Path(__file__).parents[2] / "examples/proteins.fasta"
    words = ["embed", data, "--backbone", "aido_protein_dummy"]
    return expected(words, tmp_path_factory.mktemp("proteins"))


def expected(words, folder):
    words = [*map(str, words), "--batch-tokens", "256"]
    mgen(*words, "--output", folder / "one")
    return words, merged(folder / "one")


def mgen(*words):
    done = subprocess.run(
        [sys.executable, "-m", "mgen_core", *map(str, words)],
        env=ENVIRON,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def merged(run):
    file = run.parent / f"{run.name}.parquet"
    mgen("merge", run, "--to", file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def ended(process):
    """What it said on stderr, and its exit code."""
    _, error = process.communicate(timeout=PATIENCE)
    return error, process.returncode


def of_torchrun(hosts, ranks, words):
    return [
        host.start(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", number,
             "--nproc-per-node", ranks, "--master-addr", hosts[0].address, "--master-port", 29500,
             "-m", "mgen_core", *words],
            ENVIRON,
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip


def of_slurm(hosts, ranks, words):
    """What srun starts: a process a task, which knows its place by these variables."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(2 * ranks),
        "SLURM_STEP_TASKS_PER_NODE": f"{ranks}(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]",
    }
    return [
        host.start(
            [sys.executable, "-m", "mgen_core", *words],
            ENVIRON
            | job
            | {
                "SLURM_PROCID": str(number * ranks + local),
                "SLURM_LOCALID": str(local),
                "SLURM_NODEID": str(number),
            },
        )
        for number, host in enumerate(hosts)
        for local in range(ranks)
    ]


# --- to the end ---


@STRATEGIES
def test_torchrun_on_each_host(hosts, proteins, tmp_path, strategy, told):
    words, digest = proteins
    words = [*words, "--strategy", strategy, "--output", tmp_path / "run"]
    ends = [ended(process) for process in of_torchrun(hosts, 2, words)]
    assert [code for _, code in ends] == [0, 0], ends
    assert told in ends[0][0]
    assert len(list((tmp_path / "run/done").iterdir())) == 4
    assert merged(tmp_path / "run") == digest


@STRATEGIES
def test_a_hostfile_on_one_host(hosts, proteins, tmp_path, strategy, told):
    """pdsh starts a shell without any of our variables; DeepSpeed passes on those in a file."""
    words, digest = proteins
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    passed = "".join(
        f"{name}={ENVIRON[name]}\n" for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    )
    (tmp_path / ".deepspeed_env").write_text(passed)
    words = [*words, "--strategy", strategy, "--output", "run", "--hostfile", "hosts"]
    environ = {name: ENVIRON[name] for name in ("HOME", "PATH")}
    process = hosts[0].start([sys.executable, "-m", "mgen_core", *words], environ, tmp_path)
    said, code = ended(process)
    assert code == 0, said
    assert told in said
    assert len(list((tmp_path / "run/done").iterdir())) == 4
    assert merged(tmp_path / "run") == digest


@STRATEGIES
def test_srun_on_both_hosts(hosts, proteins, tmp_path, strategy, told):
    words, digest = proteins
    words = [*words, "--strategy", strategy, "--output", tmp_path / "run"]
    ends = [ended(process) for process in of_slurm(hosts, 2, words)]
    assert [code for _, code in ends] == [0] * 4, ends
    assert told in ends[0][0]
    assert merged(tmp_path / "run") == digest


def test_one_copy_of_the_model_over_both_hosts(hosts, proteins, tmp_path):
    words, digest = proteins
    words = [*words, "--strategy", "zero3", "--output", tmp_path / "run"]
    ends = [ended(process) for process in of_slurm(hosts, 1, words)]
    assert [code for _, code in ends] == [0, 0], ends
    assert "2 ranks, sharded: as asked" in ends[0][0]
    assert merged(tmp_path / "run") == digest


# --- a host is lost ---


def wait_for_parts(run, ranks, processes):
    """Until every rank has committed something."""
    logs = [run / f"done/rank-{rank:05d}.jsonl" for rank in range(ranks)]
    end = time.monotonic() + PATIENCE
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert time.monotonic() < end, "no parts were written"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def shares(words, ranks):
    """How many batches each rank has to do."""
    told = mgen(*words, "--plan-only", "--devices", ranks).stderr
    return [int(count) for count in re.findall(r"rank \d+: (\d+) batches", told)]


def done_by(run, rank):
    return (run / f"done/rank-{rank:05d}.jsonl").read_text().count("\n")


@pytest.mark.parametrize("lost", [1, 0])
def test_replicas_on_the_other_host_go_on(hosts, genes, tmp_path, lost):
    words, digest = genes
    run = tmp_path / "run"
    processes = of_slurm(hosts, 2, [*words, "--strategy", "replicate", "--output", run])
    wait_for_parts(run, 4, processes)
    hosts[lost].kill()
    ends = [ended(process) for process in processes]
    kept = [0, 1] if lost == 1 else [2, 3]
    for rank, (said, code) in enumerate(ends):
        # Rank 0 knows of what is missing; no other rank says anything.
        assert code == (int(rank == 0) if rank in kept else -9), ends
        assert "Traceback" not in said and (rank == 0 or not said), ends
    if lost == 1:
        assert "the same command goes on from there" in ends[0][0]
    planned = shares([*words, "--output", tmp_path / "new"], 4)
    assert [done_by(run, rank) for rank in kept] == [planned[rank] for rank in kept]
    assert any(done_by(run, rank) < planned[rank] for rank in range(4) if rank not in kept)
    mgen(*words, "--output", run, "--devices", 2)
    assert merged(run) == digest


@pytest.mark.parametrize("lost", [1, 0])
def test_shards_end_together_and_go_on(hosts, genes, tmp_path, lost):
    words, digest = genes
    run = tmp_path / "run"
    words = [*words, "--strategy", "zero3", "--output", run]
    processes = of_slurm(hosts, 2, words)
    wait_for_parts(run, 4, processes)
    began = time.monotonic()
    hosts[lost].kill()
    ends = [ended(process) for process in processes]
    assert time.monotonic() - began < SILENT + 30
    kept = [0, 1] if lost == 1 else [2, 3]
    assert [ends[rank][1] for rank in kept] == [1, 1], ends
    said = "".join(ends[rank][0] for rank in kept)
    assert said.count("error: ") == 1, said
    assert "has not been heard of" in said and "start the same command again" in said
    status = json.loads(mgen("status", run, "--json").stdout)
    assert 0 < status["batches_done"] < status["batches"]
    mgen(*words, "--devices", 2)
    assert merged(run) == digest
