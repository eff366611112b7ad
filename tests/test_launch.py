"""Ranks: joining what a launcher started, starting them, what happens to them and to us."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgen_core import MgenError, cores, join, launch
from mgen_core.world import World

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-vm-12@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCH = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "node[01-02,07]",
    "SLURM_NTASKS": "11",
}
# What srun starts for torchrun: one task a node, with the variables of MPICH too.
SRUN_OF_TORCHRUN = SLURM | {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "PMI_RANK": "0",
    "PMI_SIZE": "2",
}


def place(world):
    return world.rank, world.size, world.local_rank, world.local_size


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


# --- joining ---


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCH, (1, 2, 1, 2)),
        (without(TORCH, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2"}, (1, 2, 1, 2)),  # DeepSpeed's
        (without(TORCH, "LOCAL_WORLD_SIZE") | {"MASTER_ADDR": "localhost"}, (1, 2, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1)),
        (OPEN_MPI, (1, 2, 1, 2)),
        (MPICH, (1, 2, 1, 2)),
        (SLURM, (9, 11, 1, 3)),
        (SLURM | {"SLURM_PROCID": "5", "SLURM_NODEID": "1"}, (5, 11, 1, 4)),
        (SLURM | {"PMI_RANK": "9", "PMI_SIZE": "11"}, (9, 11, 1, 3)),
        (SLURM | {"WORLD_SIZE": "11", "MASTER_ADDR": "node01"}, (9, 11, 1, 3)),
        (SLURM | TORCH, (1, 2, 1, 2)),
        (SRUN_OF_TORCHRUN | TORCH, (1, 2, 1, 2)),
        (OPEN_MPI | TORCH, (1, 2, 1, 2)),
    ],
)
def test_every_launcher_ends_in_the_same_variables(environ, expected):
    environ = dict(environ)
    world = join.join(environ)
    assert place(world) == expected
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert tuple(int(environ[name]) for name in names) == expected
    assert environ["MASTER_ADDR"] and int(environ["MASTER_PORT"]) > 0
    assert join.join(environ) == world, "joining twice is joining once"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "LOCAL_SIZE": "2"},
        # A batch script: nobody else would come.
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
    ],
)
def test_started_by_no_launcher(environ):
    before = dict(environ)
    assert join.join(environ) is None
    assert environ == before


def test_slurm_ranks_meet_on_the_first_host_and_each_step_on_its_own_port():
    first, other, next_step = dict(SLURM), SLURM | {"SLURM_PROCID": "0"}, dict(SLURM)
    next_step["SLURM_STEP_ID"] = "1"
    for environ in (first, other, next_step):
        join.join(environ)
    assert first["MASTER_ADDR"] == other["MASTER_ADDR"] == "node01"
    assert first["MASTER_PORT"] == other["MASTER_PORT"] != next_step["MASTER_PORT"]
    assert 20000 <= int(first["MASTER_PORT"]) < 60000


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login", "login"),
        ("node[01-03,07],login", "node01"),
        ("a1,node[2-3]", "a1"),
        ("rack[2,4]n[10-12]", "rack2n10"),
        ("gpu-a[007]", "gpu-a007"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, host):
    assert join.first_host(nodes) == host


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH, SLURM])
def test_an_exported_meeting_point_is_kept(environ):
    environ = environ | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"}
    join.join(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.9", "4000")


def test_local_mpi_ranks_meet_without_being_told_where():
    one, two, other = dict(OPEN_MPI), dict(OPEN_MPI), OPEN_MPI | {"PMIX_NAMESPACE": "job 2"}
    two |= {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    for environ in (one, two, other):
        join.join(environ)
    assert one["MASTER_ADDR"] == two["MASTER_ADDR"] == "127.0.0.1"
    assert one["MASTER_PORT"] == two["MASTER_PORT"] != other["MASTER_PORT"]


@pytest.mark.parametrize(
    ("environ", "what", "hint"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are not",
         "unset RANK"),
        (without(TORCH, "WORLD_SIZE"),
         "RANK, LOCAL_RANK and LOCAL_WORLD_SIZE are set, but WORLD_SIZE is not", "set WORLD_SIZE"),
        (without(TORCH, "MASTER_PORT"), "but MASTER_PORT is not", "torchrun"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "but OMPI_COMM_WORLD_SIZE is not", "mpirun"),
        (TORCH | {"RANK": "first"}, "RANK is 'first', which is not a number", "unset RANK"),
        (TORCH | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'", "unset WORLD_SIZE"),
        (TORCH | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2", "mend RANK"),
        (TORCH | {"LOCAL_RANK": "3"}, "LOCAL_RANK is 3, but LOCAL_WORLD_SIZE is 2", "LOCAL_RANK"),
        (MPICH | {"PMI_RANK": "7"}, "PMI_RANK is 7, but PMI_SIZE is 2", "mend PMI_RANK"),
        (OPEN_MPI | TORCH | {"WORLD_SIZE": "4"},
         "disagree: WORLD_SIZE is 4, but OMPI_COMM_WORLD_SIZE (Open MPI) is 2", "unset RANK"),
        (MPICH | TORCH | {"RANK": "0"},
         "disagree: RANK is 0, but PMI_RANK (MPICH) is 1", "one launcher"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI started 4 ranks on several hosts",
         "-x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500"),
        (MPICH | {"PMI_SIZE": "4"}, "MASTER_ADDR is not set", "-genv MASTER_ADDR"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2"}, "says nothing of node 2", "srun"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set",
         "export MASTER_ADDR=HOST MASTER_PORT=29500"),
    ],
)  # fmt: skip
def test_an_incomplete_or_mixed_environment_is_told(environ, what, hint):
    with pytest.raises(MgenError) as caught:
        join.join(dict(environ))
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_rank_0_of_mpi_names_its_own_host():
    environ = OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(MgenError) as caught:
        join.join(environ)
    assert f"MASTER_ADDR={World().host} " in caught.value.hint


# --- ranks of real processes ---

# Each rank writes what it was told, and its cores, to a file of its own.
REPORT = """
import json, os, pathlib, sys, time
from mgen_core.join import join
world = join(os.environ)
names = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
told = {name: os.environ.get(name) for name in names}
told |= {"place": [world.rank, world.size, world.local_rank, world.local_size]}
told |= {"cores": sorted(os.sched_getaffinity(0)), "words": sys.argv[1:], "pid": os.getpid()}
path = pathlib.Path(os.environ["REPORTS"], f"rank{world.rank}")
path.with_suffix(".new").write_text(json.dumps(told))
path.with_suffix(".new").rename(path)
"""


@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.setenv("REPORTS", str(tmp_path))
    for name in (*TORCH, "OMP_NUM_THREADS", "MGEN_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    return lambda: [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank?"))]


def child(code):
    return [sys.executable, "-c", code]


def places(told):
    return [rank["place"] for rank in told]


def test_local_ranks_find_each_other_and_share_the_cores(reports, monkeypatch):
    monkeypatch.setattr(launch, "usable_cores", lambda: list(range(8)))
    monkeypatch.setenv("MASTER_ADDR", "left.over")
    assert launch.start_local(3, command=child(REPORT)) == 0
    told = reports()
    assert places(told) == [[rank, 3, rank, 3] for rank in range(3)]
    assert {rank["MASTER_ADDR"] for rank in told} == {"127.0.0.1"}
    assert len({rank["MASTER_PORT"] for rank in told}) == 1
    assert {rank["OMP_NUM_THREADS"] for rank in told} == {"2"}


def test_threads_that_the_user_set_are_kept(reports, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch.start_local(2, command=child(REPORT)) == 0
    assert {rank["OMP_NUM_THREADS"] for rank in reports()} == {"5"}


def test_ranks_start_below_one_rank_of_mpi(reports, monkeypatch):
    for name, value in {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.start_local(2, command=child(REPORT)) == 0
    assert places(reports()) == [[0, 2, 0, 2], [1, 2, 1, 2]]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are not bound here")
def test_bound_ranks_have_cores_of_their_own(reports):
    mine = os.sched_getaffinity(0)
    assert launch.start_local(2, bind=True, command=child(REPORT)) == 0
    one, two = (set(rank["cores"]) for rank in reports())
    assert one | two == mine
    assert one.isdisjoint(two) or len(mine) == 1
    assert os.sched_getaffinity(0) == mine


def test_slices_are_fair_and_none_is_empty():
    seven = list(range(7))
    slices = [cores.share_of(seven, index, 3) for index in range(3)]
    assert [core for share in slices for core in share] == seven
    assert {len(share) for share in slices} == {2, 3}
    assert [cores.share_of([4, 5], index, 3) for index in range(3)] == [[4], [5], [4]]


def test_the_command_is_mgens_own(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["mgen", "--version"])
    assert launch.start_local(2) == 0
    assert capfd.readouterr().out.count("mgen ") == 2


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["pass", "pass"], 0),
        (["pass", "sys.exit(3)", "sys.exit(2)"], 3),
        (["os.kill(os.getpid(), 9)", "pass", "sys.exit(4)"], 4),
        (["pass", "os.kill(os.getpid(), 9)"], 1),
    ],
)
def test_the_exit_code_is_that_of_the_first_rank_that_failed(ends, code):
    text = f"import os, sys\nexec({ends!r}[int(os.environ['RANK'])])"
    assert launch.start_local(len(ends), command=child(text)) == code


def test_a_killed_rank_is_told_and_the_others_go_on(reports, capfd):
    code = REPORT + "if world.rank == 1: os.kill(os.getpid(), 9)\n"
    code += "time.sleep(0.4)\nos.write(1, b'rank %d went on\\n' % world.rank)"
    assert launch.start_local(3, command=child(code)) == 1
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["rank 0 went on", "rank 2 went on"]
    pid = reports()[1]["pid"]
    told, hint = err.splitlines()
    assert told == f"rank 1 (process {pid}) was killed by signal 9 (SIGKILL)"
    assert "start the same command again" in hint


def test_a_command_that_cannot_start_is_an_error():
    with pytest.raises(MgenError, match="rank 0 cannot be started: No such file"):
        launch.start_local(2, command=["/nowhere/python"])


# Ends in good order on a signal, as a run does; at once on the next.
PATIENT = """
import signal
got = []
def hear(number, frame):
    got.append(number)
    os.write(1, f"rank {world.rank} heard {number}\\n".encode())
    if len(got) == PATIENCE:
        sys.exit(0)
