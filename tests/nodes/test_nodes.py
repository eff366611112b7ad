"""Ranks on two hosts: started in three ways, in both strategies; a host or the network is lost.

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
from nodes.hosts import ADDRESSES, INTERFACE, two_hosts, why_not

ASKED = os.environ.get("MGEN_TEST_NODES") == "1"
REASON = why_not() if ASKED else "they make networks: nox -s nodes runs them"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PATIENCE_S = 300.0
SOON_S = 60.0
MGEN = (sys.executable, "-m", "mgen_core")
HERE = {
    "HOME": "/nowhere",
    "PATH": os.environ["PATH"],
    # One thread each, so that the last digit is the same for any number of ranks.
    "OMP_NUM_THREADS": "1",
}
THERE = {**HERE, "GLOO_SOCKET_IFNAME": INTERFACE}
STRATEGIES = pytest.mark.parametrize(
    ("strategy", "form"),
    [("replicate", "4 ranks, each with the whole model"), ("zero3", "sharded in 2 groups of 2")],
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with stand-ins for ssh and pdsh, once there are hosts."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def network(programs):
    with two_hosts(programs) as hosts:
        yield hosts


@pytest.fixture
def hosts(network):
    yield network
    for host in network:
        host.kill()
        host.wire(up=True)


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    """A short run, of a model with experts; each rank uses others."""
    data = Path(__file__).parents[2] / "examples/proteins.fasta"
    words = ("embed", data, "--backbone", "aido_protein_dummy", "--batch-tokens", 256)
    return words, of_one_process(words, tmp_path_factory.mktemp("proteins"))


@pytest.fixture(scope="module")
def genes(tmp_path_factory):
    """A run long enough to lose a host in the midst of it."""
    folder, draw = tmp_path_factory.mktemp("genes"), random.Random(7)
    texts = ["".join(draw.choices("ACGT", k=draw.randint(20, 400))) for _ in range(3000)]
    data = folder / "genes.fna"
    data.write_text("".join(f">g{n}\n{text}\n" for n, text in enumerate(texts)))
    words = ("embed", data, "--backbone", "aido_dna_dummy", "--pool", "tokens")
    words += ("--batch-tokens", 256)
    return words, of_one_process(words, folder)


def of_one_process(words, folder):
    mgen(*words, "--output", folder / "one")
    return digest(folder / "one")


def mgen(*words):
    """Run it on this machine to its end, which must be a good one."""
    done = subprocess.run([*MGEN, *map(str, words)], env=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def digest(run):
    """Of the bytes of the merged file."""
    file = run.with_suffix(".parquet")
    mgen("merge", run, "--to", file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def of_torchrun(hosts, words):
    """torchrun on each host, with two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launcher += [f"--master-addr={ADDRESSES['node1']}", "--master-port=29500"]
    return [
        host.start(*launcher, f"--node-rank={number}", "-m", "mgen_core", *words, environ=THERE)
        for number, host in enumerate(hosts)
    ]


