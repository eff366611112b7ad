"""What goes wrong in the model of one rank only: too little memory, a defect, a row."""

import json

import pytest
from ranks.processes import FULL, digest, lengths, run, sequences, start, table

LIMIT = 300


@pytest.fixture(scope="module")
def job(tmp_path_factory, faults):
    """A command of which rank 1 runs out of memory if anything does, and what it comes to."""
    folder = tmp_path_factory.mktemp("memory")
    data = sequences(folder / "genes.fna", "dna", lengths(40, 20, 200))
    words = ("embed", data, "--backbone", "faulty", "--pool", "tokens", "--batch-tokens", 500)
    run(*words, output=folder / "whole", **faults)
    return words, digest(folder / "whole")


def done_logs(output):
    """The lines of each rank's done-log."""
    logs = sorted(output.glob("done/rank-*.jsonl"))
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def limits(output):
    """What each rank's done-log says of the memory."""
    return [{part["limit"] for part in log} for log in done_logs(output)]


@pytest.mark.parametrize("place", ["before", "layer", "behind"] if FULL else ["layer", "behind"])
def test_sharded_ranks_take_smaller_passes_when_one_has_too_little_memory(job, faults, tmp_path,
                                                                          place):  # fmt: skip
    words, expected = job
    output = tmp_path / "run"
    fault = f"rank=1 place={place} kind=memory over={LIMIT}"
    ended = run(*words, output=output, devices=2, strategy="zero3", **faults, FAULT=fault)
    assert "memory    used up" in ended.said
    learned = limits(output)
    assert len(learned) == 2 and learned[0] & learned[1], "they learned the same"
    assert all(limit is not None and limit <= LIMIT for limit in set.union(*learned))
    assert digest(output) == expected


def test_a_replica_with_too_little_memory_is_alone_with_it(job, faults, tmp_path):
    words, expected = job
    output = tmp_path / "run"
    fault = f"rank=1 place=layer kind=memory over={LIMIT}"
    run(*words, output=output, devices=2, strategy="replicate", **faults, FAULT=fault)
    mine, others = limits(output)[1], limits(output)[0]
    assert others == {None}
    assert all(limit is not None and limit <= LIMIT for limit in mine)
    assert digest(output) == expected


def test_rows_that_are_all_too_large_for_one_sharded_rank_end_all(job, faults, tmp_path):
    words, _ = job
    fault = "rank=1 place=layer kind=memory over=100"
    ended = start(*words, output=tmp_path / "run", devices=2, strategy="zero3", **faults,
                  FAULT=fault).end()  # fmt: skip
    assert ended.code == 1
    (error,) = ended.errors
    assert error.startswith("error: rank 1 on ") and "out of memory with one row alone" in error
    assert "--max-length" in ended.said


@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_a_model_that_fails_on_everything_on_one_rank_is_told_once(job, faults, tmp_path, strategy):
    words, _ = job
    ended = start(*words, output=tmp_path / "run", devices=2, strategy=strategy, **faults,
                  FAULT="rank=1 place=layer kind=bug").end()  # fmt: skip
    assert ended.code == 1
    (error,) = ended.errors
    assert error.startswith("error: rank 1 on ") and "none of the first " in error
    assert "faulty failed with ValueError: a defect of the model (mgen_faults.py:" in error
    assert "Traceback" not in ended.said
    assert not list((tmp_path / "run").glob("done/rank-00001.jsonl"))


@pytest.fixture(scope="module")
def repeats(tmp_path_factory):
    """A command over sequences, of which two, a long one and a short one, are one letter alone."""
    data = sequences(tmp_path_factory.mktemp("repeats") / "genes.fna", "dna", lengths(40, 20, 200))
    with open(data, "a") as file:
        file.write(f">long\n{'A' * 190}\n>short\n{'C' * 35}\n")
    return ("embed", data, "--backbone", "faulty", "--pool", "tokens", "--batch-tokens", 500)


@pytest.mark.parametrize(
    ("fault", "strategies"),
    [("place=layer kind=bug", ("replicate", "zero3")), ("place=behind kind=memory", ("zero3",))],
)
def test_a_row_that_fails_is_set_aside_whichever_rank_has_it(
    repeats, faults, tmp_path, fault, strategies
):
    environ = {**faults, "FAULT": f"rank=any rows=repeats {fault}"}
    run(*repeats, output=tmp_path / "one", **environ)
    whole = table(tmp_path / "one")
    assert whole.num_rows == 42 and whole["error"].null_count == 40
    for strategy in strategies:
        output = tmp_path / strategy
        ended = run(*repeats, output=output, devices=2, strategy=strategy, **environ)
        assert "40 of 42 rows" in ended.said and "set aside 2 rows" in ended.said
        assert table(output).equals(whole)
        failed = [sum(part["failed"] for part in log) for log in done_logs(output)]
        assert sorted(failed) in ([0, 2], [1, 1])