signal.signal(signal.SIGINT, hear)
signal.signal(signal.SIGTERM, hear)
path.with_suffix(".ready").touch()
time.sleep(60)
"""


def started(folder, call, patience=1):
    """The same as a user's process that calls `start_...`, once its two ranks are ready."""
    (folder / "ranks.py").write_text(REPORT + PATIENT.replace("PATIENCE", str(patience)))
    code = "import sys\nfrom pathlib import Path\nfrom mgen_core import cores, join, launch\n"
    code += f"launch.MODULE, sys.argv = 'ranks', ['mgen']\nsys.exit(launch.{call})"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.getcwd()])}
    process = subprocess.Popen(
        child(code), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(list(folder.glob("*.ready"))) == 2, process)
    return process


def wait_for(condition, process=None, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "heard", "code"),
    [(signal.SIGINT, 2, 130), (signal.SIGTERM, 15, 143), (signal.SIGHUP, 15, 129)],
)
def test_a_signal_reaches_each_rank_once(reports, tmp_path, number, heard, code):
    process = started(tmp_path, "start_local(2)")
    os.killpg(process.pid, number)  # as a terminal does: the whole foreground hears Ctrl-C
    out, err = process.communicate(timeout=20)
    assert sorted(out.splitlines()) == [f"rank 0 heard {heard}", f"rank 1 heard {heard}"]
    assert process.returncode == code
    assert err == ""


