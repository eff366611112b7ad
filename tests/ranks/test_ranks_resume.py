"""A run goes on after whatever has stopped it, on as many ranks as there are then."""

import os
import random
import signal

import pytest
from ranks.processes import FULL, batches_done, digest, lengths, processes, run, sequences, start

KILLS = 5 if FULL else 1


@pytest.fixture(scope="module")
def slow(tmp_path_factory, faults):
    """A command whose passes take a tenth of a second or longer, and what it comes to."""
    folder = tmp_path_factory.mktemp("slow")
    data = sequences(folder / "genes.fna", "dna", lengths(100, 20, 200))
    words = ("embed", data, "--backbone", "faulty", "--pool", "tokens", "--batch-tokens", 250)
    run(*words, output=folder / "whole", **faults)
    assert batches_done(folder / "whole") > 40
    return words, {**faults, "PAUSE": "0.1"}, digest(folder / "whole")


@pytest.mark.parametrize(
    ("before", "after", "strategy"),
    [
        (4, 1, "replicate"),
        (4, 1, "zero3"),
        (1, 4, "zero3"),
        *([(1, 4, "replicate"), (2, 3, "zero3"), (3, 2, "replicate")] if FULL else []),
    ],
)
def test_killed_and_finished_on_another_number_of_ranks(slow, faults, tmp_path, before, after,
                                                        strategy):  # fmt: skip
    words, environ, expected = slow
    output, draw = tmp_path / "run", random.Random()
    for kill in range(KILLS):
        aim = batches_done(output) + draw.randint(0 if kill else 1, 15 // KILLS)
        started = start(*words, output=output, devices=before, strategy=strategy, **environ)
        started.until(lambda: batches_done(output) >= aim)  # noqa: B023
        started.kill()
    run(*words, output=output, devices=after, strategy=strategy, **faults)
    assert digest(output) == expected
    assert not list(output.rglob("*.tmp")), "a temporary file was left behind"


@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_stopped_in_every_way_it_goes_on(slow, faults, tmp_path, strategy):
    """SIGTERM, Ctrl-C, and the command killed, with which its ranks end."""
    words, environ, expected = slow
    output, shape = tmp_path / "run", {"devices": 2, "strategy": strategy}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = batches_done(output)
        started = start(*words, output=output, **shape, **environ)
        started.until(lambda: batches_done(output) > before)  # noqa: B023
        os.kill(started.process.pid, number)
        ended = started.end(within=60)
        assert ended.code == code, ended.said
        assert "the same command goes on" in ended.said
        assert "Traceback" not in ended.said and not ended.errors
        assert not list(processes(output)), "a rank is left"
    run(*words, output=output, **shape, **faults)
    assert digest(output) == expected


def test_a_second_start_is_refused_as_long_as_a_rank_is_at_work(slow, faults, tmp_path):
    words, environ, expected = slow
    output, shape = tmp_path / "run", {"devices": 2, "strategy": "replicate"}
    first = start(*words, output=output, **shape, **{**environ, "PAUSE": "1"})
    first.until(lambda: batches_done(output, rank=1) > 0)
    for devices in (1, 2):
        second = start(*words, output=output, devices=devices, **faults).end()
        assert second.code == 1 and len(second.errors) == 1
        assert "is at work in" in second.errors[0]
        assert first.process.poll() is None, "the first was over: nothing was tried"
        if devices == 1:
            first.ranks()[0].kill()  # the other one goes on
    first.kill()
    run(*words, output=output, **shape, **faults)
    assert digest(output) == expected


@pytest.mark.parametrize("strategy", ["replicate", "zero3"] if FULL else ["replicate"])
def test_a_finished_run_has_nothing_left_to_do(models, strategy):
    output = models.whole("dna")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    ended = run(*models.words("dna"), output=output, devices=2, strategy=strategy)
    assert "40 of 40 rows" in ended.said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}.items() <= (
        before.items()
    )
