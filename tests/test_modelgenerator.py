"""ModelGenerator's YAML: merged as it merges, its rows found as it finds them, in our terms."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mgen_core import BackboneCard, InputError, MgenError, ReaderCard
from mgen_core.catalog import discover
from mgen_core.config import make_config, read_config
from mgen_core.merge import Selection
from mgen_core.merge import read as read_merged
from mgen_core.modelgenerator.files import find_splits
from mgen_core.modelgenerator.merging import merge_configs
from mgen_core.modelgenerator.rows import Chosen, Cut, Rules, make_rules, split_rows
from mgen_core.modelgenerator.sources import is_foreign, read_arguments
from mgen_core.modelgenerator.translation import as_yaml, translate, units_note
from mgen_core.notebook import MemoryRows
from mgen_core.run import run
from mgen_core.screen import Screen
from mgen_core.table import find_reader

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no goldens in {GOLDEN}")
CASES = sorted(GOLDEN.glob("ckpt-*"))
RUNS = [path for path in sorted(GOLDEN.glob("cli-*/*.yaml"))]

CATALOG = discover()
CARDS = [offer.card for offer in CATALOG.offers(BackboneCard)]

EMBED = """
model:
  class_path: Embed
  init_args:
    backbone: aido_dna_dummy
data:
  class_path: SequencesDataModule
  init_args:
    path: table
"""
TUNED = """
model:
  class_path: modelgenerator.tasks.SequenceClassification
  init_args:
    backbone:
      class_path: modelgenerator.backbones.aido_dna_300m
      init_args: {max_length: 50, use_peft: true, config_overwrites: {use_cache: false}}
    adapter:
      class_path: modelgenerator.adapters.MLPPoolAdapter
      init_args: {hidden_sizes: [8], dropout: 0.5}
    n_classes: 3
data:
  class_path: modelgenerator.data.SequenceClassificationDataModule
  init_args: {path: table, test_split_files: [a.csv], rename_cols: {seq: sequences}, x_col: seq}
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
"""


@pytest.fixture
def merged(tmp_path):
    """`merged(*sources)`: texts are files, pairs are flags."""

    def merge(*sources):
        files = []
        for number, source in enumerate(sources):
            path = tmp_path / f"{number}.yaml"
            files.append(path if isinstance(source, str) else source)
            if isinstance(source, str):
                path.write_text(source)
        return merge_configs(files)

    return merge


@pytest.fixture
def translated(merged, tmp_path, monkeypatch):
    """`translated(*sources)`, where `table` is a folder with one unnamed table of 25 rows."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "table" / "a.csv", 25)

    def go(*sources, **more):
        return translate(merged(*sources), CARDS, **more)

    return go


def write_table(path, rows, column="sequence"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"s{n},{'ACGT'[n % 4] * (n + 1)}" for n in range(rows)]
    path.write_text("\n".join([f"id,{column}", *lines, ""]))


def opened(files):
    cards = [(find_reader(str(name), CATALOG), str(name)) for name in files]
    return [card.load(card, card.options()).open(name) for card, name in cards]


def ids(rows, column="id"):
    return [value for chunk in rows.chunks([column]) for value in chunk[column]]


def backbone(foreign):
    return foreign.model.args["backbone"]


# --------------------------------------------------------------------------- merging


def test_what_comes_later_wins_leaf_by_leaf(merged):
    found = merged(TUNED, "model: {init_args: {backbone: {init_args: {lora_r: 4}}}}\n")
    assert backbone(found)["init_args"]["lora_r"] == 4
    assert backbone(found)["init_args"]["max_length"] == 50
    assert found.model.args["n_classes"] == 3


@pytest.mark.parametrize("flag_last", [True, False])
def test_files_and_flags_count_in_their_order(merged, flag_last):
    sources = [("--data.batch_size", "5"), "data: {init_args: {batch_size: 7}}\n"]
    found = merged(EMBED, *(sources[::-1] if flag_last else sources))
    assert found.data.args["batch_size"] == (5 if flag_last else 7)


def test_lists_and_dicts_are_replaced(merged):
    found = merged(
        TUNED,
        "data: {init_args: {test_split_files: [b.csv], rename_cols: {x: sequences}}}\n",
        "model: {init_args: {backbone: {init_args: {config_overwrites: {a: 1}}}}}\n",
        "trainer: {callbacks: [{class_path: PredictionWriter, init_args: {output_dir: o}}]}\n",
    )
    assert found.data.args["test_split_files"] == ["b.csv"]
    assert found.data.args["rename_cols"] == {"x": "sequences"}
    assert backbone(found)["init_args"]["config_overwrites"] == {"a": 1}
    assert [one.name for one in found.callbacks] == ["PredictionWriter"]


@pytest.mark.parametrize(
    "source",
    [
        "trainer: {callbacks+: [{class_path: PredictionWriter}]}\n",
        "trainer: {callbacks+: {class_path: modelgenerator.callbacks.PredictionWriter}}\n",
        "trainer.callbacks+: PredictionWriter\n",
        ("--trainer.callbacks+", "PredictionWriter"),
    ],
)
def test_a_plus_appends(merged, source):
    found = merged(TUNED, source)
    assert [one.name for one in found.callbacks] == ["ModelCheckpoint", "PredictionWriter"]


