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


def load_infer(card: TaskCard, options: InferOptions, backbone: Backbone) -> Task:
    from .infer import Infer, Likelihood

    return (Likelihood if options.score else Infer)(card, options, backbone)


def load_embed(card: TaskCard, options: EmbedOptions, backbone: Backbone) -> Task:
    from .embed import Embed

    return Embed(card, options, backbone)


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
    ]
