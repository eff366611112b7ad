"""`write_layout`: the per-batch files of ModelGenerator's PredictionWriter, from a run of ours."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mgen_core import read
from mgen_core.api import BackboneCard
from mgen_core.catalog import discover
from mgen_core.config import make_config
from mgen_core.errors import MgenError
from mgen_core.job import open_job
from mgen_core.lightning import open_lightning
from mgen_core.manifest import Manifest
from mgen_core.merge import Selection, complete, selected
from mgen_core.modelgenerator.layout import write_layout
from mgen_core.modelgenerator.merging import merge_configs
from mgen_core.modelgenerator.translation import translate
from mgen_core.origin import find_origin
from mgen_core.run import run
from mgen_core.screen import Screen
from mgen_core.table import open_sources

GOLDEN = Path(__file__).parents[2] / "shared/golden"
golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="needs the golden data in ../shared beside the checkout"
)


def laid_out(folder, sources, **values):
    """Run ModelGenerator's sources, write its files, and load them in the order of the batches."""
    catalog = discover()
    foreign = merge_configs(sources)
    found = translate(foreign, [offer.card for offer in catalog.offers(BackboneCard)])
    tuned = {"ckpt": found.ckpt, "lora": found.lora} if found.ckpt else {}
    options = {**found.values["options"], **values.pop("options", {})}
    config = make_config({**found.values, **tuned, "output": folder, **values, "options": options})
    rows = found.rows.of(open_sources(config, catalog)) if found.rows else None
    run(config, catalog, Screen(), rows=rows)
    job = open_job(config, catalog, rows=rows, download=False)
    manifest = Manifest.open(folder)
    _, tables = selected(manifest, complete(manifest, Selection()), catalog, Selection())
    head = find_origin(job.backbone.options.weights, config.ckpt, config.lora).head
    count = write_layout(folder, foreign, found, job, tables, head)
    assert len(list(folder.glob("predict_predictions_*.pt"))) == count
    return load(folder)


def load(folder):
    """The files of the batches, in their order."""
    files = sorted(folder.glob("predict_predictions_0_*.pt"), key=lambda f: int(f.stem[22:]))
    return [torch.load(file, weights_only=True) for file in files]


def case_of(name, tmp_path, monkeypatch):
    """A copy of a case, to work in; `weights` of its base, as values of a config."""
    case = tmp_path / name
    shutil.copytree(GOLDEN / name, case)
    monkeypatch.chdir(case)
    told = json.loads((GOLDEN / name / _contents(name)).read_text())
    return (
        {"weights": GOLDEN / told["base_model_case"] / "model"} if told["base_model_case"] else {}
    )


def _contents(name):
    return "checkpoint_contents.json" if name.startswith("ckpt") else "case.json"


def assert_same(found, truth, atol=1e-5):
    """All keys, shapes and dtypes; predictions where there are any."""
    assert list(found) == list(truth)
    for key, value in truth.items():
        if not isinstance(value, torch.Tensor):
            assert found[key] == value, key
            continue
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
        given = ~found[key].isnan() if value.is_floating_point() else torch.ones_like(value).bool()
        torch.testing.assert_close(found[key][given], value[given], atol=atol, rtol=1e-5)


def residues_of(batch):
    return batch["special_tokens_mask"] == 0


PLAIN = (
    "ckpt-seqcls-dna300m-linearcls-lora",
    "ckpt-seqcls-dnadebug-linearcls-full",
    "ckpt-tokencls-rna1m-linear-frozen",
    "ckpt-pairwise-dna300m-mlpnooutconcat-loraall",
)


