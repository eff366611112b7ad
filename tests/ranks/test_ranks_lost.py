"""A rank that is killed or frozen: nobody waits for it, and the user hears which it was."""

import re

import pytest
from ranks.processes import batches_done, digest, lengths, run, sequences, start

SOON_S = 60.0


@pytest.fixture(scope="module")
def job(tmp_path_factory, faults):
    """A command, and what it comes to."""
    folder = tmp_path_factory.mktemp("lost")
    data = sequences(folder / "genes.fna", "dna", lengths(100, 20, 200))
    words = ("embed", data, "--backbone", "faulty", "--pool", "tokens", "--batch-tokens", 250)
    run(*words, output=folder / "whole", **faults)
    assert batches_done(folder / "whole") >= 60
    return words, digest(folder / "whole")


def lose(words, output, strategy, fault, **environ):
    """Start three ranks, of which one is lost in the midst of a layer; how they ended, soon."""
    before = batches_done(output)
    environ = {"PAUSE": "0.1", **environ, "FAULT": f"place=layer {fault}"}
    started = start(*words, output=output, devices=3, strategy=strategy, **environ)
    started.until(lambda: batches_done(output) > before)
    return started.end(within=SOON_S)


def test_a_sharded_run_ends_when_a_rank_is_killed_and_can_go_on(job, tmp_path, faults):
    words, expected = job
    output = tmp_path / "run"
    for rank in (0, 2):
        ended = lose(words, output, "zero3", f"rank={rank} kind=SIGKILL after=5", **faults)
        assert ended.code == 1
        assert len(ended.errors) == 1, ended.said
        assert re.findall(r"rank (\d) on \S+ is (?:gone|silent)", ended.errors[0]) == [str(rank)]
        assert "the same command again: it goes on" in ended.said
        assert "Traceback" not in ended.said
    run(*words, output=output, devices=3, strategy="zero3", **faults)
    assert digest(output) == expected


def test_replicated_ranks_go_on_when_one_is_killed(job, tmp_path, faults):
    words, expected = job
    output = tmp_path / "run"
    for rank, after in ((0, 5), (1, 1)):
        before = [batches_done(output, other) for other in range(3)]
        ended = lose(
            words, output, "replicate", f"rank={rank} kind=SIGKILL after={after}", **faults
        )
        assert ended.code == 1
        assert f"rank {rank} (process " in ended.said and "SIGKILL" in ended.said
        assert "the same command" in ended.said
        gained = [batches_done(output, other) - before[other] for other in range(3)]
        assert gained[rank] <= after < min(gained[other] for other in range(3) if other != rank)
    run(*words, output=output, devices=3, strategy="replicate", **faults)
    assert digest(output) == expected


def test_a_frozen_rank_ends_a_sharded_run(job, tmp_path, faults):
    words, _ = job
    output = tmp_path / "run"
    # Long enough in it that it has told where it is, which it does every second.
    environ = {**faults, "MGEN_SILENT_SECONDS": "6", "PAUSE": "0.3"}
    ended = lose(words, output, "zero3", "rank=1 kind=SIGSTOP after=10", **environ)
    assert ended.code == 1
    (error,) = ended.errors
    assert re.search(r"rank 1 on \S+ is silent for \d+ s, last .*batch", error)


@pytest.mark.parametrize(("rank", "place"), [(1, "import"), (0, "build"), (1, "build")])
def test_a_rank_that_is_killed_before_anything_is_computed_ends_all(job, tmp_path, faults, rank,
                                                                    place):  # fmt: skip
    words, _ = job
    fault = f"rank={rank} place={place} kind=SIGKILL"
    started = start(*words, output=tmp_path / "run", devices=3, **faults, FAULT=fault)
    ended = started.end(within=SOON_S)
    assert ended.code == 1
    assert f"rank {rank} (process " in ended.said and len(ended.errors) <= 1, ended.said
    assert "the same command" in ended.said and "Traceback" not in ended.said


@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_a_disk_that_fails_on_one_rank_only(job, tmp_path, faults, strategy):
    words, expected = job
    output = tmp_path / "run"
    # A run that was begun, with a file where the parts of rank 1 are to lie.
    fault = "rank=0 place=layer kind=SIGKILL after=5"
    assert start(*words, output=output, **faults, FAULT=fault).end().code == -9
    (output / "parts/rank-00001").write_text("")
    ended = start(*words, output=output, devices=3, strategy=strategy, **faults).end()
    assert ended.code == 1
    (error,) = ended.errors
    assert error.startswith("error: rank 1 on ") and "rank-00001" in error
    assert "Traceback" not in ended.said
    assert batches_done(output, rank=1) == 0
    if strategy == "replicate":
        assert min(batches_done(output, rank) for rank in (0, 2)) > 15, "the others did their share"
    (output / "parts/rank-00001").unlink()
    run(*words, output=output, **faults)
    assert digest(output) == expected