def test_a_second_signal_is_passed_on_too(reports, tmp_path):
    process = started(tmp_path, "start_local(2)", patience=2)
    process.send_signal(signal.SIGINT)
    assert "heard" in process.stdout.readline() and "heard" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out.count("heard 2") == 2
    assert process.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_ranks_end_with_a_killed_parent(reports, tmp_path):
    process = started(tmp_path, "start_local(2)")
    ranks = [rank["pid"] for rank in reports()]
    assert all(map(alive, ranks))
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, ranks)), seconds=10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_rank_whose_parent_is_gone_ends_before_it_starts():
    environ = os.environ | {"MGEN_LAUNCHER": "local", "MGEN_PARENT": "1"}
    code = "import os\nfrom mgen_core.join import join\njoin(os.environ)"
    assert subprocess.run(child(code), env=environ).returncode == -signal.SIGTERM


def test_ranks_of_torchrun_join(reports, tmp_path):
    script = tmp_path / "script.py"
    code = "world = join.join(os.environ)\ncores.share_cores(world, os.environ)\n"
    script.write_text(f"import os\nfrom mgen_core import cores, join, launch\n{code}{REPORT}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node=2", script],
        env=os.environ | {"PYTHONPATH": os.getcwd()}, check=True, capture_output=True,
    )  # fmt: skip
    assert places(reports()) == [[0, 2, 0, 2], [1, 2, 1, 2]]
    fair = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert {rank["OMP_NUM_THREADS"] for rank in reports()} == {str(fair)}


