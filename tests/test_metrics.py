"""Figures equal scikit-learn's; what is undefined is None and said; labels are read or refused."""

import io
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from typer.testing import CliRunner

from mgen_core import MgenError, Rows, metrics, plots
from mgen_core.cli import app, running
from mgen_core.cli import labels as command
from mgen_core.columns import HostColumn, to_array
from mgen_core.metrics import Compared, gather, of_classes, of_labels, of_numbers, of_pairs

NAMES = ("a", "b", "c", "d")


def same(found, expected):
    """torchmetrics counts in float32."""
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


def compared(predicted, truth, scores=None):
    given = [np.asarray(values) for values in (predicted, truth)]
    return Compared(*given, given[0] if scores is None else np.asarray(scores), len(truth), 0)


def softmax(logits):
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


# --------------------------------------------------------------------------- classes


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_classes_are_judged_as_by_sklearn(rows, count, seed, few):
    g = np.random.default_rng(seed)
    logits = g.normal(size=(rows, count)).astype(np.float32)
    truth = g.integers(0, max(count - few, 1), rows)  # some classes never come
    guess = logits.argmax(1)
    found = of_classes(compared(guess, truth, logits), NAMES[:count])
    overall = found.overall
    same(overall["accuracy"], sk.accuracy_score(truth, guess))
    same(overall["f1_macro"], sk.f1_score(truth, guess, average="macro"))  # of classes that come
    assert found.confusion == sk.confusion_matrix(truth, guess, labels=range(count)).tolist()
    if len({*truth}) > 1 and len({*guess}) > 1:
        same(overall["mcc"], sk.matthews_corrcoef(truth, guess))
    else:
        assert overall["mcc"] is None and "mcc is undefined" in " ".join(found.notes)
    areas = []
    for number, one in enumerate(found.each):
        right = truth == number
        assert one["class"] == NAMES[number] and one["count"] == right.sum()
        if right.any() or (guess == number).any():
            same(one["f1"], sk.f1_score(right, guess == number, zero_division=0))
        else:
            assert one["f1"] is None
        if 0 < right.sum() < rows:
            areas.append(sk.roc_auc_score(right, softmax(logits.astype(float))[:, number]))
            same(one["auroc"], areas[-1])
        else:
            said = next(note for note in found.notes if note.startswith("auroc is undefined"))
            assert one["auroc"] is None and NAMES[number] in said.split(":")[0]
    assert (overall["auroc_macro"] is None) == (not areas)
    if areas:
        same(overall["auroc_macro"], np.mean(areas))


def test_auroc_of_all_classes_is_sklearns_one_versus_rest():
    g = np.random.default_rng(1)
    logits, truth = g.normal(size=(200, 4)), g.integers(0, 4, 200)
    found = of_classes(compared(logits.argmax(1), truth, logits), NAMES).overall["auroc_macro"]
    same(found, sk.roc_auc_score(truth, softmax(logits), multi_class="ovr"))


