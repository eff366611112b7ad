"""Cards of the everyday tasks: light, read at every start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mgen_core import Backbone, Task, TaskCard, TaskOptions, hookimpl

Pool = Literal["mean", "max", "cls", "tokens"]


@dataclass(frozen=True)
class EmbedOptions(TaskOptions):
    """`layers` are numbered as in `hidden_states`; -1 is the last."""

    pool: tuple[Pool, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class InferOptions(TaskOptions):
    """`score` replaces the vectors a residue by one number a row."""

    kind: Literal["probs", "logprobs", "logits", "tokens"] = "probs"
    alphabet: Literal["full", "residues"] = "full"
    score: Literal["pll", "masked-pll"] | None = None


@dataclass(frozen=True)
class HeadOptions(TaskOptions):
    """`adapter` and `adapter_args` (JSON) as a ModelGenerator config names them.

    `outputs`: numbers that the head gives (n_classes, num_outputs); `labels`: their names, in
    order. `as_reference`: with the defects that change numbers there (docs of `adapters`), which
    depend on the batch.
    """

    adapter: str = ""
    adapter_args: str = "{}"
    outputs: int | None = None
    labels: tuple[str, ...] = ()
    as_reference: bool = False


@dataclass(frozen=True)
class ClassifyOptions(HeadOptions):
    """`multilabel`: each class is true or not, whatever the others are."""

    multilabel: bool = False


@dataclass(frozen=True)
class ClassifyTokensOptions(ClassifyOptions):
    """As `ClassifyOptions`, for each residue."""


@dataclass(frozen=True)
class ClassifyPairsOptions(HeadOptions):
    """`top_pairs`: only so many pairs of each row, the most probable ones."""

    top_pairs: int | None = None


@dataclass(frozen=True)
class RegressOptions(HeadOptions):
    """`label_mean` and `label_std`: back to label units, where training normalised the labels.

    `scaled`: a SequenceRegressionWithScaling, whose checkpoint holds them.
    """

    label_mean: tuple[float, ...] = ()
    label_std: tuple[float, ...] = ()
    scaled: bool = False


def load_infer(card: TaskCard, options: InferOptions, backbone: Backbone) -> Task:
    from .infer import Infer, Likelihood

    return (Likelihood if options.score else Infer)(card, options, backbone)


def load_embed(card: TaskCard, options: EmbedOptions, backbone: Backbone) -> Task:
    from .embed import Embed

    return Embed(card, options, backbone)


def load_classify(card: TaskCard, options: ClassifyOptions, backbone: Backbone) -> Task:
    from .heads import Classify

    return Classify(card, options, backbone)


def load_classify_tokens(
    card: TaskCard, options: ClassifyTokensOptions, backbone: Backbone
) -> Task:
    from .heads import ClassifyTokens

    return ClassifyTokens(card, options, backbone)


def load_classify_pairs(card: TaskCard, options: ClassifyPairsOptions, backbone: Backbone) -> Task:
    from .heads import ClassifyPairs

    return ClassifyPairs(card, options, backbone)


def load_regress(card: TaskCard, options: RegressOptions, backbone: Backbone) -> Task:
    from .heads import Regress

    return Regress(card, options, backbone)


@hookimpl
def mgen_tasks() -> Iterable[TaskCard]:
    return [
        TaskCard(
            name="embed",
            summary="Embeddings of rows (mean, max, cls) or of residues (tokens), any layers",
            load=load_embed,
            options=EmbedOptions,
        ),
        TaskCard(
            name="infer",
            summary="Token probabilities of residues, likeliest tokens, or a score of each row",
            load=load_infer,
            options=InferOptions,
        ),
        TaskCard(
            name="classify",
            summary="Classes of rows, by a fine-tuned model",
            load=load_classify,
            options=ClassifyOptions,
        ),
        TaskCard(
            name="classify_tokens",
            summary="Classes of residues, by a fine-tuned model",
            load=load_classify_tokens,
            options=ClassifyTokensOptions,
        ),
        TaskCard(
            name="classify_pairs",
            summary="Pairs of residues (base pairs, contacts), by a fine-tuned model",
            load=load_classify_pairs,
            options=ClassifyPairsOptions,
        ),
        TaskCard(
            name="regress",
            summary="Numbers of rows, by a fine-tuned model",
            load=load_regress,
            options=RegressOptions,
        ),
    ]