# --- cores and devices ---


@pytest.mark.parametrize(
    ("environ", "world", "threads"),
    [
        ({}, World(size=4, local_size=4), "4"),
        ({}, World(size=40, local_size=40), "1"),
        ({}, World(size=4, local_size=1), None),
        ({"OMP_NUM_THREADS": "1"}, World(size=4, local_size=4), "1"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, World(size=4, local_size=4), "4"),
        ({"OMP_NUM_THREADS": "6", "TORCHELASTIC_RUN_ID": "x"}, World(size=4, local_size=4), "6"),
        # Slurm gave each task these cores; torchrun's ranks share those of the task.
        (SLURM | {"SLURM_CPUS_PER_TASK": "8"}, World(9, 11, 1, 3), "8"),
        (SLURM | {"SLURM_CPUS_PER_TASK": "64"}, World(9, 11, 1, 3), "16"),
        (SRUN_OF_TORCHRUN | {"SLURM_CPUS_PER_TASK": "16"}, World(0, 8, 0, 4), "4"),
    ],
)
def test_ranks_of_a_host_share_its_cores(environ, world, threads, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: list(range(16)))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    environ = dict(environ)
    cores.share_cores(world, environ)
    assert environ.get("OMP_NUM_THREADS") == threads


def test_torch_that_is_imported_already_hears_of_its_share():
    code = (
        "import torch\nfrom mgen_core import cores\nfrom mgen_core.world import World\n"
        "cores.usable_cores = lambda: [0, 1, 2, 3, 4, 5]\n"
        "cores.share_cores(World(size=2, local_size=2), {})\nprint(torch.get_num_threads())"
    )
    assert subprocess.check_output(child(code), text=True) == "3\n"


def test_devices_are_those_asked_for_or_one(monkeypatch):
    assert launch.devices(3) == 3
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert launch.devices(None) == 1
    with pytest.raises(MgenError, match="--devices is 0"):
        launch.devices(0)


def test_launching_imports_no_torch():
    code = "import sys\nfrom mgen_core import cores, join, launch\njoin.join({})\n"
    code += "print({'torch', 'deepspeed'} & set(sys.modules))"
    assert subprocess.check_output(child(code), text=True) == "set()\n"


