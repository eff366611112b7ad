"""`mgen predict` with ModelGenerator's configs and checkpoints: its predictions, in input order."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

GOLDEN = Path(__file__).parents[3] / "shared/golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="needs the golden data in ../shared beside the checkout"
)
CASES = sorted(path.name for path in GOLDEN.glob("ckpt-*"))


def base_of(case):
    """The `--weights` of a case: what stood in for the hub's."""
    base = json.loads((case / "checkpoint_contents.json").read_text())["base_model_case"]
    return ["--weights", GOLDEN / base / "model"] if base else []


def expected(case):
    """Prediction and residue mask of each row, from the files of the batches in their order."""
    files = sorted(
        (case / "predict_pt").glob("predict_predictions_0_*.pt"),
        key=lambda path: int(path.stem.rsplit("_", 1)[1]),
    )
    for file in files:
        found = torch.load(file, weights_only=True)
        residues = found["attention_mask"].bool() & ~found["special_tokens_mask"].bool()
        yield from zip(found["predictions"], residues)


@pytest.fixture
def predicted(mgen, tmp_path):
    """`predicted(case, *words)`: predict as its user would, merge; the merged table."""

    def run(name, *words):
        case = tmp_path / name
        shutil.copytree(GOLDEN / name, case)
        # The same process, batches and threads as any other run: nothing of it is for tests.
        mgen(
            "predict", "--config", "config.yaml", "--config", "predict_pt.yaml",
            "--ckpt_path", "model.ckpt", "--output", tmp_path / "run", *base_of(case), *words,
            cwd=case,
        )  # fmt: skip
        mgen("merge", "run", "--to", "out.parquet")
        return pq.read_table(tmp_path / "out.parquet").to_pydict()

    return run


# A defect of the reference, repeated only on request.
DEFECT = "scaling"


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_reference(name, predicted):
    table = predicted(name, *(["--option", "as_reference=true"] if DEFECT in name else []))
    column = table["logits"] if "logits" in table else table["prediction"]
    rows = list(expected(GOLDEN / name))
    assert len(column) == len(rows) and table["row"] == list(range(len(rows)))
    for found, (truth, residues) in zip(column, rows):
        if "token" in name:
            truth = truth[residues]
        elif "pair" in name:
            truth = truth[residues][:, residues].reshape(-1, 2)
        else:
            truth = truth if isinstance(found, list) else truth.squeeze()
        torch.testing.assert_close(torch.tensor(found), truth, atol=1e-5, rtol=1e-5)


def test_a_scaled_regression_is_in_label_units_and_of_its_row_alone(predicted, tmp_path):
    name = "ckpt-seqregscaling-dnadebug-resnet1d-full"
    found = predicted(name)["prediction"]
    shutil.rmtree(tmp_path / name)
    shutil.rmtree(tmp_path / "run")
    alone = predicted(name, "--batch-tokens", 1)["prediction"]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), atol=1e-5, rtol=1e-5)
    assert min(found) >= 0


def test_lora_sharded_over_two_ranks_is_the_same(predicted, tmp_path):
    name = next(case for case in CASES if case.endswith("mlppool-lora"))
    whole = predicted(name)["prediction"]
    shutil.rmtree(tmp_path / name)
    shutil.rmtree(tmp_path / "run")
    sharded = predicted(name, "--devices", 2, "--strategy", "zero3")["prediction"]
    torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), atol=1e-6, rtol=1e-6)


def test_label_units_from_a_file(predicted, mgen, tmp_path):
    name = next(case for case in CASES if case.endswith("mlppool-full"))
    raw = torch.tensor(predicted(name)["prediction"])
    shutil.rmtree(tmp_path / name)
    shutil.rmtree(tmp_path / "run")
    stats = tmp_path / "stats.json"
    stats.write_text('{"mean": 3, "std": [0.5]}')
    found = torch.tensor(predicted(name, "--label-stats", stats)["prediction"])
    torch.testing.assert_close(found, raw * 0.5 + 3, atol=1e-6, rtol=1e-6)
    stats.write_text("{}")
    config = ("--config", tmp_path / name / "config.yaml", "--ckpt", tmp_path / name / "model.ckpt")
    said = mgen("predict", *config, "--label-stats", stats, code=1, cwd=tmp_path / name)
    assert "stats.json cannot be read" in said


def test_a_config_of_ours_is_printed_and_not_run(tmp_path):
    (tmp_path / "ours.yaml").write_text("task: embed\nbackbone: antiberty\ndata: none.csv\n")
    command = [sys.executable, "-m", "mgen_core", "predict", "-c", "ours.yaml", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backbone: antiberty" in done.stdout and not (tmp_path / "predictions").exists()