def test_flags_below_a_list_mean_its_last_item(merged):
    found = merged(
        TUNED,
        ("--trainer.callbacks+", "PredictionWriter"),
        ("--trainer.callbacks.output_dir", "7"),
        ("--trainer.callbacks.init_args.write_cols", "[ids, predictions]"),
        ("--data.test_split_files+", "b.csv"),
        ("--data.rename_cols.more", "other"),
    )
    writer = found.callbacks[-1].args
    assert writer == {"output_dir": "7", "write_cols": ["ids", "predictions"]}
    assert found.data.args["test_split_files"] == ["a.csv", "b.csv"]
    assert found.data.args["rename_cols"] == {"seq": "sequences", "more": "other"}


def test_dict_kwargs_of_a_known_class_are_arguments(merged):
    text = "trainer: {callbacks: [{class_path: PredictionWriter, dict_kwargs: {filetype: pt}}]}\n"
    assert merged(text).callbacks[0].args == {"filetype": "pt"}


@pytest.mark.parametrize("source", ["model: {class_path: Embed}\n", "model: Embed\n"])
def test_a_new_class_keeps_the_arguments_that_it_has_too(merged, source):
    found = merged(TUNED, source)
    assert found.model.name == "Embed"
    assert found.model.args.keys() == {"backbone"}
    found = merged(TUNED, ("--model.backbone", "dna_onehot"))
    assert backbone(found) == {"class_path": "dna_onehot", "init_args": {"max_length": 50}}


def test_the_same_class_named_again_keeps_all(merged):
    found = merged(TUNED, ("--model.backbone", "aido_dna_300m"))
    assert backbone(found)["init_args"].keys() == {"max_length", "use_peft", "config_overwrites"}


def test_short_and_long_flags_are_the_same(merged):
    short = merged(EMBED, ("--model.backbone.max_length", "9"), ("data.path", "007"))
    long = merged(
        EMBED,
        ("--model.init_args.backbone.init_args.max_length", "9"),
        ("--data.init_args.path", "007"),
    )
    assert short == long
    assert backbone(short)["init_args"] == {"max_length": 9}
    assert short.data.args["path"] == "007"
    assert merged(EMBED, "model.backbone.max_length: 9\ndata.path: '007'\n") == short


def test_null_takes_back(merged):
    found = merged(
        TUNED, "model: {init_args: {adapter: null}}\ndata:\ntrainer: {callbacks: null}\n"
    )
    assert found.model.args["adapter"] is None
    assert found.data is None and found.callbacks == ()


