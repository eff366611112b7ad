"""`--batch-tokens auto`: the fastest budget that can be told in the time allowed; remembered."""

import dataclasses
import json
from itertools import product

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import MgenError, RowError, budget, memo
from mgen_core.api import Row
from mgen_core.budget import Lap, first_near_best, race
from mgen_core.config import make_config
from mgen_core.plan import Entry, PlanSettings, make_batches
from mgen_core.run import plan_only, run
from mgen_core.screen import Screen
from mgen_core.turns import OutOfMemory

BUDGETS = [1024, 512, 2048, 256, 4096, 8192]
PLENTY = 10**9


class Machine:
    """Computes a batch of `budget` tokens at `seconds[budget]` a token; keeps what it was asked."""

    def __init__(self, seconds, most=PLENTY):
        self.seconds = seconds
        self.most = most
        self.ran = []

    def __call__(self, tokens, place):
        if tokens > self.most:
            raise OutOfMemory
        tokens = max(tokens, 30)
        seconds = self.seconds.get(tokens, max(self.seconds.values())) * tokens
        self.ran.append((tokens, seconds))
        return Lap(tokens, seconds, seconds)


def raced(seconds, tokens=PLENTY, most=PLENTY):
    machine = Machine(seconds, most)
    return race(BUDGETS, machine, tokens), machine


def test_the_fastest_wins_and_all_are_compared_where_there_is_time():
    found, _ = raced({1024: 2e-5, 512: 1e-5, 2048: 3e-5, 256: 3e-5, 4096: 4e-5, 8192: 5e-5})
    assert sorted(found) == sorted(BUDGETS)
    assert first_near_best(found) == 512


def test_of_those_that_cannot_be_told_apart_the_usual_one_is_taken():
    seconds = dict.fromkeys(BUDGETS, 1e-5) | {512: 0.98e-5, 1024: 1e-5}
    assert first_near_best(raced(seconds)[0]) == 1024
    assert first_near_best(raced(seconds | {1024: 1.02e-5})[0]) == 512


@given(st.floats(1e-7, 1.0), st.integers(1, 10**8))
def test_measuring_takes_no_longer_than_it_may(seconds, tokens):
    found, machine = raced(dict.fromkeys(BUDGETS, seconds), tokens)
    two_short_rows = 60 * seconds
    spent = sum(taken for _, taken in machine.ran) - two_short_rows
    assert spent <= 1.001 * budget.allowed(seconds, tokens)
    assert not found or (1024 in found and len(found) > 1)


def test_what_does_not_fit_the_memory_is_out_of_the_race():
    seconds = dict.fromkeys(BUDGETS, 1e-5) | {2048: 5e-6, 4096: 1e-6, 8192: 1e-6}
    found, _ = raced(seconds, most=2048)
    assert sorted(found) == [256, 512, 1024, 2048]
    assert first_near_best(found) == 2048


def test_a_budget_alone_is_no_comparison():
    assert raced(dict.fromkeys(BUDGETS, 1.8e-3))[0] == {}  # no time for a second one
    assert raced(dict.fromkeys(BUDGETS, 1.0))[0] == {}


def test_without_memory_for_what_is_usual_nothing_is_chosen():
    assert raced(dict.fromkeys(BUDGETS, 1e-5), most=512)[0] == {}


@given(st.lists(st.integers(1, 300), min_size=1), st.floats(0, 1))
def test_batches_are_taken_where_the_tokens_are(lengths, place):
    entries = [Entry(n, (Row(i, str(i), "A" * n),)) for i, n in enumerate(lengths)]
    batches = make_batches(entries, PlanSettings(batch_tokens=100))
    found = budget.at(batches, place)
    before = sum(batch.tokens for batch in batches[: found.number])
    share = place * sum(lengths)
    assert before <= share + 1e-6 and share <= before + found.tokens + 1e-6


# --------------------------------------------------------------------------- in a run


