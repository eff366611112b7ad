"""A merged ModelGenerator configuration in our own terms: a `RunConfig`'s values, and the rest.

What would change numbers and cannot be done here is an error; what differs otherwise is a note.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..api import BackboneCard
from ..config import RunConfig
from ..errors import MgenError
from . import classes
from .classes import choices, own_name
from .files import HubSplits, find_splits, hub_splits
from .merging import Block, Foreign, block
from .rows import Cut, Rules, make_rules
from .trainer import find_writer, output_of, trainer_values, training_callbacks

Kept = Literal["all", "lora", "nothing"]

TASKS = {
    "Embed": "embed",
    "Inference": "infer",
    "MLM": "infer",
    "SequenceClassification": "classify",
    "SequenceRegression": "regress",
    "SequenceRegressionWithScaling": "regress",
    "TokenClassification": "classify_tokens",
    "PairwiseTokenClassification": "classify_pairs",
}
MENDED = (
    "ModelGenerator's numbers depend on the other rows of a batch, these do not "
    "(--option as_reference=true gives those)"
)
KEPT = (
    "a row's numbers depend on the padding of its batch, as in ModelGenerator "
    "(--option as_reference=false: on the row alone)"
)
OF_TOKENS = ("Embed", "Inference", "MLM", "TokenClassification", "PairwiseTokenClassification")


@dataclass(frozen=True)
class Translated:
    """What a configuration asks for.

    - `values`: fields of `RunConfig`. What the user says on our command line wins over them.
    - `rows`: what is done to the rows of `values["data"]`; None: they are taken as they are.
    - `ckpt`: the fine-tuned checkpoint, and `kept`: what of the backbone it holds.
    - `lora`: r, alpha, rslora, target_modules, modules_to_save; None without LoRA.
    - `head`: adapter, adapter_args, outputs, multilabel, legacy, scaled, as_reference, and
      normalized (the predictions are in units of labels that training normalised). Empty without
      a head.
    - `writer`: the arguments of the PredictionWriter; empty without one.
    - `labels`: the columns with labels; `batch_size`: rows of a batch there.
    - `notes`: what differs or was ignored, one line each.
    """

    values: dict[str, Any]
    rows: Cut | None = None
    ckpt: Path | None = None
    kept: Kept = "all"
    lora: dict[str, Any] | None = None
    head: dict[str, Any] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    batch_size: int = 128
    notes: list[str] = field(default_factory=list)


def translate(
    foreign: Foreign,
    known_backbones: Sequence[BackboneCard],
    data: Sequence[str] = (),
    splits: HubSplits = hub_splits,
) -> Translated:
    """The configuration in our own terms.

    `data` is what the user gave as DATA: all of its rows are taken, whatever the config says.
    `splits` names the splits of a dataset on the hub. Raises `MgenError`.
    """
    notes: list[str] = []
    model = _required(foreign.model, "model", "Embed")
    backbone = _required(block(model.args.get("backbone")), "model.backbone", "aido_dna_dummy")
    card = _card(backbone, known_backbones)
    batch_size = int((foreign.data.args if foreign.data else {}).get("batch_size") or 128)
    head = _head(model, foreign.data, notes)
    values, rows = _data(foreign.data, data, splits)
    writer = find_writer(foreign.callbacks, notes)
    options = {**_task_options(model.name, head), **_backbone_options(backbone, card, notes)}
    values = {
        "task": TASKS[model.name],
        "backbone": card.name,
        **values,
        **output_of(writer),
        **_length(backbone, card, notes),
        **trainer_values(foreign.trainer, batch_size, notes),
        "options": options,
    }
    ignored = [*foreign.ignored, *training_callbacks(foreign.callbacks)]
    return Translated(
        values={key: value for key, value in values.items() if value is not None},
        rows=rows,
        ckpt=_ckpt(foreign.ckpt),
        kept=_kept(backbone),
        lora=_lora(backbone),
        head=head,
        writer=writer,
        labels=_labels(foreign.data),
        batch_size=batch_size,
        notes=notes + ([f"no meaning at prediction: {_grouped(ignored)}"] if ignored else []),
    )


def units_note(head: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """What is to be known of the units of predictions, where anything is."""
    if not head.get("normalized") or options.get("label_std"):
        return []
    return [
        "training normalised the labels: predictions stay in those units, unless --label-mean and "
        "--label-std, or --label-stats, are given (no checkpoint holds them)"
    ]


def as_yaml(translated: Translated) -> str:
    """The values as a config file of ours; what it cannot say is in comments above them."""
    order = [one.name for one in dataclasses.fields(RunConfig)]
    values = {key: _plain(v) for key, v in translated.values.items() if v is not None}
    ordered = dict(sorted(values.items(), key=lambda pair: _place(order, pair[0])))
    comments = [*translated.notes]
    if (cut := translated.rows) is not None and not cut.whole:
        comments.append(f"ModelGenerator takes a part of these rows ({cut.why()}), this file all")
    if cut is not None and cut.letters is not None:
        comments.append(
            "ModelGenerator cuts {} to {} letters, this file does not".format(*cut.letters)
        )
    if translated.ckpt is not None and "ckpt" not in values:
        comments.append(f"fine-tuned: add --ckpt {translated.ckpt}")
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=1000)
    return "".join(f"# {line}\n" for line in comments) + text


def _place(order: Sequence[str], key: str) -> int:
    return order.index(key) if key in order else len(order)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _required(found: Block | None, where: str, example: str) -> Block:
    if found is None:
        raise MgenError(f"the config has no {where}", f"add --{where} NAME, as {example}")
    return found


def _card(backbone: Block, known: Sequence[BackboneCard]) -> BackboneCard:
    cards = {card.name: card for card in known}
    name = own_name(backbone.path)
    if name is None or name not in cards:
        raise MgenError(f"no backbone {backbone.path!r}", choices(backbone.name, cards))
    return cards[name]


def _ckpt(path: str | None) -> Path | None:
    if path in ("best", "last", "hpc"):
        raise MgenError(
            f"ckpt_path {path} stands for a checkpoint of a training that runs", "name the file"
        )
    return Path(path) if path else None


def _grouped(names: Sequence[str]) -> str:
    """Dotted names by their sections."""
    sections: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(key)
    return "; ".join(
        f"{section}: {', '.join(keys)}" if section else ", ".join(keys)
        for section, keys in sections.items()
    )


# --------------------------------------------------------------------------- task and head


def _task_options(name: str, head: Mapping[str, Any]) -> dict[str, Any]:
    if name == "Embed":
        return {"pool": ["tokens"]}
    if not head:
        return {"kind": "logits"}
    options = {"adapter": head["adapter"], "outputs": head["outputs"]}
    if head["adapter_args"]:
        options["adapter_args"] = json.dumps(head["adapter_args"])
    flags = {key: True for key in ("multilabel", "scaled", "as_reference") if head[key]}
    return {key: value for key, value in {**options, **flags}.items() if value is not None}


def _head(model: Block, data: Block | None, notes: list[str]) -> dict[str, Any]:
    args, name = model.args, model.name
    if name in OF_TOKENS:
        notes.append("special tokens are left out: entry k is residue k, counted from 0")
    if name == "MLM":
        notes.append("MLM: nothing is masked, logits are given of each residue")
    if TASKS[name] in ("embed", "infer"):
        return {}
    legacy = _flag(args, "use_legacy_adapter")
    adapter = _adapter(block(args.get("adapter")), name, legacy)
    count = args.get("num_outputs" if TASKS[name] == "regress" else "n_classes")
    if name == "PairwiseTokenClassification":
        count = 1 if adapter.name == "ResNet2DAdapter" else count or 2
    scaled = name == "SequenceRegressionWithScaling"
    dropped = classes.SIZES | {"dropout"}  # the task's, and training's
    head = {
        "adapter": adapter.name,
        "adapter_args": {key: value for key, value in adapter.args.items() if key not in dropped},
        "outputs": None if count is None else int(count),
        "multilabel": _flag(args, "multilabel") and name == "SequenceClassification",
        "legacy": legacy,
        "scaled": scaled,
        "as_reference": False,
        "normalized": not scaled and _normalized(data),
    }
    if (shared := name if scaled else _counts_neighbours(adapter, args)) is not None:
        # What was trained with padding is computed with it; a defect is repeated on request alone.
        defect = scaled or adapter.name == "LinearTransformerAdapter"
        head["as_reference"] = not defect
        notes.append(f"{shared}: {MENDED if defect else KEPT}")
    return head


def _counts_neighbours(adapter: Block, args: Mapping[str, Any]) -> str | None:
    """What lets other rows of the batch, or the padding that they cause, change a row there."""
    if adapter.name in ("LinearTransformerAdapter", "ResNet1DAdapter", "ResNet2DAdapter"):
        return adapter.name
    backbone = _required(block(args.get("backbone")), "model.backbone", "aido_dna_dummy").name
    pooled = "Pool" in adapter.name and adapter.args.get("pooling") != "cls_pooling"
    # One-hot backbones give no mask.
    return f"{adapter.name} of {backbone}" if pooled and backbone.endswith("_onehot") else None


def _adapter(adapter: Block | None, task: str, legacy: bool) -> Block:
    if legacy and task != "SequenceRegression":
        raise MgenError(
            f"{task} with use_legacy_adapter fails in ModelGenerator",
            "give the adapter that the model was trained with (--model.adapter NAME)",
        )
    if legacy:
        return Block("legacy", "legacy", {})
    if adapter is None:
        raise MgenError(
            "the config has no model.adapter, so the head is unknown",
            "use the config.yaml that `fit` wrote, or add --model.adapter NAME",
        )
    return adapter


def _normalized(data: Block | None) -> bool:
    if data is None:
        return False
    usual = data.name == "SequenceRegressionDataModule"
    return _flag(data.args, "normalize", default=usual)


def _labels(data: Block | None) -> tuple[str, ...]:
    if data is None or data.name in ("SequencesDataModule", "ColumnRetrievalDataModule"):
        return ()
    usual = "rl" if data.name == "RNAMeanRibosomeLoadDataModule" else "labels"
    return tuple(_names(data.args.get("y_col", usual)))


# --------------------------------------------------------------------------- backbone


def _backbone_options(backbone: Block, card: BackboneCard, notes: list[str]) -> dict[str, Any]:
    """`--option`s of the backbone. Raises `MgenError` for arguments that would change numbers."""
    known = {one.name for one in dataclasses.fields(card.options)}
    options: dict[str, Any] = {}
    for name, value in _changing(backbone.args, card).items():
        if name not in known:
            told = f"{name} {json.dumps(value)}" if not isinstance(value, bool) else name
            raise MgenError(
                f"{card.name} here has no {told}, and without it numbers would differ",
                "take it out, or give a model that has it in its config.json (--weights FOLDER)",
            )
        options[name] = value
    if "tokens" in known:
        options["tokens"] = "reference"
        notes.append(
            "letters are read as ModelGenerator reads them: case counts, U is not T "
            "(--option tokens=clean reads them as people write them)"
        )
    return options


# Fields of a model's config that no prediction depends on.
_TRAINING_FIELDS = classes.words(
    "attention_probs_dropout_prob gradient_checkpointing hidden_dropout_prob initializer_range "
    "seq_len_interpolation_factor torch_dtype type_vocab_size use_cache"
)


def _changing(args: Mapping[str, Any], card: BackboneCard) -> dict[str, Any]:
    """The arguments given that our backbone would have to follow."""
    names = ("config_overwrites", "from_scratch", "model_init_args", "vocab_file")
    given = {name: args.get(name) for name in names}
    if isinstance(fields := given["config_overwrites"], Mapping):
        left = {key: value for key, value in fields.items() if key not in _TRAINING_FIELDS}
        given["config_overwrites"] = left
    given["enable_rag"] = bool(args.get("enable_rag")) and "msa" not in card.takes
    return {name: value for name, value in given.items() if value}


def _length(backbone: Block, card: BackboneCard, notes: list[str]) -> dict[str, Any]:
    onehot = backbone.name.endswith("_onehot")
    most = backbone.args.get("max_length", 512 if onehot else None)
    if most is not None:
        return {"max_length": int(most), "too_long": "truncate"}
    if card.max_tokens is not None:
        notes.append(
            f"no max_length: ModelGenerator computes rows of any length, here those over "
            f"{card.max_tokens:,} tokens are set aside (--max-length N computes them)"
        )
    return {}


def _kept(backbone: Block) -> Kept:
    args = backbone.args
    if backbone.name.endswith("_onehot"):
        return "nothing"
    if not _flag(args, "save_peft_only", default=True):
        return "all"
    if _flag(args, "use_peft"):
        return "lora"
    return "nothing" if _flag(args, "frozen") else "all"


def _lora(backbone: Block) -> dict[str, Any] | None:
    if not _flag(backbone.args, "use_peft"):
        return None
    args = {**classes.lora_defaults(backbone.name), **backbone.args}
    for name in ("lora_r", "lora_alpha", "lora_target_modules"):
        if args.get(name) is None:
            raise MgenError(
                f"{backbone.name}: use_peft without {name}",
                f"add --model.backbone.{name} VALUE, as in training",
            )
    targets = args["lora_target_modules"]
    return {
        "r": int(args["lora_r"]),
        "alpha": float(args["lora_alpha"]),
        "rslora": _flag(args, "lora_use_rslora"),
        # A text is a pattern, or "all-linear".
        "target_modules": _names(targets) if isinstance(targets, (list, tuple)) else [],
        "modules_to_save": _names(args.get("lora_modules_to_save")),
    }


# --------------------------------------------------------------------------- data


def _data(
    module: Block | None, given: Sequence[str], splits: HubSplits
) -> tuple[dict[str, Any], Cut | None]:
    """`data`, `split`, `reader`, `x_col`, `id_col`, and what is done to the rows."""
    if module is None and not given:
        raise MgenError("the config has no data", "add DATA, or --data NAME --data.path FOLDER")
    args = module.args if module else {}
    columns = _columns(module) if module else {}
    letters = _letters(module, columns["x_col"]) if module else None
    if given:
        # Defaults are for another table: only the columns that somebody wrote count.
        told = {"x_col": {"x_col", "in_cols"}, "id_col": {"id_col"}}
        written = {key: name for key, name in columns.items() if args.keys() & told[key]}
        cut = Cut(Rules(path=""), "", whole=True, letters=letters) if letters else None
        return {"data": tuple(given), **written}, cut
    if args.get("class_filter"):
        raise MgenError("class_filter is not supported: it may change the rows", "take it out")
    rules = make_rules(args)
    found = find_splits(rules, splits)
    name, whole = rules.tested(list(found))
    if name is None:
        raise MgenError(
            f"{rules.path} has no rows to predict on: its splits are {', '.join(found)}, and "
            f"ModelGenerator takes {rules.test_split_name}, or a part of {rules.train_split_name}",
            f"choose one with --data.test_split_name {next(iter(found), 'train')}, or give DATA",
        )
    on_hub = found[name] == (rules.path,)
    values = {
        "data": found[name],
        "split": name if on_hub else None,
        "reader": _reader(found[name], args.get("extra_reader_kwargs")),
        **columns,
    }
    plain = whole and letters is None
    return values, None if plain else Cut(rules, name, whole=whole, letters=letters)


def _columns(module: Block) -> dict[str, Any]:
    """The columns that ModelGenerator calls `sequences` and `ids`."""
    args = module.args
    if module.name == "SequencesDataModule":
        return {"x_col": args.get("x_col", "sequence"), "id_col": args.get("id_col", "id")}
    if module.name == "ColumnRetrievalDataModule":
        sources = _names(args.get("in_cols"))
        renamed = dict(zip(sources, _names(args.get("out_cols")) or sources))
    else:
        usual = "utr" if module.name == "RNAMeanRibosomeLoadDataModule" else "sequences"
        sources = _names(args.get("x_col", usual))
        renamed = args.get("rename_cols") or {}
    found = [name for name in sources if renamed.get(name, name) == "sequences"]
    if len(found or sources) != 1:
        raise MgenError(
            f"none of the columns {', '.join(sources) or '(none given)'} is renamed to sequences",
            "say which one the model reads: --data.rename_cols.NAME sequences",
        )
    return {"x_col": (found or sources)[0]}


def _letters(module: Block, x_col: str) -> tuple[str, int] | None:
    most = module.args.get("max_length")
    return (x_col, int(most) - 1) if most is not None else None


def _reader(files: Sequence[str], extra: Mapping[str, Any] | None) -> str | None:
    left = dict(extra or {})
    separator = left.pop("sep", left.pop("delimiter", None))
    if left or separator not in (None, ",", "\t"):
        raise MgenError(
            f"extra_reader_kwargs {json.dumps(extra)} is not supported",
            "convert the table to csv, tsv, jsonl or parquet and give it as DATA",
        )
    if separator is not None:
        return "tsv" if separator == "\t" else "csv"
    # Our jsonl reader says what to do when such a file holds an array.
    return "jsonl" if any(".json" in Path(name).suffixes for name in files) else None


# --------------------------------------------------------------------------- values


def _flag(args: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = args.get(name, default)
    if not isinstance(value, bool):
        raise MgenError(f"{name} is {value!r:.40}", "it is true or false")
    return value


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
