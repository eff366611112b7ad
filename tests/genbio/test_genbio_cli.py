"""Goldens of the reference tool, reproduced by `mgen embed`, `mgen infer` and `mgen merge`.

Our files hold residues only, and only the tokens that have a name. The goldens hold every token
and every output of the model: what is compared is picked out of them here.
"""

import ast
import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mgen_core

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
RUNS = sorted(GOLDEN.glob("cli-*"))
MODELS = [*sorted(GOLDEN.glob("rnabert-*")), *sorted(GOLDEN.glob("fm4bio-*"))]
TOLERANCE = {"rnabert": 1e-5, "fm4bio": 1e-4, "onehot": 0.0}
NAMES = {"rnabert": "aido_dna_300m", "fm4bio": "aido_protein_16b"}

pytestmark = pytest.mark.skipif(not RUNS, reason="no golden data in ../shared/golden")


def case_name(case):
    return case.name


def furthest(found, expected):
    """The largest difference between a cell of our table and a golden tensor."""
    assert torch.tensor(found).shape == expected.shape
    return float((torch.tensor(found) - expected).abs().max())


# ------------------------------------------------------------- runs of its command line


def command(case, run):
    """What asks for the same as ModelGenerator's config does."""
    model = yaml.safe_load((case / f"{run}.yaml").read_text())["model"]["init_args"]["backbone"]
    base = json.loads((case / "case.json").read_text())["base_model_case"]
    return (
        *(case / "data/test.csv", "--backbone", model["class_path"].rpartition(".")[2]),
        *(("--weights", GOLDEN / base / "model") if base else ()),
        *("--max-length", model["init_args"]["max_length"], "--too-long", "truncate"),
        *("--option", "tokens=reference"),
    )


def tolerance(case):
    base = json.loads((case / "case.json").read_text())["base_model_case"]
    return TOLERANCE[base.split("-")[0] if base else "onehot"]


def predicted(case, run):
    """The golden tensors, and for each id its number in them and the positions of its residues."""
    stem = case / f"out_{run}" / "predict_predictions_readable"
    golden = load_file(f"{stem}.safetensors")
    real = (golden["attention_mask"] == 1) & (golden["special_tokens_mask"] == 0)
    ids = json.loads(stem.with_suffix(".json").read_text())["ids"]
    return golden, {name: (number, real[number].nonzero()[:, 0]) for number, name in enumerate(ids)}


def cells(case, table, column):
    """id -> cell of our table, which must hold the input's rows in the input's order."""
    with (case / "data/test.csv").open() as stream:
        ids = [line["id"] for line in csv.DictReader(stream)]
    assert table["id"].to_pylist() == ids
    return dict(zip(ids, table[column].to_pylist()))


@pytest.mark.parametrize("case", RUNS, ids=case_name)
def test_embed_as_the_reference_s_command_line(case, merged):
    table = merged("embed", *command(case, "embed_pt"), "--pool", "tokens")
    golden, places = predicted(case, "embed_pt")
    found = cells(case, table, "embedding")
    assert found.keys() == places.keys()
    for name, (number, residues) in places.items():
        expected = golden[f"predictions.{number}.last_hidden_state"][residues]
        assert furthest(found[name], expected) <= tolerance(case)


@pytest.mark.parametrize(
    "case", [case for case in RUNS if (case / "inference_pt.yaml").exists()], ids=case_name
)
def test_infer_as_the_reference_s_command_line(case, merged):
    table = merged("infer", "--kind", "logits", *command(case, "inference_pt"))
    names = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    golden, places = predicted(case, "inference_pt")
    found = cells(case, table, "logits")
    assert found.keys() == places.keys()
    for name, (number, residues) in places.items():
        expected = golden["predictions"][number, residues, : len(names)]
        assert furthest(found[name], expected) <= tolerance(case)


@pytest.mark.parametrize(
    "run", sorted(GOLDEN.glob("cli-*/out_*argmax_dropspecial")), ids=lambda run: run.parent.name
)
def test_likeliest_tokens_as_the_reference_s_command_line(run, merged):
    case = run.parent
    table = merged("infer", "--kind", "tokens", *command(case, run.name.removeprefix("out_")))
    found = cells(case, table, "token")
    names = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    with (run / "predict_predictions.tsv").open() as stream:
        expected = {
            line["ids"]: ast.literal_eval(line["predictions"])
            for line in csv.DictReader(stream, delimiter="\t")
        }
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        assert len(found[name]) == len(tokens)
        for ours, theirs in zip(found[name], tokens):
            # The reference also picks ids that stand for no token; we never do.
            assert names[ours] and (ours == theirs or not names[theirs])


# ------------------------------------------------------------- its models, through our own