def test_numbers_are_read_as_yaml_1_2_does(merged):
    found = merged(EMBED, "data: {init_args: {test_split_size: 1e-4, config_name: 2024-01-01}}\n")
    assert found.data.args["test_split_size"] == 0.0001
    assert found.data.args["config_name"] == "2024-01-01"


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ("model: {init_args: {n_classes: 2}}\n", "no task is chosen yet", "class_path"),
        ("modle: Embed\n", "unknown key 'modle'", "did you mean model?"),
        ("model: Embd\n", "no task 'Embd'", "did you mean Embed? supported: Embed, Inference"),
        ("model: Diffusion\n", "no task 'Diffusion'", "supported: Embed"),
        ("model: other.tasks.Embed\n", "no task 'other.tasks.Embed'", "did you mean Embed?"),
        ("data: SequenceDataModule\n", "no data module", "did you mean SequencesDataModule?"),
        ("trainer: {precison: 32}\n", "'trainer.precison'", "did you mean precision?"),
        ("trainer: 3\n", "trainer is 3", "below it"),
        ("model: 3\n", "model is 3", "name a task"),
        ("model: {class_path: Embed, backbone: x}\n", "model.backbone", "init_args"),
        ("model: {class_path: Embed, init_args: 3}\n", "model.init_args is 3", "key: value"),
        ("trainer: {callbacks: [{class_path: PredictionWriter, init_args: {dir: x}}]}\n",
         "PredictionWriter has no argument 'dir'", "output_dir"),
        ("- a\n", "holds no keys", "key: value"),
        ("a: [1\n", "line 2 is not YAML", "mend"),
        ("x: !!python/object/apply:os.system [touch owned]\n", "a tag that runs Python", "not fol"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_named(merged, source, what, hint):
    with pytest.raises(MgenError) as caught:
        merged(source)
    assert what in caught.value.what and hint in caught.value.hint
    assert "0.yaml: " in caught.value.what


@pytest.mark.parametrize(
    ("flag", "what", "hint"),
    [
        (("--model.backbone.max_len", "5"), "no argument 'max_len'", "did you mean max_length?"),
        (("--model.n_clases", "5"), "no argument 'n_clases'", "did you mean n_classes?"),
        (("--model.adapter", "LinearClsAdapter"), "no adapter", "LinearCLSAdapter"),
        (("--data.id_col", "x"), "no argument 'id_col'", "x_col"),
        (("--model.backbone", "[1"), "not YAML", "mend"),
    ],
)
def test_what_is_unknown_in_a_flag_is_named(merged, flag, what, hint):
    with pytest.raises(MgenError) as caught:
        merged(TUNED, flag)
    assert what in caught.value.what and hint in caught.value.hint
    assert f"{flag[0]} {flag[1]}: " in caught.value.what


def test_nothing_in_a_config_is_executed(merged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tag in ("object/apply:os.system [touch owned]", "object/new:os.system [touch owned]"):
        with pytest.raises(MgenError, match="runs Python"):
            merged(f"seed_everything: !!python/{tag}\n")
        with pytest.raises(MgenError, match="runs Python"):
            merged(("--data.path", f"!!python/{tag}"))
    assert not (tmp_path / "owned").exists()


def test_keys_of_training_are_collected(merged):
    found = merged(
        TUNED,
        "optimizer: {class_path: my.Adam}\nseed_everything: 3\n"
        "trainer: {max_epochs: 5, logger: {class_path: wandb.Odd}, profiler: null, precision: 32}\n"
        "model: {init_args: {optimizer: AdamW, lr_scheduler: null}}\n",
    )
    assert found.ignored == (
        "optimizer",
        "seed_everything",
        "trainer.max_epochs",
        "trainer.logger",
        "model.optimizer",
    )


def test_the_words_of_a_command_line_are_told_apart():
    line = (
        "--config a.yaml --model Embed x.csv --data.path=Y --config=b.yaml --output out "
        "--trainer.callbacks+=W --ckpt m.ckpt --overwrite --option a=b -- --model"
    )
    sources, rest = read_arguments(line.split())
    assert sources == [
        Path("a.yaml"),
        ("model", "Embed"),
        ("data.path", "Y"),
        Path("b.yaml"),
        ("trainer.callbacks+", "W"),
        ("ckpt_path", "m.ckpt"),
    ]
    assert " ".join(rest) == "x.csv --output out --overwrite --option a=b -- --model"
    with pytest.raises(MgenError, match="--model has no value"):
        read_arguments(["--model"])


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        (EMBED, True),
        ("data: {path: x}\n", True),
        ("trainer.precision: 32\n", True),
        ("task: embed\ndata: [x.csv]\n", False),
        ("data: x.csv\nbackbone: esm2_8m\n", False),
    ],
)
def test_whose_config_it_is(tmp_path, text, foreign):
    (tmp_path / "c.yaml").write_text(text)
    assert is_foreign(tmp_path / "c.yaml") is foreign


# --------------------------------------------------------------------------- translation


def test_a_fine_tuned_model_in_our_terms(translated):
    found = translated(TUNED, ("--ckpt_path", "m.ckpt"))
    options = found.values.pop("options")
    assert found.values == {
        "task": "classify",
        "backbone": "aido_dna_300m",
        "data": ("table/a.csv",),
        "x_col": "seq",
        "precision": "fp32",
        "max_length": 50,
        "too_long": "truncate",
    }
    assert json.loads(options.pop("adapter_args")) == {"hidden_sizes": [8]}
    assert options == {"adapter": "MLPPoolAdapter", "outputs": 3, "tokens": "reference"}
    assert (found.rows, found.ckpt, found.kept) == (None, Path("m.ckpt"), "lora")
    assert found.lora == {
        "r": 16,
        "alpha": 32.0,
        "rslora": False,
        "target_modules": ["query", "value"],
        "modules_to_save": [],
    }
    assert found.labels == ("labels",)
    assert any("trainer.callbacks: ModelCheckpoint" in note for note in found.notes)


@pytest.mark.parametrize(
    ("task", "ours", "options"),
    [
        ("Embed", "embed", {"pool": ["tokens"]}),
        ("Inference", "infer", {"kind": "logits"}),
        ("MLM", "infer", {"kind": "logits"}),
        ("SequenceClassification", "classify", {"outputs": 3}),
        ("TokenClassification", "classify_tokens", {"outputs": 3}),
        ("PairwiseTokenClassification", "classify_pairs", {"outputs": 3}),
        ("SequenceRegression", "regress", {}),
        ("SequenceRegressionWithScaling", "regress", {"scaled": True}),
    ],
)
def test_every_task_has_a_counterpart(translated, task, ours, options):
    found = translated(TUNED, ("--model", task), ("--model.backbone.use_peft", "false"))
    assert found.values["task"] == ours
    dropped = {"adapter", "adapter_args", "tokens"}
    kept = {k: v for k, v in found.values["options"].items() if k not in dropped}
    assert kept == options
    assert found.lora is None and found.kept == "all"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({"use_peft": "true"}, "lora"),
        ({"use_peft": "true", "save_peft_only": "false"}, "all"),
        ({"frozen": "true"}, "nothing"),
        ({"frozen": "true", "save_peft_only": "false"}, "all"),
        ({}, "all"),
    ],
)
def test_what_the_checkpoint_keeps_of_the_backbone(translated, flags, kept):
    chosen = [(f"--model.backbone.{name}", value) for name, value in flags.items()]
    assert translated(EMBED, *chosen).kept == kept
    assert translated(EMBED, ("--model.backbone", "dna_onehot")).kept == "nothing"