@golden
@pytest.mark.parametrize("name", PLAIN)
def test_files_are_those_of_the_reference(name, tmp_path, monkeypatch):
    base = case_of(name, tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    found, truth = laid_out(tmp_path / "run", sources, **base), load(Path("predict_pt"))
    assert len(found) == len(truth)
    for ours, theirs in zip(found, truth):
        assert_same(ours, theirs)
        given = ~ours["predictions"].isnan()
        residues = residues_of(ours)
        if "tokencls" in name:
            assert torch.equal(given, residues[:, :, None].expand_as(given))
        elif "pairwise" in name:
            both = residues[:, :, None] & residues[:, None]
            assert torch.equal(given, both[..., None].expand_as(given))
        else:
            assert given.all()


@golden
@pytest.mark.parametrize(
    "name", ["ckpt-seqreg-rna1m-mlppool-full", "ckpt-seqreg-protein16b-mlppool-lora"]
)
def test_labels_that_training_normalised_are_left_out(name, tmp_path, monkeypatch):
    base = case_of(name, tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    for ours, theirs in zip(laid_out(tmp_path / "run", sources, **base), load(Path("predict_pt"))):
        assert ours["labels"] is None
        assert_same({**ours, "labels": theirs["labels"]}, theirs)


@golden
def test_labels_are_there_in_label_units(tmp_path, monkeypatch):
    base = case_of("ckpt-seqreg-rna1m-mlppool-full", tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    units = {"label_mean": (1.0,), "label_std": (2.0,)}
    first = laid_out(tmp_path / "run", sources, options=units, **base)[0]
    truth = load(Path("predict_pt"))[0]
    torch.testing.assert_close(first["labels"], torch.tensor([[4.2581], [7.1583], [7.1129]]))
    torch.testing.assert_close(first["predictions"], truth["predictions"] * 2 + 1)


@golden
def test_a_scaled_regression_is_in_units_of_training(tmp_path, monkeypatch):
    name = "ckpt-seqregscaling-dnadebug-resnet1d-full"
    case_of(name, tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    found, truth = laid_out(tmp_path / "run", sources), load(Path("predict_pt"))
    state = open_lightning(Path("model.ckpt")).state
    scaled = torch.tensor(read(tmp_path / "run")["prediction"].to_pylist()).split(5)
    for ours, theirs, told in zip(found, truth, scaled):
        assert_same({**ours, "predictions": theirs["predictions"]}, theirs)
        assert ours["predictions"].shape == theirs["predictions"].shape
        back = ours["predictions"] * state["scaler._std"] + state["scaler._mean"]
        torch.testing.assert_close(back, told)


@golden
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ckpt-seqregscaling-dnadebug-resnet1d-full", 5),
        ("ckpt-seqcls-onehot-linearmeanpool", 3),
    ],
)
def test_batches_of_the_reference_give_its_very_files(name, rows, tmp_path, monkeypatch):
    case_of(name, tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    defects = {"as_reference": True, "pads": True}
    found = laid_out(tmp_path / "run", sources, options=defects, batch_rows=rows)
    for ours, theirs in zip(found, load(Path("predict_pt")), strict=True):
        assert_same(ours, theirs)
        assert not ours["predictions"].isnan().any()


@golden
def test_one_hot_letters_have_their_tokens(tmp_path, monkeypatch):
    case_of("ckpt-seqcls-onehot-linearmeanpool", tmp_path, monkeypatch)
    sources = [Path("config.yaml"), Path("predict_pt.yaml"), ("ckpt_path", "model.ckpt")]
    for ours, theirs in zip(laid_out(tmp_path / "run", sources), load(Path("predict_pt"))):
        # Its mean goes over padding there: the longest row alone has none.
        longest = theirs["attention_mask"].all(dim=1)
        torch.testing.assert_close(
            ours["predictions"][longest], theirs["predictions"][longest], atol=1e-5, rtol=1e-5
        )
        assert_same({**ours, "predictions": theirs["predictions"]}, theirs)


@golden
@pytest.mark.parametrize("name", ["cli-rna1m-embed-inference", "cli-protein16b-embed-inference"])
def test_logits_of_inference(name, tmp_path, monkeypatch):
    base = case_of(name, tmp_path, monkeypatch)
    found = laid_out(tmp_path / "run", [Path("inference_pt.yaml")], **base)
    truth = load(Path("out_inference_pt"))
    assert len(found) == len(truth)
    for ours, theirs in zip(found, truth):
        assert_same(ours, theirs)
        given = ~ours["predictions"].isnan()
        assert torch.equal(given.any(dim=-1), residues_of(ours))
        assert given[residues_of(ours)][:, :16].all()


@golden
@pytest.mark.parametrize("name", ["cli-rna1m-embed-inference", "cli-dnaonehot-embed"])
def test_embeddings_are_a_tensor(name, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    base = case_of(name, tmp_path, monkeypatch)
    found = laid_out(tmp_path / "run", [Path("embed_pt.yaml")], **base)
    ids = json.loads(Path("out_embed_pt/predict_predictions_readable.json").read_text())["ids"]
    truth = load_file("out_embed_pt/predict_predictions_readable.safetensors")
    for batch in found:
        assert list(batch) == [
            "predictions", "ids", "sequences", "input_ids", "attention_mask", "special_tokens_mask"
        ]  # fmt: skip
        for label, vectors, residues in zip(batch["ids"], batch["predictions"], residues_of(batch)):
            theirs = truth[f"predictions.{ids.index(label)}.last_hidden_state"]
            assert vectors.shape == theirs.shape
            torch.testing.assert_close(vectors[residues], theirs[residues], atol=1e-5, rtol=1e-5)
            assert vectors[~residues].isnan().all()


# --------------------------------------------------------------------------- without goldens

CONFIG = """
model:
  class_path: Inference
  init_args: {backbone: aido_dna_dummy}
data:
  class_path: SequencesDataModule
  init_args: {path: PATH, x_col: sequence, id_col: name, test_split_name: train, batch_size: 2}
trainer:
  callbacks:
  - class_path: modelgenerator.callbacks.PredictionWriter
    dict_kwargs: {output_dir: predictions, filetype: pt}
"""


@pytest.fixture
def small(tmp_path):
    """A config over three rows, of which the second cannot be computed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/all.csv").write_text("name,sequence\n001,ACGTAC\n002,\n003,ACG\n")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("PATH", str(tmp_path / "data")))
    return path


def test_a_row_that_was_set_aside_is_nan(small, tmp_path):
    first, second = laid_out(tmp_path / "run", [small])
    assert first["ids"] == ["001", "002"] and second["ids"] == ["003"]
    assert first["predictions"].shape == (2, 8, 16) and second["predictions"].shape == (1, 5, 16)
    assert first["predictions"][1].isnan().all()
    assert first["attention_mask"].sum(dim=1).tolist() == [8, 0]


def test_files_of_an_earlier_layout_are_gone(small, tmp_path):
    laid_out(tmp_path / "run", [small])
    (tmp_path / "run/predict_predictions_0_9.pt").write_bytes(b"old")
    assert len(laid_out(tmp_path / "run", [small])) == 2


def test_the_writer_chooses_the_columns(small, tmp_path):
    chosen = [
        ("trainer.callbacks.write_cols", "[ids, predictions]"),
        ("trainer.callbacks.argmax_predictions", "true"),
    ]
    first, _ = laid_out(tmp_path / "run", [small, *chosen])
    assert list(first) == ["ids", "predictions"]
    assert first["predictions"].shape == (2, 8) and first["predictions"].dtype == torch.int64
    assert first["predictions"][0, 0] == -1 and first["predictions"][0, 1] >= 0


def test_a_key_that_is_not_there_is_an_error(small, tmp_path):
    with pytest.raises(MgenError, match="no 'uid'"):
        laid_out(tmp_path / "run", [small, ("trainer.callbacks.write_cols", "[uid]")])


def test_several_labels_and_numbers_as_the_data_module_gives_them(small, tmp_path):
    rows = [
        {"seq": "ACGT", "a": 0, "b": 1, "depth": 7, "note": "x"},
        {"seq": "AC", "a": 1, "b": None, "depth": 8, "note": "y"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data/all.csv").unlink()
    (tmp_path / "data/all.jsonl").write_text(text)
    labelled = [
        ("data", "SequenceClassificationDataModule"),
        ("data.x_col", "[seq, depth, note]"),
        ("data.rename_cols", "{seq: sequences, depth: reads}"),
        ("data.y_col", "[a, b]"),
        ("data.generate_uid", "true"),
    ]
    (only,) = laid_out(tmp_path / "run", [small, *labelled])
    assert list(only)[:6] == ["predictions", "labels", "sequences", "reads", "note", "uid"]
    assert only["labels"].tolist() == [[0, 1], [1, -100]]
    assert only["reads"] == ["7", "8"] and only["note"] == ["x", "y"]
    assert only["uid"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("writer", "dtype"), [("parquet", "float32"), ("tsv", "float32"), ("pt", "bfloat16")]
)
def test_whatever_the_parts_are_stored_as(writer, dtype, small, tmp_path):
    truth = laid_out(tmp_path / "truth", [small])
    found = laid_out(tmp_path / "run", [small], writer=writer, dtype=dtype)
    for ours, theirs in zip(found, truth, strict=True):
        tolerance = 0.02 if dtype == "bfloat16" else 1e-6
        torch.testing.assert_close(
            ours["predictions"],
            theirs["predictions"],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )


def test_a_file_of_rows_that_were_all_set_aside(small, tmp_path):
    (tmp_path / "data/all.csv").write_text("name,sequence\na,\nb,\nc,ACGT\n")
    first, second = laid_out(tmp_path / "run", [small])
    assert first["predictions"].shape == (2, 0, 16) and second["predictions"].shape == (1, 6, 16)
    assert first["input_ids"].shape == (2, 0)


@pytest.mark.parametrize(
    ("module", "cell", "said"),
    [
        ("SequenceClassificationDataModule", "strong", "label 'strong' is not a number"),
        ("TokenClassificationDataModule", "HHEE", "labels 'HHEE' are no list"),
    ],
)
def test_labels_that_are_no_numbers(module, cell, said, small, tmp_path):
    (tmp_path / "data/all.csv").write_text(f"name,sequence,y\na,ACGT,{cell}\n")
    labelled = [("data", module), ("data.x_col", "sequence"), ("data.y_col", "y")]
    with pytest.raises(MgenError, match=said):
        laid_out(tmp_path / "run", [small, *labelled])
