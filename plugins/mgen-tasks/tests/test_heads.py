"""Tasks with a head: columns from activations, and the predictions of fine-tuned models."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mgen_tasks.adapters import mirror
from mgen_tasks.plugin import mgen_tasks

from mgen_core import Activations, Backbone, BackboneCard, BackboneOptions, MgenError, Ragged, Row
from mgen_core.catalog import discover
from mgen_core.checkpoint import Checkpoint, open_checkpoint
from mgen_core.columns import to_array
from mgen_core.config import checked
from mgen_core.engine import LocalEngine
from mgen_core.weights import fill, parameters_on_meta

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
CARDS = {card.name: card for card in mgen_tasks()}
WIDTH = 6


def task(name, backbone=None, weights=None, **options):
    """A task with its head, filled with `weights` or random ones."""
    if backbone is None:
        card = BackboneCard("b", "", "protein", load=Backbone, width=WIDTH)
        backbone = Backbone(card, BackboneOptions())
    card = CARDS[name]
    made = card.load(card, checked(card.options, options), backbone)
    with parameters_on_meta():
        made.head = made.build()
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        shapes = {key: value.shape for key, value in made.head.named_parameters()}
        weights = {
            key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()
        }
        weights |= dict(made.head.named_buffers())
    made.head.load_state_dict(weights, strict=True, assign=True)
    made.head.eval()
    return made


def activations(*lengths, dtype=torch.float32):
    """[CLS] residues [SEP] padding; padding is NaN."""
    width = max(lengths) + 2
    column, length = torch.arange(width), torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), width, WIDTH, generator=torch.Generator().manual_seed(2))
    tokens = column < length + 2
    hidden[~tokens] = float("nan")
    mask = (column > 0) & (column < length + 1)
    return Activations(hidden.to(dtype), mask, tokens=tokens)


def columns(made, found):
    """The task's columns as they are stored, as Python lists."""
    with torch.inference_mode():
        given = made.columns(found, [])
        engine = SimpleNamespace(task=made)
        host = LocalEngine.collect(engine, [given], [1] * len(found.mask), "float32")
    return {name: to_array(column).to_pylist() for name, column in host.items()}


def close(found, expected):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=1e-5
    )


# --------------------------------------------------------------------------- rows


def test_a_label_its_probability_and_the_logits():
    made = task("classify", adapter="LinearCLSAdapter", outputs=3)
    found = activations(4, 2)
    got = columns(made, found)
    logits = made.head.linear(found.hidden[:, 0]).detach()
    close(got["logits"], logits)
    close(got["probability"], logits.softmax(-1).amax(-1))
    assert got["label"] == logits.argmax(-1).tolist()
    assert made.metadata == {"mgen.outputs": "3"}
    named = task("classify", adapter="LinearCLSAdapter", labels="a,b,c")
    assert columns(named, found)["label"] == ["abc"[number] for number in got["label"]]
    assert json.loads(named.metadata["mgen.labels"]) == ["a", "b", "c"]
    assert made.values(rows=2, tokens=99) == 2 * (3 + 2)


def test_special_tokens_count_and_padding_does_not():
    made = task("classify", adapter="LinearMeanPoolAdapter", outputs=2)
    found = activations(4, 2)
    mean = torch.stack([found.hidden[0].mean(0), found.hidden[1, :4].mean(0)])
    close(columns(made, found)["logits"], made.head.linear(mean).detach())
    alone = replace(found, tokens=None)  # a backbone without special tokens
    mean = torch.stack([found.hidden[0, 1:5].mean(0), found.hidden[1, 1:3].mean(0)])
    close(columns(made, alone)["logits"], made.head.linear(mean).detach())


def test_several_labels_are_each_true_or_not():
    made = task("classify", adapter="LinearCLSAdapter", labels="a,b,c", multilabel="true")
    got = columns(made, activations(4, 2))
    close(got["probability"], torch.tensor(got["logits"]).sigmoid())
    assert got["label"] == [[int(value > 0) for value in row] for row in got["logits"]]
    assert made.values(rows=2, tokens=99) == 2 * 3 * 3


def test_bfloat16_probabilities_are_softmaxed_in_float32():
    made = task("classify", adapter="LinearCLSAdapter", outputs=3)
    made.head.bfloat16()
    got = columns(made, activations(4, 2, dtype=torch.bfloat16))
    close(got["probability"], torch.tensor(got["logits"]).softmax(-1).amax(-1))