class Case:
    """A golden model, and those of its batches that one run of ours can express, as one table."""

    def __init__(self, folder, keep):
        self.weights = folder / "model"
        self.config = json.loads((self.weights / "config.json").read_text())
        self.tolerance = TOLERANCE[self.config["model_type"]]
        self.depth = self.config["num_hidden_layers"]
        self.golden = load_file(folder / "expected.safetensors")
        batches = json.loads((folder / "case.json").read_text())["batches"]
        self.batches = {
            number: batch
            for number, batch in enumerate(batches)
            if batch["ok"] and batch.get("add_special_tokens", True) and keep(batch)
        }

    def of(self, number, name):
        return self.golden[f"b{number}.{name}"]

    def residues(self, number):
        """(B, L) bool: the positions that our files hold."""
        real = self.of(number, "in.attention_mask") > self.of(number, "in.special_tokens_mask")
        if self.batches[number].get("rag"):
            real &= self.of(number, "in.query_tokens_mask").bool()
        return real[:, : self.of(number, "last_hidden_state").shape[1]]

    @property
    def name(self):
        """The published model that has this architecture."""
        if self.config["position_embedding_type"] == "rope_2d":
            return "aido_protein_rag_16b"
        if self.config.get("output_vocab_size"):
            return "aido_protein2structoken_16b"
        return NAMES[self.config["model_type"]]

    def command(self, tmp_path):
        """The table, written, and what runs it."""
        widths = [self.of(number, "in.input_ids").shape[1] for number in self.batches]
        limits = [batch["max_length"] for batch in self.batches.values()]
        with (tmp_path / "in.jsonl").open("w") as stream:
            for number, batch in self.batches.items():
                for index, text in enumerate(batch["sequences"]):
                    row = {"id": f"{number}-{index}", "sequence": text}
                    if batch.get("rag"):
                        row["msa"] = batch["msa"][index]
                        row["str_emb"] = self.of(number, f"str_emb.{index}").tolist()
                    stream.write(json.dumps(row) + "\n")
        return (
            *("in.jsonl", "--backbone", self.name, "--weights", self.weights),
            *("--max-length", limits[0] or max(widths), "--too-long", "truncate"),
            *("--option", "tokens=reference"),
        )

    def rows(self, table):
        """(batch, number in it, its residues, row of our table) of all but empty sequences."""
        lines = {line["id"]: line for line in table.to_pylist()}
        assert len(lines) == len(table)
        for number, batch in self.batches.items():
            for index, text in enumerate(batch["sequences"]):
                line = lines.pop(f"{number}-{index}")
                assert line.get("error") == (None if text else "empty sequence")
                if text:
                    yield number, index, self.residues(number)[index], line
        assert not lines


PLAIN = [model for model in MODELS if "rag" not in model.name]
RAG = [model for model in MODELS if "rag" in model.name]


@pytest.mark.parametrize(
    ("folder", "max_length"),
    [
        *((model, None) for model in PLAIN),
        *((m, limit) for m in RAG for limit in (120, 60, 40, 10)),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_every_layer_of_a_model(folder, max_length, mgen, tmp_path):
    case = Case(folder, lambda batch: batch["max_length"] == max_length)
    layers = range(case.depth + 1)
    pools = ["tokens", "cls"] if case.config["model_type"] == "rnabert" else ["tokens"]
    asked = ("--pool", ",".join(pools), "--layers", ",".join(map(str, [*layers, -1])))
    mgen("embed", *case.command(tmp_path), *asked)
    for number, index, residues, line in case.rows(mgen_core.read(tmp_path / "predictions")):
        golden = {layer: case.of(number, f"hidden_states.{layer}")[index] for layer in layers}
        golden[-1] = case.of(number, "last_hidden_state")[index]
        for layer, expected in golden.items():
            # Several batches of the reference are one of ours: in other company the last bits of
            # a row are others, and inner layers hold numbers far above 1.
            limit = case.tolerance * max(1.0, float(expected.abs().max()))
            assert furthest(line[f"embedding_tokens_{layer}"], expected[residues]) <= limit
            if "cls" in pools:
                assert furthest(line[f"embedding_cls_{layer}"], expected[0]) <= limit


@pytest.mark.parametrize("folder", MODELS, ids=case_name)
def test_the_logits_of_a_model(folder, mgen, tmp_path):
    # One batch of the reference is one of ours: in other company the reference itself moves a
    # row's logits, which reach 30, by 2e-5.
    case = Case(folder, lambda batch: batch["name"] in ("mixed", "rag_one_query_float"))
    mgen("infer", *case.command(tmp_path), "--kind", "logits")
    table = mgen_core.read(tmp_path / "predictions")
    names = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    for number, index, residues, line in case.rows(table):
        expected = case.of(number, "logits")[index, residues, : len(names)]
        assert furthest(line["logits"], expected) <= case.tolerance


def test_structure_tokens_are_the_likeliest_of_the_output_vocabulary(mgen, tmp_path):
    folder = GOLDEN / "fm4bio-moe-structtoken-outputvocab"
    case = Case(folder, lambda batch: batch["max_length"] is None)
    mgen("infer", *case.command(tmp_path), "--kind", "tokens")
    for number, index, residues, line in case.rows(mgen_core.read(tmp_path / "predictions")):
        logits = case.of(number, "logits")[index, residues]
        assert line["token"] == logits.argmax(-1).tolist()
        assert furthest(line["probability"], logits.softmax(-1).amax(-1)) <= case.tolerance
