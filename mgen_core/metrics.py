"""How good predictions are: merged rows and their labels in, figures out. No files, no ranks.

Figures are torchmetrics' where it computes them exactly. Three are not, in its version 1.9: MCC
sums in float32 (wrong in the 5th digit where a class is rare), R2 takes labels that vary by less
than 0.01 for constant (any number becomes 1), and Spearman adds ranks as 32-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)
from torchmetrics.functional.regression import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
)

from .columns import BFLOAT16, ERROR, ID, ROW
from .errors import RunError

Array = npt.NDArray[Any]
Figure = float | None
Figures = dict[str, Figure]

IGNORED = -100
"""The label of a residue that has none, as in ModelGenerator's tables."""


@dataclass(frozen=True)
class Metrics:
    """Figures; None is one that is undefined, and `notes` say why.

    `count` of `unit` were compared. `each` has the figures of each class, label or output (its
    `kind`). `confusion`: how often [true class][predicted class], one matrix for each label of a
    multilabel model.
    """

    unit: str
    count: int
    overall: Figures
    kind: str = ""
    each: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As it is written to metrics.json."""
        told: dict[str, Any] = {"compared": self.count, "unit": self.unit, "metrics": self.overall}
        if self.kind:
            told[self.kind] = self.each
        if self.confusion:
            told["confusion"] = self.confusion
        return {**told, "notes": self.notes}


# --------------------------------------------------------------------------- merged rows


class Compared(NamedTuple):
    """Predictions and labels, end to end: of rows, or of the residues or pairs in them.

    `scores` are what ranks the predictions: logits, or the probability of a pair. `rows` were
    compared, `failed` were set aside, `cut` have more labels than the model was given residues.
    """

    predicted: Array
    truth: Array
    scores: Array
    rows: int
    failed: int
    cut: int = 0


class Piece(NamedTuple):
    """The same of a few rows."""

    predicted: Array
    truth: Array
    scores: Array
    cut: int = 0


Take = Callable[[pa.Table, Sequence[Any]], Piece]


def gather(tables: Iterable[pa.Table], labels: Iterable[Any], take: Take) -> Compared:
    """Predictions beside the labels of the same rows; both come in the order of the input.

    Memory: the scores and labels of all rows, and a table. Raises `RunError` when nothing can be
    compared.
    """
    pieces: list[Piece] = []
    rows = failed = 0
    left = iter(labels)
    for table in tables:
        told = list(islice(left, len(table)))
        if ERROR in table.column_names:
            good = pc.is_null(table[ERROR])
            failed += len(table) - pc.sum(good).as_py()
            table, told = table.filter(good), [t for t, fine in zip(told, good.to_pylist()) if fine]
        if len(told) != len(table):
            raise RunError("the input has fewer rows than the run", "it changed: start anew")
        rows += len(table)
        if len(table):
            pieces.append(take(table, told))
    if not sum(len(piece.truth) for piece in pieces):
        raise RunError("no prediction has a label: nothing to compare", "check the label column")
    return Compared(
        predicted=np.concatenate([piece.predicted for piece in pieces]),
        truth=np.concatenate([piece.truth for piece in pieces]),
        scores=np.concatenate([piece.scores for piece in pieces]),
        rows=rows,
        failed=failed,
        cut=sum(piece.cut for piece in pieces),
    )


def take_classes(names: Sequence[str]) -> Take:
    """Of `classify`: a class a row, or with labels (C,) each of them true or not."""
    numbers = {name: number for number, name in enumerate(names)}

    def take(table: pa.Table, labels: Sequence[Any]) -> Piece:
        truth = np.array(labels, dtype=np.int64)
        found = table["label"]
        if pa.types.is_string(found.type):
            predicted = np.array([numbers[name] for name in found.to_pylist()])
        else:
            predicted = flat(table, "label").reshape(truth.shape)
        return Piece(predicted, truth, flat(table, "logits").reshape(len(truth), -1))

    return take


def take_numbers(table: pa.Table, labels: Sequence[Any]) -> Piece:
    """Of `regress`: labels (K,) a row."""
    truth = np.array(labels, dtype=np.float64)
    predicted = flat(table, "prediction").astype(np.float64).reshape(truth.shape)
    return Piece(predicted, truth, predicted)


def take_residues(cuts: bool) -> Take:
    """Of `classify_tokens`: a class a residue. `cuts`: the run shortened rows that are too long.

    The taking raises `RunError` for a row that has not one label a residue.
    """

    def take(table: pa.Table, labels: Sequence[Any]) -> Piece:
        lengths = pc.list_value_length(table["label"]).to_pylist()
        cut = 0
        for place, (length, told) in enumerate(zip(lengths, labels)):
            if len(told) != length and not (cuts and len(told) > length):
                raise _unfit(table, place, f"{len(told)} labels for {length} residues")
            cut += len(told) > length
        found = [np.array(told[:n], dtype=np.int64) for told, n in zip(labels, lengths)]
        truth = np.concatenate(found)
        kept = truth != IGNORED
        logits = flat(table, "logits").reshape(len(truth), -1)
        return Piece(flat(table, "label")[kept], truth[kept], logits[kept], cut)

    return take


def take_pairs(cuts: bool) -> Take:
    """Of `classify_pairs`: whether residues i < j are a pair, for all of them."""

    def take(table: pa.Table, labels: Sequence[Any]) -> Piece:
        lengths = table["residues"].to_pylist()
        chances = flat(table, "probability")
        ends = np.cumsum([length * length for length in lengths])
        scores, truth, cut = [], [], 0
        for place, (length, told, end) in enumerate(zip(lengths, labels, ends)):
            inside = [pair for pair in told if max(pair) < length]
            if len(inside) != len(told):
                cut += 1
                if not cuts:
                    raise _unfit(table, place, f"a pair beyond its {length} residues")
            paired = np.zeros((length, length), dtype=np.int8)
            for i, j in inside:
                paired[min(i, j), max(i, j)] = 1
            above = np.triu_indices(length, 1)
            truth.append(paired[above])
            scores.append(chances[end - length * length : end].reshape(length, length)[above])
        score = np.concatenate(scores)
        return Piece((score > 0.5).astype(np.int8), np.concatenate(truth), score, cut)

    return take


def flat(table: pa.Table, name: str) -> Array:
    """All numbers of a column, of whatever lists it is made, in order."""
    found: list[Array] = []
    for chunk in table[name].chunks:
        while pa.types.is_nested(chunk.type):
            chunk = chunk.flatten()
        found.append(chunk.to_numpy(zero_copy_only=False))
    values = np.concatenate(found)
    if (table.schema.field(name).metadata or {}).items() >= BFLOAT16.items():
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _unfit(table: pa.Table, place: int, what: str) -> RunError:
    row, name = table[ROW][place].as_py(), table[ID][place].as_py()
    return RunError(
        f"row {row} ({name}): {what}", "mend its labels, or leave the row out, and start anew"
    )


# --------------------------------------------------------------------------- classes


def of_classes(of: Compared, names: Sequence[str], unit: str = "rows") -> Metrics:
    """Of one class among several: scores are logits (n, C), predictions and labels (n,)."""
    count = len(names)
    guess, truth = _tensor(of.predicted).long(), _tensor(of.truth).long()
    chances = _tensor(of.scores).double().softmax(dim=-1)
    matrix = multiclass_confusion_matrix(guess, truth, count)
    f1 = multiclass_f1_score(guess, truth, count, average=None)
    seen = (matrix.sum(0) + matrix.sum(1)).bool().tolist()
    each = [
        {
            "class": name,
            "count": int(matrix[number].sum()),
            "f1": _plain(f1[number]) if seen[number] else None,
            "auroc": _auroc(chances[:, number], truth == number),
        }
        for number, name in enumerate(names)
    ]
    overall: Figures = {
        "accuracy": _plain(multiclass_accuracy(guess, truth, count, average="micro")),
        "f1_macro": _mean(each, "f1"),
        "mcc": _mcc(matrix),
        "auroc_macro": _mean(each, "auroc"),
    }
    notes = [
        *_undefined(each, "class", "f1", "neither labels nor predictions have it"),
        *_undefined(each, "class", "auroc", f"all {unit} are of it, or none"),
    ]
    if overall["mcc"] is None:
        notes.append("mcc is undefined: all labels, or all predictions, are the same")
    return Metrics(unit, len(truth), overall, "classes", each, matrix.tolist(), notes)


def of_labels(of: Compared, names: Sequence[str]) -> Metrics:
    """Of several labels that are each true or not: all (n, C)."""
    guess, truth = _tensor(of.predicted).long(), _tensor(of.truth).long()
    chances = _tensor(of.scores).double().sigmoid()
    matrices = [multiclass_confusion_matrix(g, t, 2) for g, t in zip(guess.T, truth.T)]
    each: list[dict[str, Any]] = []
    for number, (name, matrix) in enumerate(zip(names, matrices)):
        one = guess[:, number], truth[:, number]
        each.append(
            {
                "label": name,
                "count": int(matrix[1].sum()),
                "accuracy": _plain(multiclass_accuracy(*one, 2, average="micro")),
                "f1": _plain(binary_f1_score(*one)) if matrix[0, 0] < len(truth) else None,
                "mcc": _mcc(matrix),
                "auroc": _auroc(chances[:, number], truth[:, number]),
            }
        )
    overall: Figures = {
        "exact_match": _plain((guess == truth).all(dim=1).double().mean()),
        "accuracy": _mean(each, "accuracy"),
        **{f"{name}_macro": _mean(each, name) for name in ("f1", "mcc", "auroc")},
    }
    notes = [
        *_undefined(each, "label", "f1", "no row has it, and none is predicted to"),
        *_undefined(each, "label", "mcc", "all labels, or all predictions, are the same"),
        *_undefined(each, "label", "auroc", "all rows have it, or none"),
    ]
    found = [matrix.tolist() for matrix in matrices]
    return Metrics("rows", len(truth), overall, "labels", each, found, notes)


def of_pairs(of: Compared) -> Metrics:
    """Of pairs of residues: all (n,); scores are probabilities."""
    guess, truth = _tensor(of.predicted).long(), _tensor(of.truth).long()
    matrix = multiclass_confusion_matrix(guess, truth, 2)
    (_, false), (missed, hits) = matrix.tolist()
    overall: Figures = {
        "f1": _plain(binary_f1_score(guess, truth)) if hits + false + missed else None,
        "precision": _plain(binary_precision(guess, truth)) if hits + false else None,
        "recall": _plain(binary_recall(guess, truth)) if hits + missed else None,
        "auroc": _auroc(_tensor(of.scores).double(), truth),
    }
    why = {"f1": "no pair, and none predicted", "precision": "no pair is predicted"}
    notes = [
        f"{name} is undefined: {why.get(name, 'all are pairs, or none')}"
        for name, figure in overall.items()
        if figure is None
    ]
    return Metrics("pairs", len(truth), overall, confusion=matrix.tolist(), notes=notes)


def _auroc(scores: Tensor, truth: Tensor) -> Figure:
    """None where all or none are true. Scores are from 0 to 1."""
    right = int(truth.sum())
    return _plain(binary_auroc(scores, truth.long())) if 0 < right < len(truth) else None


def _mcc(matrix: Tensor) -> Figure:
    """Of a confusion matrix, exactly: by whole numbers of any size."""
    rows = matrix.tolist()
    true, guessed = [sum(row) for row in rows], [sum(column) for column in zip(*rows)]
    total, hits = sum(true), sum(row[number] for number, row in enumerate(rows))
    spreads = [total**2 - sum(count**2 for count in counts) for counts in (true, guessed)]
    if not all(spreads):
        return None
    both = hits * total - sum(t * g for t, g in zip(true, guessed))
    return float(both / math.sqrt(spreads[0] * spreads[1]))


# --------------------------------------------------------------------------- numbers


def of_numbers(of: Compared, names: Sequence[str], *, same_units: bool = True) -> Metrics:
    """Of numbers (n, K); without `same_units` only figures that do not depend on units."""
    guess, truth = _tensor(of.predicted).double(), _tensor(of.truth).double()
    each = [
        {"output": name, **_number(g, t, same_units=same_units)}
        for name, g, t in zip(names, guess.T, truth.T)
    ]
    figures = [name for name in each[0] if name != "output"]
    overall: Figures = {name: _mean(each, name) for name in figures}
    why = "all labels, or all predictions, are the same" if len(truth) > 1 else "there is one row"
    shown = figures if same_units else ["pearson", "spearman"]
    notes = [note for name in shown for note in _undefined(each, "output", name, why)]
    return Metrics("rows", len(truth), overall, "outputs", each, notes=notes)


def _number(guess: Tensor, truth: Tensor, *, same_units: bool) -> Figures:
    squared = mean_squared_error(guess, truth)
    spread = mean_squared_error(truth.mean().expand_as(truth), truth)
    varied = bool((truth != truth[0]).any())
    both = varied and bool((guess != guess[0]).any())
    return {
        "mse": _plain(squared) if same_units else None,
        "mae": _plain(mean_absolute_error(guess, truth)) if same_units else None,
        "r2": _plain(1 - squared / spread) if same_units and varied else None,
        "pearson": _plain(pearson_corrcoef(guess, truth)) if both else None,
        "spearman": _plain(pearson_corrcoef(_ranks(guess), _ranks(truth))) if both else None,
    }


def _ranks(values: Tensor) -> Tensor:
    """The place of each in order, from 1; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    return _tensor((counts.cumsum() - (counts - 1) / 2)[which])


# --------------------------------------------------------------------------- in common


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _plain(figure: Tensor) -> Figure:
    """As many digits as it has: torchmetrics counts in float32."""
    value = float(figure)
    if not math.isfinite(value):
        return None
    return value if figure.dtype == torch.float64 else float(f"{value:.7g}")


def _mean(each: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Over those that have the figure."""
    found = [one[name] for one in each if one[name] is not None]
    return math.fsum(found) / len(found) if found else None


def _undefined(each: Sequence[Mapping[str, Any]], kind: str, name: str, why: str) -> list[str]:
    missing = [str(one[kind]) for one in each if one[name] is None]
    if not missing:
        return []
    listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8:,} more" * (len(missing) > 8))
    rest = "; the mean is of the others" if len(missing) < len(each) else ""
    return [f"{name} is undefined for {kind} {listed}: {why}{rest}"]
