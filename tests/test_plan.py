"""The plan: every row once, budgets kept, nothing depends on who computes it."""

import hashlib
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import Backbone, BackboneCard, BackboneOptions, Row, RowError, WeightsError
from mgen_core.plan import (
    Batch,
    Entry,
    Failure,
    PlanSettings,
    Survey,
    deal,
    make_batches,
    make_work,
    survey,
    windows,
)


class Letters(Backbone):
    """One token a letter, one special token; `!` is illegal, `?` trips a bug in the plugin."""

    def prepare(self, row):
        if "!" in row.data:
            raise RowError("illegal character '!'")
        if "?" in row.data:
            raise KeyError("?")
        return row._replace(data=row.data.upper())

    def note(self, row, prepared):
        return "made upper case" if row.data != prepared.data else None

    def measure(self, row):
        return len(row.data) + 1


def letters():
    card = BackboneCard("letters", "", "dna", load=Letters)
    return Letters(card, BackboneOptions())


def rows_of(texts):
    return [Row(index, f"id{index % 3}", text) for index, text in enumerate(texts)]


def plan(texts, **settings):
    chosen = PlanSettings(**{"batch_tokens": 64, "window_rows": 7, **settings})
    return list(windows(iter(rows_of(texts)), letters(), chosen, lambda tokens: tokens))


texts = st.lists(st.text("acgt!?ACGT", max_size=40), max_size=60)


@given(texts, st.integers(1, 200), st.integers(1, 20))
def test_every_row_is_in_one_batch_or_set_aside_once(texts, budget, window):
    planned = plan(texts, batch_tokens=budget, window_rows=window)
    seen = [row.index for w in planned for batch in w.batches for row in batch.rows]
    seen += [failure.row for w in planned for failure in w.failures]
    assert sorted(seen) == list(range(len(texts)))
    assert sum(w.rows for w in planned) == len(texts)


@given(texts, st.integers(1, 200))
def test_batches_keep_the_budget_and_are_numbered_through(texts, budget):
    planned = plan(texts, batch_tokens=budget)
    batches = [batch for w in planned for batch in w.batches]
    assert [batch.number for batch in batches] == list(range(len(batches)))
    for batch in batches:
        assert batch.computed <= budget or len(batch.entries) == 1
        assert batch.computed == len(batch.entries) * batch.entries[0].tokens
    for w in planned:
        longest = [batch.entries[0].tokens for batch in w.batches]
        assert longest == sorted(longest, reverse=True)


@given(texts, st.integers(1, 200))
def test_a_backbone_that_packs_pays_no_padding(texts, budget):
    for w in plan(texts, batch_tokens=budget, packed=True):
        for batch in w.batches:
            assert batch.computed == batch.tokens
            assert batch.computed <= budget or len(batch.entries) == 1


@given(texts)
def test_equal_inputs_of_a_window_are_computed_once(texts):
    for w in plan(texts):
        computed = [entry.rows[0].data for batch in w.batches for entry in batch.entries]
        assert len(computed) == len(set(computed))
        for batch in w.batches:
            for entry in batch.entries:
                assert {row.data for row in entry.rows} == {entry.rows[0].data}


@given(texts, st.integers(1, 5))
def test_dealing_gives_each_batch_to_one_rank_and_is_fair(texts, ranks):
    loads, largest = [0] * ranks, 0
    for w in plan(texts, window_rows=3):
        before = list(loads)
        dealt = deal(w.batches, loads)
        assert len(dealt) == ranks
        assert sorted(b.number for rank in dealt for b in rank) == [b.number for b in w.batches]
        given = [sum(b.computed for b in rank) for rank in dealt]
        assert loads == [old + new for old, new in zip(before, given)]
        largest = max([largest, *(b.computed for b in w.batches)])
        assert max(loads) - min(loads) <= largest  # over all windows, however small they are


@given(texts, st.integers(1, 30))
def test_a_window_closes_by_rows_tokens_or_bytes(texts, most):
    longest = max((len(text) + 1 for text in texts), default=0)
    for w in plan(texts, window_tokens=most, window_rows=1000):
        assert sum(batch.tokens for batch in w.batches) <= most + longest
    for w in plan(texts, window_bytes=most, window_rows=1000):
        tokens = sum(e.tokens * len(e.rows) for b in w.batches for e in b.entries)
        assert tokens <= most + longest


def surveyed(texts, **settings):
    total = list(survey(iter(plan(texts, **settings)), lambda tokens: tokens))[-1]
    assert isinstance(total, Survey)
    return total


@given(texts)
def test_survey_counts_what_the_plan_holds(texts):
    total = surveyed(texts)
    bad = sum("!" in text or "?" in text for text in texts)
    assert (total.rows, total.failed) == (len(texts), bad)
    assert total.bytes == sum(len(text) + 1 for text in texts if not set(text) & set("!?"))
    assert [w[1] for w in total.windows] == [w.rows for w in plan(texts)]
    assert 0 < total.useful <= 1