class Told(Screen):
    def __init__(self):
        self.choices = []

    def chosen(self, choice):
        self.choices.append(choice)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A table large enough to be measured on, and where measurements are remembered."""
    monkeypatch.setenv("MGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "SHARE", 1000.0)
    return toy.write_csv(tmp_path / "in.csv", ["ACDEFGH" * (1 + n % 9) for n in range(60)])


def start(data, output, **more):
    values = {"task": "embed", "backbone": "toy", "data": (str(data),), "output": output, **more}
    screen = Told()
    run(make_config(values), toy.catalog(), screen)
    (choice,) = screen.choices
    recorded = json.loads((output / "run.json").read_text())["identity"]["batch_tokens"]
    assert recorded == choice.tokens
    return choice


def forecast(data, output):
    values = {"task": "embed", "backbone": "toy", "data": (str(data),), "output": output}
    return plan_only(make_config(values), toy.catalog()).choice


def test_a_run_measures_says_so_and_the_next_one_remembers(large, tmp_path, monkeypatch):
    assert forecast(large, tmp_path / "a") == (1024, "the usual number, a run would measure first")
    monkeypatch.setattr(budget, "race", lambda *_: {1024: 2.0, 512: 1.0})
    assert start(large, tmp_path / "a") == (512, "measured, speed 100% at 512, 50% at 1,024")
    monkeypatch.setattr(budget, "race", None)
    assert start(large, tmp_path / "b").tokens == 512
    assert "when it was measured" in forecast(large, tmp_path / "c").why


def test_a_real_race_ends_with_a_budget_and_every_row(large, tmp_path):
    assert start(large, tmp_path / "run").tokens in BUDGETS


def test_what_was_measured_for_long_rows_is_not_used_for_short_ones(large, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "race", lambda *_: {1024: 2.0, 512: 1.0})
    start(large, tmp_path / "a")
    short = toy.write_csv(tmp_path / "short.csv", list(map("".join, product("ACDEFGH", repeat=3))))
    assert start(short, tmp_path / "b").why.startswith("measured")


def test_a_run_that_was_begun_keeps_its_number(large, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "race", lambda *_: {1024: 2.0, 512: 1.0})
    assert start(large, tmp_path / "run").tokens == 512
    monkeypatch.setattr(memo, "recall", lambda *_: 4096)
    assert start(large, tmp_path / "run") == (512, "")


def test_a_number_that_is_given_is_not_measured(large, tmp_path):
    assert start(large, tmp_path / "a", batch_tokens=77) == (77, "")
    assert start(large, tmp_path / "b", batch_rows=5) == (1024, "")


def test_a_small_input_is_not_measured(large, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "SHARE", 0.02)
    assert start(large, tmp_path / "run") == (1024, "")


def test_a_row_that_fails_while_measuring_costs_the_measurement_alone(large, tmp_path, monkeypatch):
    def forward(self, module, inputs, want):
        raise RowError("not on my watch")

    monkeypatch.setattr(toy.Toy, "forward", forward)
    with pytest.raises(MgenError, match="not on my watch"):  # it is the run that says so
        start(large, tmp_path / "run")


def test_a_sharded_model_is_not_measured(large, tmp_path, monkeypatch):
    config = make_config({"task": "embed", "backbone": "toy", "data": (str(large),),
                          "output": tmp_path / "run"})  # fmt: skip
    from mgen_core.engine import place
    from mgen_core.job import open_job

    for change in ({"strategy": "zero3"}, {"offload": "cpu"}):
        job = open_job(dataclasses.replace(config, **change), toy.catalog())
        choice, engine = budget.find(job, place("fp32"), pytest.fail, lambda: None)
        assert (choice.tokens, engine) == (1024, None)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"k": "9"}', b'{"k": -1}', b'{"k": true}'],
)
def test_a_damaged_memory_is_as_good_as_none(content, tmp_path, monkeypatch):
    monkeypatch.setenv("MGEN_CACHE", str(tmp_path))
    (tmp_path / "n.json").write_bytes(content)
    assert memo.recall("n.json", "k") is None
    memo.keep("n.json", "k", 512)
    assert memo.recall("n.json", "k") == 512


def test_a_memory_that_cannot_be_written_costs_nothing_but_itself(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MGEN_CACHE", str(tmp_path / "file"))
    memo.keep("n.json", "k", 512)
    assert memo.recall("n.json", "k") is None


def test_only_the_latest_numbers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MGEN_CACHE", str(tmp_path))
    for number in range(1, memo.MOST + 3):
        memo.keep("n.json", f"k{number}", number)
    assert memo.recall("n.json", "k2") is None
    assert memo.recall("n.json", f"k{memo.MOST + 2}") == memo.MOST + 2


def test_where_the_memory_lies(tmp_path):
    assert memo.folder({"MGEN_CACHE": str(tmp_path)}) == tmp_path
    assert memo.folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "mgen"
    home = memo.folder({"XDG_CACHE_HOME": "not/absolute"})
    assert home.is_absolute() and home.parts[-2:] == (".cache", "mgen")