def test_numbers_go_back_to_the_units_of_the_labels():
    found = activations(4, 2)
    raw = torch.tensor(columns(task("regress", adapter="LinearCLSAdapter"), found)["prediction"])
    assert raw.shape == (2,)
    made = task("regress", adapter="LinearCLSAdapter", label_mean="10", label_std="3")
    close(columns(made, found)["prediction"], raw * 3 + 10)
    several = {"adapter": "LinearCLSAdapter", "outputs": 2}
    raw = torch.tensor(columns(task("regress", **several), found)["prediction"])
    made = task("regress", **several, label_mean="1,2", label_std="3,4", labels="kd,tm")
    close(columns(made, found)["prediction"], raw * torch.tensor([3, 4]) + torch.tensor([1, 2]))
    assert made.metadata == {"mgen.outputs": "2", "mgen.labels": '["kd", "tm"]'}
    assert made.values(rows=5, tokens=99) == 10


def test_scaled_numbers_use_the_scaler_of_the_checkpoint():
    options = {"adapter": "ResNet1DAdapter", "adapter_args": '{"channels": 4, "num_blocks": 1}'}
    made = task("regress", **options, scaled="true")
    found = activations(5, 2)
    # Special tokens are left out: a row is its residues.
    trimmed = [row[mask] for row, mask in zip(found.hidden, found.mask)]
    raw = torch.cat([made.head(row[None]).detach()[:, 0] for row in trimmed])
    close(columns(made, found)["prediction"], raw.clamp_min(0))
    state = made.head.state_dict() | {
        "scaler._mean": torch.tensor([7.0078125]),
        "scaler._std": torch.tensor([2.0]),
    }
    made = task("regress", weights=state, **options, scaled="true")
    close(columns(made, found)["prediction"], (raw * 2 + 7.0078125).clamp_min(0))
    # In the reference the last rows of a batch are emptied, and nothing is scaled.
    theirs = task("regress", weights=state, **options, scaled="true", as_reference="true")
    got = columns(theirs, replace(found, hidden=found.hidden.nan_to_num(0)))["prediction"]
    close(got, state["conv_to_output.bias"].repeat(2))


# --------------------------------------------------------------------------- tokens


def test_a_label_for_each_residue():
    made = task("classify_tokens", adapter="LinearAdapter", labels="H,E,C")
    found = activations(4, 2)
    got = columns(made, found)
    for row, length in enumerate((4, 2)):
        logits = made.head(found.hidden[row, 1 : 1 + length]).detach()
        close(got["logits"][row], logits)
        close(got["probability"][row], logits.softmax(-1).amax(-1))
        assert got["label"][row] == logits.argmax(-1).tolist()
    assert json.loads(made.metadata["mgen.labels"]) == ["H", "E", "C"]
    assert made.values(rows=2, tokens=6) == 6 * 5


# --------------------------------------------------------------------------- pairs

PAIRS = ["LinearAdapter", "ResNet2DAdapter"]


@pytest.mark.parametrize("adapter", PAIRS)
def test_pairs_of_residues_row_by_row(adapter):
    made = task("classify_pairs", adapter=adapter)
    found = activations(4, 1)
    got = columns(made, found)
    assert got["residues"] == [4, 1]
    classes = 1 if adapter == "ResNet2DAdapter" else 2
    assert made.metadata["mgen.outputs"] == str(classes)
    square = torch.tensor(got["probability"][0]).view(4, 4)
    logits = torch.tensor(got["logits"][0]).view(4, 4, classes)
    assert torch.equal(square, square.T)
    off = ~torch.eye(4, dtype=torch.bool)
    close(square[off], logits[..., -1].sigmoid()[off])
    assert (adapter == "ResNet2DAdapter") == (not square.diagonal().any())
    assert "row-major" in made.metadata["mgen.pairs"]
    assert made.values(1, 4) == 1 + 16 * (classes + 1)


@pytest.mark.parametrize("adapter", PAIRS)
def test_the_most_probable_pairs(adapter):
    found = activations(4, 1, 2)
    whole = columns(task("classify_pairs", adapter=adapter), found)
    made = task("classify_pairs", adapter=adapter, top_pairs="3")
    got = columns(made, found)
    assert set(got) == {"i", "j", "probability"}
    square = torch.tensor(whole["probability"][0]).view(4, 4)
    every = sorted(
        ((square[i, j].item(), i, j) for i in range(4) for j in range(i + 1, 4)), reverse=True
    )[:3]
    assert list(zip(got["i"][0], got["j"][0])) == [(i, j) for _, i, j in every]
    close(got["probability"][0], [p for p, _, _ in every])
    assert [len(row) for row in got["i"]] == [3, 0, 1]
    assert made.values(1, 100) == 9