def test_the_digest_names_the_plan():
    texts = ["ACGT" * n for n in range(1, 12)]
    assert surveyed(texts).digest == surveyed(list(texts)).digest
    assert surveyed(texts).digest != surveyed(texts, batch_tokens=32).digest
    assert surveyed(texts).digest != surveyed(texts[::-1]).digest
    assert len(surveyed(texts).digest) == hashlib.sha256().digest_size * 2


def test_too_long_rows_are_set_aside_or_cut_on_request():
    (aside,) = plan(["ACGTACGT", "AC"], max_tokens=5)
    assert [f.reason for f in aside.failures] == ["longer than 5 tokens: 9"]
    (cut,) = plan(["ACGTACGT", "AC"], max_tokens=5, too_long="truncate")
    assert cut.failures == ()
    assert [e.rows[0].data for b in cut.batches for e in b.entries] == ["ACGT", "AC"]
    assert cut.notes["truncated"] == 1


def test_a_bug_in_a_backbone_costs_the_row_it_stumbled_on():
    (window,) = plan(["AC", "A?", "GT"])
    assert window.failures[0].row == 1
    reason = window.failures[0].reason
    assert re.fullmatch(r"letters failed with KeyError: '\?' \(.*test_plan.py:\d+\)", reason)
    assert window.failures[0].kind == "letters failed with KeyError"


def test_an_error_that_is_not_about_a_row_ends_the_plan():
    class Lacking(Letters):
        def measure(self, row):
            raise WeightsError("no vocabulary.txt")

    with pytest.raises(WeightsError, match=r"no vocabulary"):
        list(windows(rows_of(["AC"]), Lacking(None, None), PlanSettings(64)))


def test_a_row_that_was_not_read_is_set_aside():
    rows = [Row(0, "a", RowError("csv cannot read it: no quote")), Row(1, "b", "AC")]
    (window,) = windows(rows, letters(), PlanSettings(64))
    assert window.failures == (Failure(0, "a", "csv cannot read it: no quote"),)
    assert [row.index for batch in window.batches for row in batch.rows] == [1]


def test_a_failure_is_a_line_whatever_is_in_it():
    line = Failure(3, "line\nbreak \ud800 \u202e", "half \udfff").line()
    assert line.count("\n") == 1 and json.loads(line.encode())["row"] == 3


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 30), st.booleans())
def test_work_runs_every_variant_once_and_tells_who_has_none(counts, budget, packed):
    def variants(row):
        if row.data == "0":
            raise RowError("none")
        return [row.with_data(f"{row.index}.{n}") for n in range(int(row.data))]

    entries = tuple(Entry(5, (Row(n, str(n), str(count)),)) for n, count in enumerate(counts))
    settings = PlanSettings(batch_tokens=budget, packed=packed)
    work = make_work(Batch(0, entries, 5), variants, lambda row: 3, settings)
    ran = [row.data for rows in work.passes for row in rows]
    assert ran == [f"{n}.{m}" for n, count in enumerate(counts) for m in range(count)]
    assert work.counts == tuple(counts)
    assert work.reasons == {n: "none" for n, count in enumerate(counts) if count == 0}
    assert work.passes


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 90), st.booleans())
def test_a_batch_without_variants_is_one_pass(lengths, budget, packed):
    entries = [Entry(tokens, (Row(n, str(n), "A" * tokens),)) for n, tokens in enumerate(lengths)]
    settings = PlanSettings(batch_tokens=budget, packed=packed)
    for batch in make_batches(entries, settings):
        work = make_work(batch, lambda row: [row], lambda row: len(row.data), settings)
        assert len(work.passes) == 1


def test_changes_are_counted():
    (window,) = plan(["ac", "AC", "gt"])
    assert window.notes == Counter({"made upper case": 2})


@pytest.mark.parametrize("order", [1, -1])
def test_rows_with_fields_are_never_merged(order):
    rows = [Row(i, str(i), "ACGT", {"msa": i}) for i in range(3)][::order]
    (window,) = windows(iter(rows), letters(), PlanSettings(64))
    assert [len(e.rows) for b in window.batches for e in b.entries] == [1, 1, 1]


def test_batches_of_neighbours_keep_the_order_and_repeats():
    rows = [Row(n, str(n), text) for n, text in enumerate(["AAAA", "A", "AAAA", "AA", "!", "A"])]

    class Letters(Backbone):
        def prepare(self, row):
            if row.data == "!":
                raise RowError("illegal")
            return row

        def measure(self, row):
            return len(row.data)

    settings = PlanSettings(batch_tokens=1, batch_rows=2, window_rows=3)
    planned = list(windows(rows, Letters(None, None), settings))
    batches = [batch for window in planned for batch in window.batches]
    assert [[row.index for row in batch.rows] for batch in batches] == [[0, 1], [2, 3], [5]]
    assert [batch.number for batch in batches] == [0, 1, 2]
    assert [batch.computed for batch in batches] == [8, 8, 1]