def test_a_rare_class_among_many():
    """Where torchmetrics' own MCC is wrong in the fifth digit."""
    g = np.random.default_rng(0)
    truth = (g.random(1_000_000) < 1e-3).astype(int)
    guess = np.where(g.random(len(truth)) < 0.5, truth, g.random(len(truth)) < 1e-3).astype(int)
    scores = np.stack([np.zeros(len(truth)), g.random(len(truth)) + truth * 0.3], axis=1)
    overall = of_classes(compared(guess, truth, scores), NAMES[:2]).overall
    assert overall["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, guess), abs=1e-12)
    same(overall["auroc_macro"], sk.roc_auc_score(truth, scores[:, 1]))


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_several_labels_are_judged_as_by_sklearn(rows, count, seed, share):
    g = np.random.default_rng(seed)
    logits = g.normal(size=(rows, count)).astype(np.float32)
    truth, guess = (g.random((rows, count)) < share).astype(int), (logits > 0).astype(np.int8)
    found = of_labels(compared(guess, truth, logits), NAMES[:count])
    overall = found.overall
    same(overall["exact_match"], sk.accuracy_score(truth, guess))
    same(overall["accuracy"], (truth == guess).mean())
    assert found.confusion == [
        sk.confusion_matrix(truth[:, n], guess[:, n], labels=[0, 1]).tolist() for n in range(count)
    ]
    f1 = [sk.f1_score(truth[:, n], guess[:, n], zero_division=np.nan) for n in range(count)]
    for number, one in enumerate(found.each):
        right, taken = truth[:, number], guess[:, number]
        same(one["accuracy"], sk.accuracy_score(right, taken))
        assert (one["f1"] is None) == np.isnan(f1[number])
        if one["f1"] is not None:
            same(one["f1"], f1[number])
        both = len({*right}) == len({*taken}) == 2
        assert (one["mcc"] is not None) == both
        if both:
            same(one["mcc"], sk.matthews_corrcoef(right, taken))
        assert (one["auroc"] is not None) == (len({*right}) == 2)
        if len({*right}) == 2:
            same(one["auroc"], sk.roc_auc_score(right, logits[:, number]))
    if not np.isnan(f1).all():
        same(overall["f1_macro"], np.nanmean(f1))


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_pairs_are_judged_as_by_sklearn(count, seed, share):
    g = np.random.default_rng(seed)
    scores, truth = g.random(count).astype(np.float32), (g.random(count) < share).astype(np.int8)
    guess = (scores > 0.5).astype(np.int8)
    found = of_pairs(compared(guess, truth, scores))
    for name in ("f1", "precision", "recall"):
        value = getattr(sk, f"{name}_score")(truth, guess, zero_division=np.nan)
        figure = found.overall[name]
        assert (figure is None and name in " ".join(found.notes)) or figure == pytest.approx(value)
        assert (figure is None) == np.isnan(value)
    if len({*truth}) == 2:
        same(found.overall["auroc"], sk.roc_auc_score(truth, scores))
    else:
        assert found.overall["auroc"] is None


# --------------------------------------------------------------------------- numbers


@settings(max_examples=60)
@given(
    st.integers(2, 60),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([0.0, 1e3]),
)
def test_numbers_are_judged_as_by_sklearn(rows, count, seed, unit, shift):
    g = np.random.default_rng(seed)
    truth = g.integers(0, 6, (rows, count)) * unit + shift  # ties
    guess = truth + g.normal(size=truth.shape) * unit
    found = of_numbers(compared(guess, truth), NAMES[:count])
    for number, one in enumerate(found.each):
        right, taken = truth[:, number], guess[:, number]
        same(one["mse"] / unit**2, sk.mean_squared_error(right, taken) / unit**2)
        same(one["mae"] / unit, sk.mean_absolute_error(right, taken) / unit)
        if len({*right}) > 1:
            assert one["r2"] == pytest.approx(sk.r2_score(right, taken), rel=1e-6, abs=1e-6)
            same(one["pearson"], stats.pearsonr(right, taken)[0])
            same(one["spearman"], stats.spearmanr(right, taken)[0])
        else:
            assert one["r2"] is one["pearson"] is one["spearman"] is None
            assert "all labels, or all predictions, are the same" in " ".join(found.notes)
    for name in found.overall:
        figures = [one[name] for one in found.each if one[name] is not None]
        assert not figures or found.overall[name] == pytest.approx(np.mean(figures))


def test_ranks_of_very_many_ties():
    """Where a sum of ranks is over 32 bits."""
    g = np.random.default_rng(0)
    truth = np.repeat([0.0, 1.0, 5.0], [90_000, 5_000, 5_000])[:, None]
    guess = truth + g.normal(size=truth.shape)
    found = of_numbers(compared(guess, truth), ("y",)).overall["spearman"]
    same(found, stats.spearmanr(truth[:, 0], guess[:, 0])[0])


def test_one_row():
    found = of_numbers(compared([[2.0]], [[3.0]]), ("y",))
    assert found.overall == {"mse": 1, "mae": 1, "r2": None, "pearson": None, "spearman": None}
    assert all("there is one row" in note for note in found.notes) and len(found.notes) == 3


def test_other_units_leave_what_does_not_depend_on_them():
    found = of_numbers(compared([[1.0], [2.0]], [[10.0], [20.0]]), ("y",), same_units=False)
    assert found.overall.pop("pearson") == pytest.approx(1) and found.notes == []
    assert found.overall == {"mse": None, "mae": None, "r2": None, "spearman": pytest.approx(1)}


def test_constant_predictions():
    found = of_numbers(compared([[1.0], [1.0]], [[1.0], [2.0]]), ("y",)).overall
    assert found["pearson"] is found["spearman"] is None and found["r2"] == pytest.approx(-1)


# --------------------------------------------------------------------------- merged rows


def merged(error=None, **columns):
    count = len(next(iter(columns.values())))
    arrays = {"row": pa.array(range(count)), "id": pa.array([f"r{n}" for n in range(count)])}
    arrays |= {name: c if isinstance(c, pa.Array) else pa.array(c) for name, c in columns.items()}
    if error:
        arrays["error"] = pa.array(error, pa.string())
    return pa.table(arrays)


def test_rows_set_aside_are_counted_and_left_out():
    logits = [[1.0, 2.0], None, [5.0, 6.0]]
    table = merged([None, "too long", None], label=[1, None, 0], logits=logits)
    found = gather([table, table], iter([0, 1, 1, 0, 0, 0]), metrics.take_classes(NAMES[:2]))
    assert (found.rows, found.failed) == (4, 2)
    assert found.predicted.tolist() == [1, 0, 1, 0] and found.truth.tolist() == [0, 1, 0, 0]
    assert found.scores.tolist() == [[1, 2], [5, 6]] * 2


def test_nothing_to_compare_and_too_few_labels():
    table = merged(["bad"], label=pa.array([None], pa.int32()), logits=[None])
    with pytest.raises(MgenError, match="nothing to compare"):
        gather([table], [0], metrics.take_classes(NAMES))
    with pytest.raises(MgenError, match="fewer rows"):
        gather([merged(label=[1, 0], logits=[[0.0], [0.0]])], [1], metrics.take_classes(NAMES))


def test_classes_with_names_and_several_labels():
    table = merged(label=["b", "a"], logits=[[0.0, 1.0], [1.0, 0.0]])
    assert metrics.take_classes(("a", "b"))(table, [0, 0]).predicted.tolist() == [1, 0]
    table = merged(label=[[0, 1], [1, 1]], logits=[[0.0, 1.0], [1.0, 0.0]])
    found = metrics.take_classes(("a", "b"))(table, [[0, 1], [1, 0]])
    assert found.predicted.tolist() == [[0, 1], [1, 1]] and found.truth.shape == (2, 2)


def test_bfloat16_columns_are_numbers_again():
    bits = (np.array([[1.0, -2.5]], dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    array = to_array(HostColumn(bits, bfloat16=True))
    marked = pa.field("logits", array.type, metadata={"mgen.dtype": "bfloat16"})
    table = pa.table([array], schema=pa.schema([marked]))
    assert metrics.flat(table, "logits").tolist() == [1.0, -2.5]


def test_residues_without_a_label_are_left_out():
    table = merged(label=[[0, 1, 1], [1]], logits=[[[1.0, 0], [0, 1.0], [0, 2.0]], [[0, 3.0]]])
    found = metrics.take_residues(False)(table, [[0, -100, 0], [1]])
    assert found.predicted.tolist() == [0, 1, 1] and found.truth.tolist() == [0, 0, 1]
    assert found.scores.tolist() == [[1, 0], [0, 2], [0, 3]]


def test_a_row_with_another_number_of_labels_than_residues_is_named():
    table = merged(label=[[0, 1], [1, 0]], logits=[[[1.0, 0]] * 2] * 2)
    for told in ([0], [0, 1, 1]):
        with pytest.raises(MgenError, match=rf"row 1 \(r1\): {len(told)} labels for 2 residues"):
            metrics.take_residues(False)(table, [[0, 1], told])
    found = metrics.take_residues(True)(table, [[0, 1], [0, 1, 1]])
    assert found.cut == 1 and found.truth.tolist() == [0, 1, 0, 1]
    with pytest.raises(MgenError, match="row 1"):
        metrics.take_residues(True)(table, [[0, 1], [0]])


def test_pairs_are_counted_once_and_not_with_themselves():
    one = np.array([[0, 0.9, 0.2], [0.9, 0, 0.6], [0.2, 0.6, 0]])
    table = merged(residues=[3, 1, 2], probability=[one.ravel(), [0.0], [0, 0.7, 0.7, 0]])
    found = metrics.take_pairs(False)(table, [[(1, 0), (0, 2)], [], []])
    assert found.truth.tolist() == [1, 1, 0, 0] and found.predicted.tolist() == [1, 0, 1, 1]
    assert found.scores.tolist() == [0.9, 0.2, 0.6, 0.7]
    with pytest.raises(MgenError, match=r"row 2 \(r2\): a pair beyond its 2 residues"):
        metrics.take_pairs(False)(table, [[], [], [(0, 2)]])
    assert metrics.take_pairs(True)(table, [[], [], [(0, 2)]]).cut == 1


# --------------------------------------------------------------------------- labels of a table


class Given(Rows):
    def __init__(self, **columns):
        self.data, self.columns = columns, list(columns)

    def chunks(self, columns):
        count = len(next(iter(self.data.values())))
        for row in range(count):
            yield {name: [self.data[name][row]] for name in columns}


def head(**options):
    usual = {"outputs": 3, "labels": (), "multilabel": False, "top_pairs": None}
    return SimpleNamespace(**{**usual, **options})


def read(task, cells, names=("0", "1", "2"), **options):
    one, hint = command.reader(task, head(**options), names)
    assert hint.startswith("labels are ")
    return one(cells)


@pytest.mark.parametrize(
    ("task", "options", "cells", "expected"),
    [
        ("classify", {}, ["2"], 2),
        ("classify", {}, ["1.0"], 1),
        ("classify", {}, [True], 1),
        ("classify", {}, ["False"], 0),
        ("classify", {"labels": ("x", "y", "z")}, ["y"], 1),
        ("classify", {"labels": ("x", "y", "z")}, ["2"], 2),
        ("classify", {"labels": ("1", "2", "3")}, ["3"], 2),
        ("classify", {"multilabel": True}, ["0", "1", True], [0, 1, 1]),
        ("classify", {"multilabel": True}, [[0, 1, 1]], [0, 1, 1]),
        ("classify", {"multilabel": True}, ["[0, 1, 1]"], [0, 1, 1]),
        ("regress", {}, ["1", "2.5", "-1e3"], [1, 2.5, -1000]),
        ("regress", {}, [[1, 2, 3]], [1, 2, 3]),
        ("classify_tokens", {}, [[0, "1", -100]], [0, 1, -100]),
        ("classify_tokens", {}, ["[0, 2]"], [0, 2]),
        ("classify_tokens", {"labels": ("H", "E", "C")}, ["HCE"], [0, 2, 1]),
        ("classify_pairs", {}, [[[0, 9], [3, 3], ["1", 8]]], [(0, 9), (1, 8)]),
        ("classify_pairs", {}, ["[]"], []),
    ],
)
def test_labels_as_people_write_them(task, options, cells, expected):
    assert read(task, cells, **options) == expected


@pytest.mark.parametrize(
    ("task", "options", "cells", "said"),
    [
        ("classify", {}, ["3"], "class 3 is not one of 0 to 2"),
        ("classify", {}, ["-1"], "class -1 is not"),
        ("classify", {}, ["1.5"], "'1.5' is no class"),
        ("classify", {}, ["nan"], "no class"),
        ("classify", {}, [""], "no label"),
        ("classify", {}, [None], "no label"),
        ("classify", {"labels": ("x", "y", "z")}, ["w"], "'w' is no class"),
        ("classify", {"labels": ("1", "2", "3")}, ["0"], "'0' is no class"),
        ("classify", {"multilabel": True}, ["0", "2", "0"], "class 2 is not one of 0 to 1"),
        ("classify", {"multilabel": True}, [[0, 1]], "2 labels for 3 outputs"),
        ("regress", {}, ["1", "tall", "2"], "'tall' is not a number"),
        ("regress", {}, ["1", "inf", "2"], "not a finite number"),
        ("regress", {}, ["1", "", "2"], "no label"),
        ("regress", {}, ["1"], "'1' is not a list"),
        ("classify_tokens", {}, ["012"], "is not a list"),
        ("classify_tokens", {}, [[0, 7]], "class 7 is not"),
        ("classify_tokens", {}, [[0, None]], "no label"),
        ("classify_pairs", {}, [[[0, 1, 2]]], "is not a pair"),
        ("classify_pairs", {}, [[[-1, 1]]], "is not a pair"),
        ("classify_pairs", {}, [[5]], "5 is not a pair"),
    ],
)
def test_labels_that_cannot_be(task, options, cells, said):
    with pytest.raises(ValueError, match=said):
        read(task, cells, **options)


def labelled(task="classify", x_col=None, exactly=True, limit=None, **columns):
    one, _ = command.reader(task, head(), ("0", "1", "2"))
    return command.Labels(
        task, Given(**columns), ("y",), one, ("0", "1", "2"), "mend it",
        x_col=x_col, exactly=exactly, limit=limit,
    )  # fmt: skip


def test_the_row_of_a_bad_label_is_named_and_a_limit_holds():
    bad = labelled(y=["0", "1", "9"])
    with pytest.raises(MgenError, match=r"row 2 \(counted from 0\), column y: class 9") as told:
        bad.check()
    assert told.value.hint == "mend it"
    assert list(labelled(y=["0", "1", "9"], limit=2)) == [0, 1] == list(islice(bad, 2))


def test_labels_fit_the_letters_before_anything_is_computed():
    labelled("classify_tokens", "x", y=[[0, 1], [2, 2], [1], [0]], x=["AC", "MK*", " A ", None])
    two = labelled("classify_tokens", "x", y=[[0, 1], [2]], x=["AC", "MK"])
    with pytest.raises(MgenError, match=r"row 1 .*1 labels for 2 residues"):
        two.check()
    labelled("classify_tokens", "x", exactly=False, y=[[2]], x=["MKT"]).check()  # k-mers
    with pytest.raises(MgenError, match="2 labels for 1 residues"):
        labelled("classify_tokens", "x", exactly=False, y=[[2, 1]], x=["M"]).check()
    with pytest.raises(MgenError, match="a pair has residue 4, counted from 0, of 4"):
        labelled("classify_pairs", "x", y=[[[0, 4]]], x=["ACGT"]).check()


def test_which_columns_hold_the_labels():
    there = ["id", "label", "y", "labels"]
    columns = command.label_columns
    assert columns(there, ["y", "label"], ("labels",)) == ("y", "label")
    assert columns(there, None, ("y",)) == ("y",)
    assert columns(there, None, ()) == ("labels",) == columns(there, None, ("labels",))
    assert columns(["label"], None, ("labels",)) == ("label",)
    for given_, told in ((["z"], ()), (None, ("z",)), (None, ("rl",))):
        with pytest.raises(MgenError, match="no column") as error:
            columns(there, given_, told)
        assert "--y-col" in error.value.hint and "label, y" in error.value.hint
    with pytest.raises(MgenError, match="no column called labels or label"):
        columns(["id"], None, ())


def test_how_many_columns_and_what_outputs_are_called():
    names = command.output_names
    assert names("regress", head(outputs=None), ("y",)) == ("y",)
    assert names("regress", head(outputs=2), ("y",)) == ("0", "1")
    assert names("classify", head(outputs=2, multilabel=True), ("p", "q")) == ("p", "q")
    assert names("classify", head(outputs=None, labels=("u", "v")), ("y",)) == ("u", "v")
    for task, options, columns in (
        ("classify", {}, ("a", "b")),
        ("regress", {"outputs": 3}, ("a", "b")),
        ("classify", {"outputs": None}, ("a",)),
        ("classify_pairs", {"top_pairs": 5}, ("a",)),
        ("classify_tokens", {"multilabel": True}, ("a",)),
    ):
        with pytest.raises(MgenError):
            names(task, head(**options), columns)


@pytest.mark.parametrize(
    ("normalized", "options", "same"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"label_mean": (1.0,), "label_std": (2.0,)}, True),
        (True, {"label_std": (2.0,)}, False),
        (False, {"scaled": True}, True),
        (False, {"scaled": True, "as_reference": True}, False),
    ],
)
def test_units_of_predictions(normalized, options, same):
    usual = {"label_mean": (), "label_std": (), "scaled": False, "as_reference": False}
    why = command.other_units(head(**{**usual, **options}), normalized=normalized)
    assert why is None if same else "mse, mae and r2 are left out" in why


# --------------------------------------------------------------------------- pictures, and the end


@pytest.mark.parametrize("count", [2, 12, 30, 60])
def test_confusion_pictures(count):
    names = [f"a$b^{{${n}" * 10 for n in range(count)]
    file = io.BytesIO()
    plots.confusion(file, [np.eye(count, dtype=int)] * 2, names, ["one", "$"])
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (50, 30), (plots.POINTS + 1, 2)])
def test_scatter_pictures(rows, count):
    points = np.random.default_rng(0).normal(size=(rows, count))
    file = io.BytesIO()
    plots.scatter(file, points, points, ["y"] * count, same_units=rows > 1)
    assert file.getvalue().startswith(b"\x89PNG")