def test_convolutions_over_pairs_see_special_tokens_and_padding_only_as_reference():
    found = activations(4, 2)
    found = replace(found, hidden=found.hidden.nan_to_num(0.5))
    for as_reference, seen in (("false", found.tokens), ("true", torch.ones_like(found.tokens))):
        made = task("classify_pairs", adapter="ResNet2DAdapter", as_reference=as_reference)
        top = task("classify_pairs", adapter="ResNet2DAdapter", as_reference=as_reference,
                   top_pairs="1")  # fmt: skip
        got, best = columns(made, found), columns(top, found)
        for row, length in enumerate((4, 2)):
            hidden = found.hidden[row][seen[row]]
            whole = mirror(made.head.triangle(hidden), len(hidden))[1 : 1 + length, 1 : 1 + length]
            close(torch.tensor(got["logits"][row]).view(length, length), whole.detach()[..., 0])
            i, j = best["i"][row][0], best["j"][row][0]
            close(best["probability"][row][0], whole[i, j, 0].sigmoid().detach())


# --------------------------------------------------------------------------- refusals


REGRESS = {"adapter": "LinearCLSAdapter", "label_mean": "1"}


def test_what_does_not_fit_is_refused():
    cases = [
        ("classify", {}, "no adapter given"),
        ("classify", {"adapter": "LinearAdapter", "outputs": 2}, "does not give numbers for rows"),
        ("classify", {"adapter": "LinearCLSAdapter"}, "number of classes unknown"),
        ("classify", {"adapter": "LinearCLSAdapter", "outputs": 1}, "one class alone"),
        ("classify", {"adapter": "LinearCLSAdapter", "outputs": 0}, "outputs is 0"),
        ("classify", {"adapter": "LinearCLSAdapter", "outputs": 3, "labels": "a,b"}, "2 labels"),
        ("regress", {**REGRESS, "label_std": "1,2"}, "label_std has 2 numbers"),
        ("regress", {"adapter": "LinearCLSAdapter", "label_std": "1"}, "label_std alone"),
        ("regress", {**REGRESS, "label_std": "0"}, "a label_std of 0"),
        ("regress", {**REGRESS, "label_std": "1", "scaled": 1}, "checkpoint"),
        ("regress", {"adapter": "MLPPoolAdapter", "adapter_args": "{"}, "is not JSON"),
        ("regress", {"adapter": "MLPPoolAdapter", "adapter_args": "[1]"}, "is no object"),
        ("regress", {"adapter": "MLPPoolAdapter", "adapter_args": '{"a": 1}'}, "no argument 'a'"),
        ("classify_pairs", {"adapter": "LinearAdapter", "top_pairs": 0}, "top_pairs is 0"),
        ("classify_tokens", {"adapter": "ResNet2DAdapter"}, "does not give numbers for tokens"),
    ]
    for name, options, what in cases:
        with pytest.raises(MgenError, match=what) as raised:
            task(name, **options)
        assert raised.value.hint


# --------------------------------------------------------------------------- the reference


TASKS = {
    "SequenceClassification": "classify",
    "SequenceRegression": "regress",
    "SequenceRegressionWithScaling": "regress",
    "TokenClassification": "classify_tokens",
    "PairwiseTokenClassification": "classify_pairs",
}