def test_multilabel_legacy_and_the_usual_sizes(translated):
    found = translated(TUNED, ("--model.multilabel", "true"))
    assert found.values["options"]["multilabel"] is True
    found = translated(
        TUNED, ("--model", "SequenceRegression"), ("--model.use_legacy_adapter", "true")
    )
    assert found.head["legacy"] and found.values["options"]["adapter"] == "legacy"
    found = translated(
        TUNED, ("--model", "PairwiseTokenClassification"), ("--model.adapter", "ResNet2DAdapter")
    )
    assert (
        found.values["options"]["outputs"] == 1
    )  # that adapter gives one number, whatever is asked
    found = translated(EMBED, ("--model.backbone", "protein_onehot"))
    assert found.values["max_length"] == 512  # the only backbone that always cuts


def test_lora_has_the_usual_values_of_its_family(translated):
    found = translated(
        EMBED,
        ("--model.backbone", "aido_protein_16b"),
        ("--model.backbone.use_peft", "true"),
        ("--model.backbone.lora_use_rslora", "true"),
    )
    assert (found.lora["r"], found.lora["alpha"], found.lora["rslora"]) == (16, 16, True)
    assert found.lora["target_modules"] == ["query", "value", "key", "dense", "router"]


@pytest.mark.parametrize(
    ("trainer", "values"),
    [
        ({"precision": "32-true"}, {"precision": "fp32"}),
        ({"precision": 32}, {"precision": "fp32"}),
        ({"precision": "bf16-mixed"}, {"precision": "bf16"}),
        ({"precision": "16-mixed"}, {"precision": "fp32"}),
        ({"devices": 4, "num_nodes": 2}, {"devices": 4, "num_nodes": 2}),
        ({"devices": "auto"}, {}),
        ({"devices": [0, 2]}, {"devices": 2}),
        ({"devices": "0,1,3"}, {"devices": 3}),
        ({"strategy": "auto"}, {}),
        ({"strategy": "ddp_find_unused_parameters_true"}, {"strategy": "replicate"}),
        ({"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}},
         {"strategy": "replicate"}),
        ({"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy",
                       "init_args": {"sharding_strategy": "FULL_SHARD"}}}, {}),
        ({"strategy": "modelgenerator.distributed.MyFSDPStrategy"}, {}),
        ({"limit_predict_batches": 1.0}, {}),
        ({"limit_predict_batches": 2}, {"limit": 256}),
        ({"fast_dev_run": True}, {"limit": 128}),
    ],
)  # fmt: skip
def test_the_trainer_in_our_terms(translated, trainer, values):
    found = translated(EMBED, yaml.safe_dump({"trainer": trainer})).values
    names = ("precision", "devices", "num_nodes", "strategy", "limit")
    assert {k: found[k] for k in names if k in found} == {"precision": "fp32", **values}


def test_the_writer_in_our_terms(translated):
    found = translated(
        EMBED,
        ("--trainer.callbacks", "PredictionWriter"),
        ("--trainer.callbacks.output_dir", "here"),
        ("--trainer.callbacks.filetype", "tsv"),
        ("--trainer.callbacks.argmax_predictions", "true"),
    )
    assert found.values["output"] == Path("here") and found.values["writer"] == "tsv"
    assert found.writer["argmax_predictions"] is True
    assert "output" not in translated(EMBED).values


