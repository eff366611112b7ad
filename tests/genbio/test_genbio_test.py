"""`mgen test`: figures of a fine-tuned model on labelled rows, equal to scikit-learn's."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn import metrics as sk

GOLDEN = Path(__file__).parents[3] / "shared/golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="needs the golden data in ../shared beside the checkout"
)
ONEHOT = "ckpt-seqcls-onehot-linearmeanpool"
SEQCLS = "ckpt-seqcls-dnadebug-linearcls-full"
SEQREG = "ckpt-seqreg-rna1m-mlppool-full"
TOKENCLS = "ckpt-tokencls-rna1m-linear-frozen"
PAIRS = "ckpt-pairwise-dna300m-mlpnooutconcat-loraall"


class Case:
    """A golden, copied; `test` runs it as its user would."""

    def __init__(self, name, folder):
        self.folder = folder / "case"
        shutil.copytree(GOLDEN / name, self.folder)
        base = json.loads((self.folder / "checkpoint_contents.json").read_text())["base_model_case"]
        self.weights = ["--weights", GOLDEN / base / "model"] if base else []

    def mgen(self, *words, code=0, environ=None, script="-m mgen_core"):
        done = subprocess.run(
            [sys.executable, *script.split(" ", 1), *map(str, words)],
            capture_output=True, text=True, cwd=self.folder, env=os.environ | (environ or {}),
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        self.said = done.stderr
        return done.stdout

    def test(self, *words, **how):
        """What it printed."""
        fixed = ["--config", "config.yaml", "--ckpt_path", "model.ckpt", "--output", "run"]
        return self.mgen("test", *fixed, *self.weights, *words, **how)

    def figures(self, *words):
        """metrics.json, and the merged file."""
        printed = json.loads(self.test("--json", *words))
        assert printed == json.loads((self.folder / "run/metrics.json").read_text())
        self.mgen("merge", "run", "--to", "out.parquet")
        return printed, pq.read_table(self.folder / "out.parquet").to_pydict()

    def labels(self, name="label"):
        files = [*self.folder.glob("data/test.csv"), *self.folder.glob("data/test.jsonl")]
        with open(files[0]) as file:
            rows = csv.DictReader(file) if files[0].suffix == ".csv" else map(json.loads, file)
            return [row[name] for row in rows]

    def table(self, **columns):
        """A table of the same sequences, with these columns."""
        with open(self.folder / "in.csv", "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["seq", *columns])
            out.writerows(zip(self.labels("seq"), *columns.values()))
        return "in.csv"


@pytest.fixture
def case(tmp_path):
    return lambda name: Case(name, tmp_path)


def same(found, expected):
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


def softmax(logits):
    exps = np.exp(np.array(logits, dtype=float))
    return exps / exps.sum(axis=1, keepdims=True)


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [SEQCLS, ONEHOT])
def test_classes(case, name):
    one = case(name)
    found, merged = one.figures()
    truth, guess = [int(label) for label in one.labels()], merged["label"]
    figures = found["metrics"]
    assert found["compared"] == found["rows"] == len(truth) and found["rows_set_aside"] == 0
    same(figures["accuracy"], sk.accuracy_score(truth, guess))
    same(figures["f1_macro"], sk.f1_score(truth, guess, average="macro"))
    if len({*guess}) > 1:
        same(figures["mcc"], sk.matthews_corrcoef(truth, guess))
    else:
        assert figures["mcc"] is None and "mcc is undefined" in " ".join(found["notes"])
    chances = softmax(merged["logits"])
    areas = [sk.roc_auc_score(np.equal(truth, n), chances[:, n]) for n in range(chances.shape[1])]
    same(figures["auroc_macro"], np.mean(areas))
    same([one["auroc"] for one in found["classes"]], areas)
    assert found["confusion"] == sk.confusion_matrix(truth, guess).tolist()
    assert is_picture(one.folder / "run/confusion.png")


def test_numbers(case):
    one = case(SEQREG)
    found, merged = one.figures("--label-mean", "4.5", "--label-std", "3.2")
    truth, guess = [float(label) for label in one.labels("y")], merged["prediction"]
    figures = found["metrics"]
    same(figures["mse"], sk.mean_squared_error(truth, guess))
    same(figures["mae"], sk.mean_absolute_error(truth, guess))
    same(figures["r2"], sk.r2_score(truth, guess))
    same(figures["pearson"], stats.pearsonr(truth, guess)[0])
    same(figures["spearman"], stats.spearmanr(truth, guess)[0])
    assert is_picture(one.folder / "run/scatter.png") and found["outputs"][0]["output"] == "y"


def test_numbers_in_units_of_training(case):
    one = case(SEQREG)
    found, merged = one.figures()
    truth = [float(label) for label in one.labels("y")]
    same(found["metrics"]["pearson"], stats.pearsonr(truth, merged["prediction"])[0])
    assert found["metrics"]["mse"] is found["metrics"]["mae"] is found["metrics"]["r2"] is None
    (note,) = found["notes"]
    assert "mse, mae and r2 are left out" in note and "--label-mean" in note


def test_residues(case):
    one = case(TOKENCLS)
    found, merged = one.figures()
    truth, guess = np.concatenate(one.labels()), np.concatenate(merged["label"])
    assert (found["compared"], found["unit"]) == (len(truth), "residues")
    same(found["metrics"]["accuracy"], sk.accuracy_score(truth, guess))
    same(found["metrics"]["f1_macro"], sk.f1_score(truth, guess, average="macro"))
    same(found["metrics"]["mcc"], sk.matthews_corrcoef(truth, guess))
    chances = softmax(np.concatenate(merged["logits"]))
    same(found["metrics"]["auroc_macro"], sk.roc_auc_score(truth, chances, multi_class="ovr"))


def test_pairs(case):
    one = case(PAIRS)
    found, merged = one.figures()
    truth, scores = [], []
    for pairs, chances, length in zip(one.labels(), merged["probability"], merged["residues"]):
        paired = {tuple(sorted(pair)) for pair in pairs}
        above = [(i, j) for i in range(length) for j in range(i + 1, length)]
        truth += [pair in paired for pair in above]
        scores += [chances[i * length + j] for i, j in above]
    guess = np.array(scores) > 0.5
    assert found["compared"] == len(truth) and found["unit"] == "pairs"
    for name in ("f1", "precision", "recall"):
        same(found["metrics"][name], getattr(sk, f"{name}_score")(truth, guess))
    same(found["metrics"]["auroc"], sk.roc_auc_score(truth, scores))


def test_several_labels_in_columns(case):
    one = case(ONEHOT)
    data = one.table(a=[0, 1, 0, 1, 1, 0, 1], b=[1, 1, 1, 1, 1, 1, 1])
    words = [data, "--model.multilabel", "true", "--y-col", "a,b"]
    found, merged = one.figures(*words)
    truth = np.array([[0, 1], [1, 1], [0, 1], [1, 1], [1, 1], [0, 1], [1, 1]])
    guess, logits = np.array(merged["label"]), np.array(merged["logits"])
    for number, figures in enumerate(found["labels"]):
        assert figures["label"] == "ab"[number]
        same(figures["accuracy"], sk.accuracy_score(truth[:, number], guess[:, number]))
        same(figures["f1"], sk.f1_score(truth[:, number], guess[:, number]))
    same(found["metrics"]["exact_match"], sk.accuracy_score(truth, guess))
    same(found["metrics"]["auroc_macro"], sk.roc_auc_score(truth[:, 0], logits[:, 0]))
    assert found["labels"][1]["auroc"] is None
    assert any(note.startswith("auroc is undefined for label b") for note in found["notes"])


def test_rows_set_aside_names_of_classes_and_a_table(case):
    one = case(ONEHOT)
    (one.folder / "in.tsv").write_text("seq\tlabel\nACGT\tno\n\tyes\nGGTT\tyes\nTTTTT\tno\n")
    printed = one.test("in.tsv", "--option", "labels=no,yes")
    lines = [line.split() for line in printed.splitlines()]
    assert ["rows", "3"] in lines and ["set", "aside", "1"] in lines
    assert ["class", "count", "f1", "auroc"] in lines
    assert [line[:2] for line in lines[-2:]] == [["no", "2"], ["yes", "1"]]


def test_two_ranks_and_a_config_of_ours_give_the_same(case):
    one = case(SEQCLS)
    alone = one.test("--json")
    two = one.test("--json", "--output", "two", "--devices", 2, "--batch-tokens", 64)
    assert two == alone and one.said.count("written") == 1
    folders = {path.name for path in (one.folder / "two/parts").iterdir()}
    assert folders == {"rank-00000", "rank-00001"}
    shutil.rmtree(one.folder / "two")
    (one.folder / "own.yaml").write_text(
        one.mgen("predict", "--config", "config.yaml", "--ckpt", "model.ckpt", "--print-config")
    )
    words = ["data/test.csv", "--config", "own.yaml", "--ckpt", "model.ckpt", "--output", "two"]
    assert one.mgen("test", *words, "--json") == alone


def test_an_old_test_is_not_left_beside_a_new_run(case):
    one = case(ONEHOT)
    one.test()
    assert (one.folder / "run/metrics.json").exists()
    words = ["--config", "config.yaml", "--ckpt", "model.ckpt", "--output", "run", "--overwrite"]
    one.mgen("predict", *words)
    assert not [*one.folder.glob("run/metrics.json"), *one.folder.glob("run/*.png")]


BAD = [
    (ONEHOT, {"label": "0123456"}, [], "row 2 (counted from 0), column label: class 2 is not one"),
    (ONEHOT, {"label": "01x0101"}, [], "row 2 (counted from 0), column label: 'x' is no class"),
    (ONEHOT, {"other": "0101010"}, [], "no column 'label' with labels"),
    (ONEHOT, {"label": "0101010"}, ["--y-col", "score"], "no column 'score' with labels"),
    (ONEHOT, {"label": "0101010"}, ["--y-col", "label,seq"], "2 label columns for 1"),
    (SEQREG, {"y": ["1", "2", "tall", "3", "4", "5", "6"]}, [], "'tall' is not a number"),
    (TOKENCLS, {"label": ["[0, 1]"] * 7}, [], "row 0 (counted from 0), column label: 2 labels for"),
    (PAIRS, {"label": ["[[0, 999]]"] * 5}, [], "has residue 999, counted from 0, of 16"),
    (PAIRS, {"label": ["[]"] * 5}, ["--option", "top_pairs=3"], "metrics of pairs need all"),
]


@pytest.mark.parametrize(("name", "columns", "words", "told"), BAD)
def test_bad_labels_are_told_before_anything_runs(case, name, columns, words, told):
    one = case(name)
    assert one.test(one.table(**columns), *words, code=1) == ""
    *_, error, hint = one.said.strip().splitlines()
    assert told in error and hint.startswith("  try: ")
    assert not (one.folder / "run").exists() and "rows  " not in one.said


def test_what_has_no_labels(case):
    one = case(ONEHOT)
    one.test("--model", "Embed", code=1)
    assert "the task embed predicts nothing that labels tell" in one.said


def test_only_the_plan(case):
    one = case(ONEHOT)
    assert one.test("--plan-only") == "" and "disk" in one.said
    assert not (one.folder / "run").exists()