class FineTuned:
    """A fine-tuned model of the reference: its tensors put together by hand, and its predictions.

    (How the core reads such a checkpoint is tested there.)
    """

    def __init__(self, name, **options):
        self.folder = GOLDEN / name
        self.config = yaml.safe_load((self.folder / "config.yaml").read_text())["model"]
        self.arguments = self.config["init_args"]
        loaded = torch.load(self.folder / "model.ckpt", map_location="cpu", weights_only=True)
        self.state = loaded["state_dict"]
        contents = json.loads((self.folder / "checkpoint_contents.json").read_text())
        base = contents["base_model_case"]
        self._open(GOLDEN / base / "model" if base else None)
        head = {
            key.removeprefix("adapter."): value
            for key, value in self.state.items()
            if key.startswith(("adapter.", "scaler."))
        }
        adapter = self.arguments["adapter"]
        self.task = task(
            TASKS[self.config["class_path"].split(".")[-1]],
            backbone=self.backbone,
            weights=head,
            adapter=adapter["class_path"].split(".")[-1],
            adapter_args=json.dumps(adapter.get("init_args", {})),
            outputs=self.arguments.get("n_classes") or self.arguments["num_outputs"],
            **options,
        )

    def _open(self, base):
        name = self.arguments["backbone"]["class_path"].split(".")[-1]
        card = discover().find(BackboneCard, name)
        self.backbone = card.load(card, card.options(weights=base, tokens="reference"))
        with parameters_on_meta():
            self.module = self.backbone.build()
        checkpoint = Checkpoint(base, self._tensors(base))
        fill(self.module, self.backbone, checkpoint, dtype=torch.float32,
             device=torch.device("cpu"))  # fmt: skip

    def _tensors(self, base):
        """The backbone's, with LoRA folded in."""
        tuned = {
            key.replace("base_model.model.", "").replace("base_layer.", ""): value
            for key, value in self.state.items()
            if key.startswith("backbone.")
        }
        tensors = {key: value for key, value in tuned.items() if ".lora_" not in key}
        prefix = "backbone.encoder."
        if not tensors:
            opened = open_checkpoint(base)
            tensors = {key: opened.tensor(key) for key in opened.keys}
            prefix = "bert."
        for key, down in tuned.items():
            stem, found, _ = key.partition(".lora_A.")
            if found:
                up = tuned[key.replace("lora_A", "lora_B")]
                scale = self.arguments["backbone"]["init_args"]["lora_alpha"] / len(down)
                name = stem.replace("backbone.encoder.", prefix) + ".weight"
                tensors[name] = tensors[name] + scale * up @ down
        return tensors

    def batches(self):
        """(task columns, predictions of the reference, real tokens) of each batch."""
        most = self.arguments["backbone"]["init_args"]["max_length"]
        for file in sorted(self.folder.glob("predict_pt/predict_predictions_0_*.pt")):
            stored = torch.load(file, map_location="cpu", weights_only=True)
            rows = [Row(number, "", text) for number, text in enumerate(stored["sequences"])]
            rows = [self._cut(row, most) for row in rows]
            with torch.inference_mode():
                found = self.backbone.forward(
                    self.module, self.backbone.collate(rows), self.task.needs
                )
                assert torch.equal(found.tokens, stored["attention_mask"].bool())
                yield self.task.columns(found, rows), stored["predictions"], found

    def _cut(self, row, most):
        if most is None or self.backbone.measure(row) <= most:
            return row
        return self.backbone.truncate(row, most)


golden = pytest.mark.skipif(
    not list(GOLDEN.glob("ckpt-*")), reason="no golden data in ../shared/golden"
)
TOLERANCE = 1e-5


def difference(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@golden
def test_sequence_classification_agrees():
    for found, expected, _ in FineTuned("ckpt-seqcls-dna300m-linearcls-lora").batches():
        assert difference(found["logits"], expected) <= TOLERANCE


@golden
@pytest.mark.parametrize(
    "name", ["ckpt-seqreg-rna1m-mlppool-full", "ckpt-seqreg-protein16b-mlppool-lora"]
)
def test_sequence_regression_agrees(name):
    for found, expected, _ in FineTuned(name).batches():
        assert difference(found["prediction"], expected[:, 0]) <= TOLERANCE


@golden
def test_token_classification_agrees():
    for found, expected, seen in FineTuned("ckpt-tokencls-rna1m-linear-frozen").batches():
        assert isinstance(found["logits"], Ragged)
        assert difference(found["logits"].values, expected[seen.mask]) <= TOLERANCE


@golden
def test_pairs_agree():
    for found, expected, seen in FineTuned(
        "ckpt-pairwise-dna300m-mlpnooutconcat-loraall"
    ).batches():
        residues = expected[0][seen.mask[0]][:, seen.mask[0]]
        assert found["residues"].tolist() == [len(residues)]
        logits = found["logits"].values.view(residues.shape)
        assert difference(logits, residues) <= TOLERANCE
        probability = found["probability"].values.view(residues.shape[:2])
        assert difference(probability, residues[..., 1].sigmoid()) <= TOLERANCE


@golden
def test_scaled_regression_agrees_as_reference():
    model = FineTuned("ckpt-seqregscaling-dnadebug-resnet1d-full", scaled=True, as_reference=True)
    agreed = 0
    for found, expected, seen in model.batches():
        # What the reference computes on padding is not computed here: of the rows that are not
        # emptied, those as long as the batch agree.
        rows = seen.tokens.all(dim=1)
        rows[-2:] = True
        assert difference(found["prediction"][rows], expected[rows]) <= TOLERANCE
        agreed += int(rows.sum())
    assert agreed >= 5