@pytest.mark.parametrize(
    ("sources", "what", "hint"),
    [
        ([("--model.backbone", "aido_dna_dumy")], "no backbone", "did you mean aido_dna_dummy?"),
        ([("--model.backbone", "enformer")], "no backbone 'enformer'", "aido_dna_300m, aido"),
        ([("--model.backbone", "null")], "no model.backbone", "--model.backbone NAME"),
        ([("--model", "SequenceClassification")], "no model.adapter", "--model.adapter"),
        ([("--model.backbone.from_scratch", "true")], "from_scratch", "numbers would differ"),
        ([("--model.backbone.config_overwrites.hidden_size", "8")], "config_overwrites", "--weig"),
        ([("--trainer.callbacks", "PredictionWritr")], "no callback", "PredictionWriter?"),
        ([("--trainer.callbacks", "PredictionWriter"), ("--trainer.callbacks.filetype", "csv")],
         "no filetype 'csv'", "supported: pt, tsv"),
        ([("--trainer.precision", "8-true")], "no precision '8-true'", "bf16-mixed"),
        ([("--trainer.strategy", "horovod")], "no strategy 'horovod'", "fsdp"),
        ([("--trainer.devices", "many")], "trainer.devices is 'many'", "number"),
        ([("--trainer.limit_predict_batches", "0.5")], "limit_predict_batches", "--limit"),
        ([("--ckpt_path", "best")], "ckpt_path best", "name the file"),
        ([("--data.path", "nowhere")], "no data folder nowhere", "--data.path"),
        ([("--data.path", "table/a.csv")], "is a file", "--data.test_split_files a.csv"),
        ([("--data.path", "null")], "no data path", "--data.path"),
        ([("--data", "null")], "no data", "DATA"),
        ([("--data.test_split_files", "b.csv")], "no file b.csv in table", "a.csv"),
        ([("--data.test_split_size", "0")], "no rows to predict on", "test_split_name train"),
        ([("--data.test_split_size", "2")], "test_split_size is 2", "0 to 1"),
        ([("--data.test_split_size", "x")], "test_split_size", "of that kind"),
        ([("--data.cv_num_folds", "3"), ("--data.cv_test_fold_id", "3")], "of 3 folds", "0 to 2"),
        ([("--data.extra_reader_kwargs", "{skiprows: 1}")], "extra_reader_kwargs", "DATA"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error(translated, sources, what, hint):
    with pytest.raises(MgenError) as caught:
        translated(EMBED, *sources)
    told = f"{caught.value.what} {caught.value.hint}"
    assert what in told and hint in told


def test_two_columns_need_a_name_for_one(translated):
    with pytest.raises(MgenError, match="renamed to sequences"):
        translated(TUNED, ("--data.x_col", "[a, b]"))
    assert translated(TUNED, ("--data.x_col", "[a, seq]")).values["x_col"] == "seq"
    with pytest.raises(MgenError, match="class_filter"):
        translated(TUNED, ("--data.class_filter", "1"))


def test_columns_of_other_modules(translated):
    found = translated(EMBED, ("--data", "RNAMeanRibosomeLoadDataModule"))
    assert found.values["x_col"] == "utr" and found.labels == ("rl",)
    found = translated(
        EMBED,
        ("--data", "ColumnRetrievalDataModule"),
        ("--data.in_cols", "[a, b]"),
        ("--data.out_cols", "[x, sequences]"),
    )
    assert found.values["x_col"] == "b"


def test_data_on_our_command_line_means_all_of_it(translated):
    found = translated(EMBED, ("--data.path", "nowhere"), data=["x.csv", "y.csv"])
    assert found.values["data"] == ("x.csv", "y.csv") and found.rows is None
    assert "x_col" not in found.values and "id_col" not in found.values
    assert translated(TUNED, data=["x.csv"]).values["x_col"] == "seq"


def test_normalised_labels_are_told(translated):
    module = ("--data", "SequenceRegressionDataModule")
    found = translated(TUNED, ("--model", "SequenceRegression"), module)
    assert found.head["normalized"]
    (note,) = units_note(found.head, {})
    assert "--label-mean" in note and not units_note(found.head, {"label_std": "1"})
    found = translated(
        TUNED, ("--model", "SequenceRegression"), module, ("--data.normalize", "false")
    )
    assert not found.head["normalized"] and not units_note(found.head, {})


@pytest.mark.parametrize(
    ("backbone", "adapter", "told"),
    [
        ("aido_dna_dummy", "LinearMeanPoolAdapter", None),
        ("aido_dna_dummy", "ResNet1DAdapter", "ResNet1DAdapter"),
        ("dna_onehot", "LinearMeanPoolAdapter", "LinearMeanPoolAdapter of dna_onehot"),
        ("dna_onehot", "LinearCLSAdapter", None),
    ],
)
def test_heads_that_count_padding_do_so_here_and_it_is_told(translated, backbone, adapter, told):
    found = translated(TUNED, ("--model.backbone", backbone), ("--model.adapter", adapter))
    notes = [note for note in found.notes if "padding of its batch" in note]
    assert found.values["options"].get("as_reference", False) == (told is not None)
    assert notes == [] if told is None else notes[0].startswith(f"{told}: ")


def test_our_yaml_is_read_back(translated, tmp_path):
    found = translated(
        TUNED,
        ("--trainer.callbacks", "PredictionWriter"),
        ("--trainer.callbacks.output_dir", "here"),
        ("--data.test_split_files", "null"),
    )
    path = tmp_path / "ours.yaml"
    path.write_text(as_yaml(found))
    values = read_config([path])
    assert make_config(values) == make_config(found.values)
    assert not is_foreign(path)
    assert "# ModelGenerator takes a part of these rows (test_split_size 0.2" in path.read_text()


# --------------------------------------------------------------------------- files


LAYOUTS = {
    "unnamed": ["a.csv", "b.csv"],
    "named": ["train.csv", "test.csv", "valid.csv"],
    "rest is left out": ["my-test.csv", "other.csv"],
    "numbered": ["train_0.csv", "train_1.csv", "eval2.csv"],
    "inside words": ["contest.csv", "testimony.csv", "a.csv"],
    "both names": ["b_train.csv", "train_a.csv", "dev.csv"],
    "folders": ["data/train/x.csv", "data/testing/y.csv", "z.csv"],
    "folders with more": ["my-train 1/x.csv", "held_test/y.csv"],
    "shards": ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv",
               "data/odd-00000-of-00001.csv", "test.csv"],
    "notes": ["a.csv", "b.csv", "notes.md", "LICENSE", ".hidden.csv", "__odd__/c.csv"],
    "jsonl": ["test.jsonl", "train.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_of_a_folder_are_those_of_datasets(tmp_path, layout):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for name in LAYOUTS[layout]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"a": 1}\n' if name.endswith("jsonl") else "a\n1\n")
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache"))
    theirs = {str(k): [str(f) for f in v] for k, v in builder.config.data_files.items()}
    ours = find_splits(Rules(path=str(folder)), hub_splits=pytest.fail)
    assert {name: list(files) for name, files in ours.items()} == theirs


def test_splits_told_by_a_readme(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for name in ("x/one.csv", "x/two.csv", "y/three.csv", "train.csv"):
        write_table(folder / name, 2)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: first\n  data_files: y/three.csv\n"
        "- config_name: second\n  data_files:\n  - split: train\n    path: x/*.csv\n"
        "  - split: held\n    path: [y/three.csv]\n---\n# A dataset\n"
    )
    rules = Rules(path=str(folder), config_name="second")
    ours = find_splits(rules, hub_splits=pytest.fail)
    builder = datasets.load_dataset_builder(
        str(folder), "second", cache_dir=str(tmp_path / "cache")
    )
    theirs = {str(k): tuple(map(str, v)) for k, v in builder.config.data_files.items()}
    assert ours == theirs
    assert [Path(name).name for name in ours["train"]] == ["one.csv", "two.csv"]
    with pytest.raises(InputError, match="configurations first, second"):
        find_splits(Rules(path=str(folder)), hub_splits=pytest.fail)


def test_files_given_make_the_splits(tmp_path):
    for name in ("one.csv", "two.csv", "train.csv"):
        write_table(tmp_path / name, 2)
    given = {"path": str(tmp_path), "test_split_files": ["two.csv", "one.csv"]}
    found = find_splits(make_rules(given), hub_splits=pytest.fail)
    assert [Path(name).name for name in found.pop("test")] == ["two.csv", "one.csv"]
    assert not found
    given = {"path": str(tmp_path), "test_split_files": "t*.csv", "valid_split_files": "one.csv"}
    found = find_splits(make_rules(given), hub_splits=pytest.fail)
    assert [Path(name).name for name in found["test"]] == ["train.csv", "two.csv"]
    assert found.keys() == {"test", "valid"}


def test_a_dataset_on_the_hub_is_asked_for_its_splits(translated):
    def asked(uri):
        assert uri == "genbio-ai/100m-random-promoters"
        return ["train"]

    path = ("--data.path", "genbio-ai/100m-random-promoters")
    found = translated(EMBED, path, splits=asked)
    assert found.values["data"] == ("genbio-ai/100m-random-promoters",)
    assert found.values["split"] == "train" and not found.rows.whole
    found = translated(EMBED, path, splits=lambda uri: ["train", "test"])
    assert found.values["split"] == "test" and found.rows is None
    with pytest.raises(InputError, match="on the hub are not supported"):
        translated(EMBED, path, ("--data.config_name", "odd"), splits=asked)


def test_json_and_separators_choose_a_reader(translated, tmp_path):
    (tmp_path / "table" / "b.json").write_text('{"id": 1, "sequence": "A"}\n')
    found = translated(EMBED, ("--data.test_split_files", "b.json"))
    assert found.values["reader"] == "jsonl"
    found = translated(EMBED, ("--data.extra_reader_kwargs", r'{"sep": "\t"}'))
    assert found.values["reader"] == "tsv"


# --------------------------------------------------------------------------- rows


@golden
def test_every_golden_split_comes_out(tmp_path):
    for number, case in enumerate(json.loads((GOLDEN / "data-splits/splits.json").read_text())):
        count = case["input"].pop("n")
        folder = tmp_path / str(number)
        write_table(folder / "all.csv", count)
        rules = make_rules({"path": str(folder), **case["input"]})
        splits = find_splits(rules, hub_splits=pytest.fail)
        found = split_rows(rules, dict.fromkeys(splits, count))
        for part, name in (("train", "train"), ("valid", "valid"),
                           ("test", "test_used_for_predict")):  # fmt: skip
            rows = [f"s{row}" for row in found[part].numbers] if part in found else []
            assert rows == case[name], (case["input"], part)
        taken, whole = rules.tested(list(splits))
        if taken is None:
            assert case["test_used_for_predict"] == []
            continue
        rows = Cut(rules, taken, whole=whole).of(opened(splits[taken]))
        assert ids(rows) == case["test_used_for_predict"]


def test_the_trap_is_told(translated):
    found = translated(EMBED)
    rows = found.rows.of(opened(found.values["data"]))
    assert rows.length == 5
    assert rows.sentence == (
        "ModelGenerator's rules take 5 of 25 rows (test_split_size 0.2 of a table without a test "
        "split): all of them with --data.test_split_name train, or give DATA"
    )
    assert translated(EMBED, ("--data.test_split_name", "train")).rows is None
    assert translated(EMBED, ("--data.test_split_files", "a.csv")).rows is None
    everything = translated(EMBED, ("--data.test_split_size", "1"))
    assert everything.rows.of(opened(everything.values["data"])).sentence == ""


def test_folds_without_a_column():
    rules = Rules(path="x", cv_num_folds=3, cv_test_fold_id=2)
    found = split_rows(rules, {"train": 11, "test": 4})
    order = np.arange(11)
    np.random.RandomState(42).shuffle(order)
    assert found["test"].split == "train"
    assert found["test"].numbers.tolist() == order[6:].tolist()
    assert found["valid"].numbers.tolist() == order[:3].tolist()
    assert found["train"].numbers.tolist() == order[3:6].tolist()
    assert split_rows(rules, {"test": 4}) == {}


def test_folds_of_a_column():
    rules = Rules(path="x", cv_num_folds=3, cv_test_fold_id=1, cv_fold_id_col="fold")
    table = MemoryRows({"id": list("abcdef"), "fold": ["0", "1", 2, "1", "0", "2"]})
    rows = Cut(rules, "train").of([table])
    assert ids(rows) == ["b", "d"]
    assert "fold 1 of 3" in rows.sentence and "--data.cv_num_folds 1" in rows.sentence
    for odd, what in ((["0", "1", "x"], "does not hold fold numbers"), (["0", "1", "3"], "fold 3")):
        with pytest.raises(InputError, match=what):
            Cut(rules, "train").of([MemoryRows({"fold": odd})])
    with pytest.raises(InputError, match="take 0 of 2 rows"):
        Cut(rules, "train").of([MemoryRows({"fold": ["0", "2"]})])
    with pytest.raises(InputError, match="no column 'fold'"):
        Cut(rules, "train").of([MemoryRows({"id": ["0", "2"]})])


class Pieces(MemoryRows):
    """Rows that come a few at a time, and do not say how many they are."""

    def __init__(self, data, size):
        super().__init__(data)
        self.length, self.size = None, size

    def chunks(self, columns):
        for chunk in super().chunks(columns):
            values = list(zip(*chunk.values()))
            for start in range(0, len(values), self.size):
                part = zip(*values[start : start + self.size])
                yield dict(zip(columns, map(list, part)))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_chosen_rows_come_in_their_order(sizes, piece, random, block, most):
    sources, rows = [], []
    for size in sizes:
        mine = [(f"i{len(rows) + n}", "A" * random.randint(0, 12)) for n in range(size)]
        rows += mine
        sources.append(Pieces({"id": [i for i, _ in mine], "x": [x for _, x in mine]}, piece))
    numbers = random.sample(range(len(rows)), random.randint(0, len(rows)))
    chosen = Chosen(sources, np.array(numbers, dtype=np.int64))
    chosen.block_rows, chosen.block_bytes, chosen.chunk_rows = block, most, 2
    found = [row for chunk in chosen.chunks(["x", "id"]) for row in zip(chunk["x"], chunk["id"])]
    assert found == [rows[number][::-1] for number in numbers]
    assert chosen.length == len(numbers)


def test_the_choice_is_part_of_the_digest():
    table = [MemoryRows({"id": list("abc"), "x": ["AAAA", "CC", "G"]})]
    digests = {
        Chosen(table, None).digest(),
        Chosen(table, None, ("x", 2)).digest(),
        Chosen(table, np.array([0, 1])).digest(),
        Chosen(table, np.array([1, 0])).digest(),
        Chosen([*table, *table], np.array([1, 0])).digest(),
    }
    assert len(digests) == 5
    assert Chosen(table, np.array([1, 0])).digest() == Chosen(table, np.array([1, 0])).digest()


def test_rows_that_went_away_are_told():
    table = [MemoryRows({"id": list("abc")})]
    with pytest.raises(InputError, match="row 3 was asked for"):
        ids(Chosen(table, np.array([3, 0])))


def test_letters_beyond_the_data_modules_length_are_cut(translated):
    found = translated(
        TUNED, ("--data", "TokenClassificationDataModule"), ("--data.max_length", "4")
    )
    rows = found.rows.of([MemoryRows({"seq": ["ACGTAC", "AC", None], "sequences": ["ACGTAC"] * 3})])
    assert ids(rows, "seq") == ["ACG", "AC", None]
    assert ids(rows, "sequences") == ["ACGTAC"] * 3
    assert rows.sentence == ""
    assert "# ModelGenerator cuts seq to 3 letters" in as_yaml(found)


# --------------------------------------------------------------------------- whole configs


PAGE = """
model:
  class_path: {task}
  init_args:
    backbone: aido_dna_dummy
data:
  class_path: SequencesDataModule
  init_args:
    path: {path}
    x_col: sequence
    id_col: sequence  # No real ID in this dataset, so just use input sequence
    test_split_size: 0.0001
trainer:
  callbacks:
  - class_path: modelgenerator.callbacks.PredictionWriter
    dict_kwargs:
      output_dir: predictions
      filetype: pt
"""


@pytest.mark.parametrize(("task", "column"), [("Embed", "embedding"), ("Inference", "logits")])
def test_the_pages_examples_run(translated, task, column):
    found = translated(PAGE.format(task=task, path="table"))
    config = make_config(found.values)
    assert (config.output, config.writer, config.precision) == (Path("predictions"), "pt", "fp32")
    assert (config.x_col, config.id_col) == ("sequence", "sequence")
    run(config, CATALOG, Screen(), rows=found.rows.of(opened(config.data)))
    table = read_merged(config.output, CATALOG, Selection()).to_pydict()
    first = int(np.random.default_rng(42).permutation(25)[0])
    assert table["id"] == ["ACGT"[first % 4] * (first + 1)]
    assert len(table[column][0]) == first + 1


@golden
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
@pytest.mark.parametrize("first", ["config.yaml", "fit_input.yaml"])
@pytest.mark.parametrize("form", ["pt", "tsv"])
def test_every_golden_config_translates(case, first, form, monkeypatch):
    monkeypatch.chdir(case)
    sources = [Path(first), Path(f"predict_{form}.yaml"), ("--ckpt_path", "model.ckpt")]
    found = translate(merge_configs(sources), CARDS)
    contents = json.loads(Path("checkpoint_contents.json").read_text())
    kind, model, head = case.name.removeprefix("ckpt-").split("-")[:3]
    tasks = {"seqcls": "classify", "seqreg": "regress", "seqregscaling": "regress",
             "tokencls": "classify_tokens", "pairwise": "classify_pairs"}  # fmt: skip
    models = {"dna300m": "aido_dna_300m", "dnadebug": "aido_dna_debug", "onehot": "dna_onehot",
              "protein16b": "aido_protein_16b", "rna1m": "aido_rna_1m_mars"}  # fmt: skip
    adapters = {"mlpnooutconcat": "MLPAdapterWithoutOutConcat", "linearcls": "LinearCLSAdapter",
                "mlppool": "MLPPoolAdapter", "resnet1d": "ResNet1DAdapter",
                "linear": "LinearAdapter", "linearmeanpool": "LinearMeanPoolAdapter"}  # fmt: skip
    assert found.values["task"] == tasks[kind]
    assert found.values["backbone"] == models[model]
    assert found.head["adapter"] == adapters[head]
    assert found.head["scaled"] is (kind == "seqregscaling")
    assert found.ckpt == Path("model.ckpt") and found.rows is None
    assert [Path(name).stem for name in found.values["data"]] == ["test"]
    assert found.values["x_col"] == "seq"
    assert (found.values["output"], found.values["writer"]) == (Path(f"predict_{form}"), form)
    config = make_config(found.values)
    assert (config.precision, config.devices) == ("fp32", 1)

    shapes = {name: shape for name, (shape, *_) in contents["state_dict"].items()}
    names = [name for name in shapes if name.startswith("backbone.")]
    lora = [name for name in names if ".lora_" in name]
    assert found.kept == ("nothing" if not names else "lora" if names == lora else "all")
    assert bool(found.lora) is bool(lora)
    if found.lora:
        layers = {name.split(".lora_")[0].split(".")[-1] for name in lora}
        assert set(found.lora["target_modules"]) == layers
        assert {found.lora["r"]} == {shapes[name][0] for name in lora if ".lora_A." in name}
    last = [shape for name, shape in shapes.items() if name.startswith("adapter.")][-1]
    assert [found.head["outputs"]] == last


@golden
@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_golden_run_translates(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    found = translate(merge_configs([Path(path.name)]), CARDS)
    given = yaml.safe_load(path.read_text())
    task, options = (
        ("embed", {"pool": ["tokens"]})
        if path.stem.startswith("embed")
        else ("infer", {"kind": "logits"})
    )
    assert found.values["task"] == task
    assert found.values["options"] == {**options, "tokens": "reference"}
    asked = given["model"]["init_args"]["backbone"]
    assert asked["class_path"].endswith(f".{found.values['backbone']}")
    assert found.values["max_length"] == asked["init_args"]["max_length"]
    assert found.values["data"] == ("data/test.csv",)
    assert (found.rows, found.head, found.lora, found.ckpt) == (None, {}, None, None)
    assert found.writer == given["trainer"]["callbacks"][0]["init_args"]
    make_config(found.values)


def test_a_command_line_is_read_without_anything_heavy():
    code = (
        "import sys, mgen_core.modelgenerator.sources, mgen_core.modelgenerator.merging\n"
        "light = {'numpy', 'pydantic', 'pyarrow'} & set(sys.modules)\n"
        "import mgen_core.modelgenerator.translation\n"
        "print(light, {'torch', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set() set()\n", done.stderr


def test_reader_cards_are_found_for_every_suffix():
    # What ModelGenerator reads, some reader of ours must.
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.ndjson"):
        assert isinstance(find_reader(name, CATALOG), ReaderCard)