# --- several hosts ---


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "what", "hint"),
    [
        (None, None, None, "cannot be read: No such file", "node1 slots=4"),
        ("", None, None, "names no host", "node1 slots=4"),
        ("# ours\n\nnode1 slots=2\nnode2 4\n", None, None,
         "line 4 of {file} is not of the form HOST slots=N: node2 4", "node1 slots=4"),
        ("node1 slots=0", None, None, "line 1 of {file} is not", "node1 slots=4"),
        ("node1 slots=2\nnode1 slots=2", None, None, "line 2 of {file} names a host again", "once"),
        ("node1 slots=2\nnode2 slots=2", 3, None, "--num-nodes is 3, but {file} names 2 hosts",
         "1 to 2"),
        ("node1 slots=2", 0, None, "--num-nodes is 0", "1 to 1"),
        ("node1 slots=2", 1, 4, "--devices is 4, but node1 has slots=2 in {file}", "1 to 2"),
    ],
)  # fmt: skip
def test_a_wrong_hostfile_is_told_before_anything_starts(
    tmp_path, text, nodes, devices, what, hint
):
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(MgenError) as caught:
        launch.start_nodes(file, nodes, devices)
    assert what.format(file=file) in caught.value.what
    assert hint in caught.value.hint


def test_several_nodes_need_a_hostfile():
    with pytest.raises(MgenError, match="--num-nodes 2 needs --hostfile") as caught:
        launch.start_nodes(None, 2, 8)
    assert "node1 slots=8\n    node2 slots=8\n" in caught.value.hint
    assert "torchrun or srun" in caught.value.hint


def test_what_is_not_installed_is_told(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\nnode2 slots=2\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MgenError, match="DeepSpeed, which is not installed") as caught:
        launch.start_nodes(hosts, None, None)
    assert "pip install deepspeed" in caught.value.hint
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MgenError, match="node1 and node2 cannot be reached: pdsh") as caught:
        launch.start_nodes(hosts, None, None)
    assert "install pdsh" in caught.value.hint


def test_one_node_without_a_hostfile_is_this_one(reports, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mgen", "--version"])
    assert launch.start_nodes(None, 1, 2) == 0


def test_deepspeed_starts_ranks_here_and_passes_a_signal_on(reports, tmp_path):
    pytest.importorskip("deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    process = started(tmp_path, f"start_nodes(Path({str(hosts)!r}), None, None)")
    assert places(reports()) == [[0, 2, 0, 2], [1, 2, 1, 2]]
    ranks = [rank["pid"] for rank in reports()]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert [line for line in sorted(out.splitlines()) if "heard" in line] == [
        "rank 0 heard 15",
        "rank 1 heard 15",
    ]
    assert process.returncode == 143
    assert not any(map(alive, ranks))


# Stand for the programs of the same name, where "another host" is this one.
SSH = "#!/bin/sh\necho 127.0.0.1\n"
PDSH = f"""#!{sys.executable}
import subprocess, sys
hosts, words = sys.argv[sys.argv.index("-w") + 1], sys.argv[sys.argv.index("-w") + 2 :]
text = " ".join(words).replace("%%", "\\0")
lines = [text.replace("%n", str(n)).replace("\\0", "%") for n, _ in enumerate(hosts.split(","))]
shells = [subprocess.Popen(["sh", "-c", line]) for line in lines]
sys.exit(max([shell.wait() for shell in shells]))
"""
WORDS = ["a b", "$HOME", "100%n", "x*y", 'it\'s "so"', "(or not)", "\\d+ `pwd`", ""]


def test_deepspeed_starts_ranks_on_other_hosts_with_the_same_words(reports, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "ranks.py").write_text(REPORT + "sys.exit(5 * world.rank)")
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1 # the last\nthree slots=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    monkeypatch.setattr(launch, "MODULE", "ranks")
    monkeypatch.setattr(sys, "argv", ["mgen", *WORDS])
    assert launch.start_nodes(tmp_path / "hosts", 2, None) == 5
    told = reports()
    assert places(told) == [[0, 2, 0, 1], [1, 2, 0, 1]]
    assert [rank["words"] for rank in told] == [WORDS, WORDS]