def of_srun(hosts, words, ranks=2, **more):
    """What srun starts: a process a task, which is told its place."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(2 * ranks),
        "SLURM_STEP_TASKS_PER_NODE": f"{ranks}(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]",
    }
    started = []
    for rank in range(2 * ranks):
        node, local = divmod(rank, ranks)
        place = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local}
        told = {name: str(number) for name, number in place.items()}
        environ = {**THERE, **job, **told, **more}
        started.append(hosts[node].start(*MGEN, *words, environ=environ))
    return started


def ends(processes, within=PATIENCE_S):
    """Exit codes, and what was said on stderr."""
    began = time.monotonic()
    said = [
        process.communicate(timeout=max(within - (time.monotonic() - began), 0.1))[1]
        for process in processes
    ]
    return [process.returncode for process in processes], said


# --- to the end ---


@STRATEGIES
def test_torchrun_on_each_host(hosts, proteins, tmp_path, strategy, form):
    words, expected = proteins
    words = (*words, "--strategy", strategy, "--output", tmp_path / "run")
    codes, said = ends(of_torchrun(hosts, words))
    assert codes == [0, 0], said
    assert form in said[0]
    assert len(list((tmp_path / "run/done").iterdir())) == 4
    assert digest(tmp_path / "run") == expected


@STRATEGIES
def test_a_hostfile_on_one_host(hosts, programs, proteins, tmp_path, strategy, form):
    """A shell of pdsh knows none of our variables: DeepSpeed passes on those in a file."""
    words, expected = proteins
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    names = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    passed_on = "".join(f"{name}={THERE[name]}\n" for name in names)
    (tmp_path / ".deepspeed_env").write_text(passed_on)
    words = (*words, "--strategy", strategy, "--output", "run", "--hostfile", "hosts")
    environ = {"HOME": "/nowhere", "PATH": f"{programs}{os.pathsep}{THERE['PATH']}"}
    codes, said = ends([hosts[0].start(*MGEN, *words, environ=environ, folder=tmp_path)])
    assert codes == [0], said
    assert form in said[0]
    assert len(list((tmp_path / "run/done").iterdir())) == 4
    assert digest(tmp_path / "run") == expected


@STRATEGIES
def test_srun_on_both_hosts(hosts, proteins, tmp_path, strategy, form):
    words, expected = proteins
    words = (*words, "--strategy", strategy, "--output", tmp_path / "run")
    codes, said = ends(of_srun(hosts, words))
    assert codes == [0] * 4, said
    assert form in said[0]
    assert digest(tmp_path / "run") == expected


def test_one_copy_of_the_model_over_both_hosts(hosts, proteins, tmp_path):
    words, expected = proteins
    words = (*words, "--strategy", "zero3", "--output", tmp_path / "run")
    codes, said = ends(of_srun(hosts, words, ranks=1))
    assert codes == [0, 0], said
    assert "2 ranks, sharded: as asked" in said[0]
    assert digest(tmp_path / "run") == expected


# --- something is lost ---


def wait_for_parts(run, ranks, processes):
    """Until every rank has committed something."""
    logs = [run / f"done/rank-{rank:05d}.jsonl" for rank in range(ranks)]
    began = time.monotonic()
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert time.monotonic() - began < PATIENCE_S, "no parts were written"
        if any(process.poll() is not None for process in processes):
            raise AssertionError(f"over already: {ends(processes, SOON_S)}")
        time.sleep(0.02)


def planned(words, ranks):
    """How many batches each rank has to do."""
    said = mgen(*words, "--plan-only", "--devices", ranks).stderr
    return [int(count) for count in re.findall(r"rank \d+: (\d+) batches", said)]


def done(run, ranks):
    """How many batches each rank has done."""
    logs = [run / f"done/rank-{rank:05d}.jsonl" for rank in range(ranks)]
    return [log.read_text().count("\n") for log in logs]


@pytest.mark.parametrize("lost", [1, 0])
def test_replicas_on_the_other_host_go_on(hosts, genes, tmp_path, lost):
    words, expected = genes
    run = tmp_path / "run"
    processes = of_srun(hosts, (*words, "--strategy", "replicate", "--output", run))
    wait_for_parts(run, 4, processes)
    hosts[lost].kill()
    codes, said = ends(processes)
    kept = [0, 1] if lost == 1 else [2, 3]
    # Rank 0 tells what is missing; where it is gone nobody knows.
    assert [codes[rank] for rank in kept] == ([1, 0] if lost == 1 else [0, 0]), said
    assert lost == 0 or "the same command goes on from there" in said[0]
    assert not any(said[rank] for rank in kept if rank > 0)
    shares, found = planned(words, 4), done(run, 4)
    assert [found[rank] for rank in kept] == [shares[rank] for rank in kept]
    assert sum(found) < sum(shares)
    mgen(*words, "--output", run, "--devices", 2)
    assert digest(run) == expected


def test_replicas_need_no_network_once_they_compute(hosts, genes, tmp_path):
    words, expected = genes
    run = tmp_path / "run"
    processes = of_srun(hosts, (*words, "--strategy", "replicate", "--output", run))
    wait_for_parts(run, 4, processes)
    hosts[1].wire(up=False)
    codes, said = ends(processes)
    assert codes == [0] * 4, said
    assert digest(run) == expected


def test_each_host_with_a_copy_in_shards_goes_on_without_the_other(hosts, genes, tmp_path):
    words, expected = genes
    run = tmp_path / "run"
    words = (*words, "--strategy", "zero3", "--output", run)
    processes = of_srun(hosts, words, MGEN_SILENT_SECONDS="4")
    wait_for_parts(run, 4, processes)
    hosts[1].kill()
    codes, said = ends(processes)
    assert codes[:2] == [1, 0], said
    assert "sharded in 2 groups of 2" in said[0]
    assert "the same command goes on from there" in said[0]
    shares, found = planned(words, 4), done(run, 4)
    assert found[:2] == shares[:2] and sum(found) < sum(shares)
    mgen(*words, "--devices", 2)
    assert digest(run) == expected


@pytest.mark.parametrize(("ranks", "lost"), [(1, 1), (1, 0), (2, 0)])
def test_shards_end_with_the_host_that_they_need(hosts, genes, tmp_path, ranks, lost):
    """One copy over both hosts, or a host without the one where the ranks meet."""
    words, expected = genes
    run = tmp_path / "run"
    words = (*words, "--strategy", "zero3", "--output", run)
    processes = of_srun(hosts, words, ranks)
    wait_for_parts(run, 2 * ranks, processes)
    hosts[lost].kill()
    codes, said = ends(processes, within=SOON_S)
    kept = range(ranks) if lost == 1 else range(ranks, 2 * ranks)
    assert all(codes[rank] == 1 for rank in kept), said
    errors = "".join(said[rank] for rank in kept)
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    assert re.search(rf"rank {lost * ranks} on node{lost + 1} is (silent|gone)", errors), errors
    assert "start the same command again" in errors
    status = json.loads(mgen("status", run, "--json").stdout)
    assert 0 < status["batches_done"] < status["batches"]
    mgen(*words, "--devices", 2)
    assert digest(run) == expected


def test_shards_on_both_ends_of_a_dead_network_end(hosts, genes, tmp_path):
    """Nobody is told that a wire is out: the clock alone tells."""
    words, expected = genes
    run = tmp_path / "run"
    words = (*words, "--strategy", "zero3", "--output", run)
    processes = of_srun(hosts, words, ranks=1, MGEN_SILENT_SECONDS="8")
    wait_for_parts(run, 2, processes)
    hosts[1].wire(up=False)
    codes, said = ends(processes, within=SOON_S)
    assert codes == [1, 1], said
    for rank, (host, other) in enumerate([("node2", 1), ("node1", 0)]):
        assert re.search(rf"rank {other} on {host} is silent for \d+ s", said[rank]), said
    mgen(*words, "--devices", 2)
    assert digest(run) == expected