def test_no_metrics_when_rows_are_missing(tmp_path, monkeypatch):
    """A rank was killed: its rows are not there."""
    (tmp_path / "in.csv").write_text("sequence,label\nACGT,1\nAC,0\n")

    def ends(*_, **__):
        raise typer.Exit(1)

    monkeypatch.setattr(running, "start", ends)
    monkeypatch.chdir(tmp_path)
    words = "test in.csv --backbone dna_onehot --option adapter=LinearMeanPoolAdapter"
    (tmp_path / "c.yaml").write_text("task: classify\n")
    words = f"{words} --option outputs=2 --config c.yaml"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 1 and "none: they need every row" in done.stderr
    assert not Path("predictions").exists() and done.stdout == ""


def test_metrics_as_they_are_written():
    logits = [[0.0, 1.0], [1.0, 0.0]]
    found = of_classes(compared([1, 0], [1, 0], logits), NAMES[:2]).as_dict()
    assert json.loads(json.dumps(found)) == {
        "compared": 2,
        "unit": "rows",
        "metrics": {"accuracy": 1.0, "f1_macro": 1.0, "mcc": 1.0, "auroc_macro": 1.0},
        "classes": [
            {"class": "a", "count": 1, "f1": 1.0, "auroc": 1.0},
            {"class": "b", "count": 1, "f1": 1.0, "auroc": 1.0},
        ],
        "confusion": [[1, 0], [0, 1]],
        "notes": [],
    }
