"""What goes wrong in the model of one rank only: too little memory, a defect."""

import json

import pytest
from ranks.processes import FULL, digest, lengths, run, sequences, start

LIMIT = 300


@pytest.fixture(scope="module")
def job(tmp_path_factory, faults):
    """A command of which rank 1 runs out of memory if anything does, and what it comes to."""
    folder = tmp_path_factory.mktemp("memory")
    data = sequences(folder / "genes.fna", "dna", lengths(40, 20, 200))
    words = ("embed", data, "--backbone", "faulty", "--pool", "tokens", "--batch-tokens", 500)
    run(*words, output=folder / "whole", **faults)
    return words, digest(folder / "whole")


def limits(output):
    """What each rank's done-log says of the memory."""
    return [
        {json.loads(line)["limit"] for line in log.read_text().splitlines()}
        for log in sorted(output.glob("done/rank-*.jsonl"))
    ]


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


def test_a_row_that_is_too_large_for_one_sharded_rank_ends_all(job, faults, tmp_path):
    words, _ = job
    fault = "rank=1 place=layer kind=memory over=100"
    ended = start(*words, output=tmp_path / "run", devices=2, strategy="zero3", **faults,
                  FAULT=fault).end()  # fmt: skip
    assert ended.code == 1
    (error,) = ended.errors
    assert error.startswith("error: rank 1 on ") and "out of memory with one row alone" in error


@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_a_defect_on_one_rank_is_told_once_with_the_rank(job, faults, tmp_path, strategy):
    words, _ = job
    fault = "rank=1 place=layer kind=bug after=2"
    ended = start(*words, output=tmp_path / "run", devices=2, strategy=strategy, **faults,
                  FAULT=fault).end()  # fmt: skip
    assert ended.code == 1
    assert ended.said.count("ValueError: a defect of the model") == 1
    assert ended.said.count("Traceback") == 1 and len(ended.errors) == 1
    assert "rank 1 on" in ended.errors[0]
