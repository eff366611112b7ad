"""Token probabilities a residue, the likeliest token, and scores of whole sequences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mgen_core import (
    Activations,
    Backbone,
    Columns,
    MgenError,
    Ragged,
    Row,
    RowError,
    Task,
    TaskCard,
    Want,
)

from .plugin import InferOptions

COLUMN = {"probs": "probabilities", "logprobs": "log_probabilities", "logits": "logits"}


class Infer(Task):
    """What a model says of each residue, over the tokens that it really has.

    Ids without a name in the backbone's vocabulary are padding of its output and left out before
    the softmax; with `alphabet=residues` so is every token that is not a letter.
    """

    needs = Want(logits=True)

    def __init__(self, card: TaskCard, options: InferOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        _check_vocabulary(backbone)
        self.kind = options.kind
        self.used = [
            number
            for number, name in enumerate(backbone.vocabulary)
            if name and (options.alphabet == "full" or _is_letter(name))
        ]
        if not self.used:
            raise MgenError(
                f"{backbone.card.name} has no residue letters in its vocabulary",
                "leave out --alphabet residues",
            )
        if len(self.used) == 1 and self.kind != "logits":
            _refuse_single(backbone, "use --kind logits")

    @property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        """The names of the columns of each vector, or of the ids of `token`."""
        names = self.backbone.vocabulary
        kept = names if self.kind == "tokens" else [names[number] for number in self.used]
        told = {"mgen.vocabulary": json.dumps(list(kept))}
        if self.backbone.token_names:
            told["mgen.tokens"] = json.dumps(list(self.backbone.token_names))
        return told

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """`probabilities` (or as `kind` says): (residues, vocabulary) float, ragged.

        `kind=tokens`: `token` (residues,) int32 ids and their `probability` (residues,). Without
        the axis of the vocabulary where that has one name; (n, tokens, ...) where the backbone
        names the tokens.
        """
        logits = _residue_logits(activations)[:, self.used]
        lengths = activations.mask.sum(dim=1).tolist()

        def column(values: Tensor) -> Tensor | Ragged:
            if self.backbone.token_names:
                size = (len(lengths), len(self.backbone.token_names), *values.shape[1:])
                return values.reshape(size)
            return Ragged(values, lengths)

        if self.kind == "tokens":
            best = logits.softmax(-1).max(-1)
            ids = torch.tensor(self.used, dtype=torch.int32, device=logits.device)
            return {
                "token": column(ids[best.indices]),
                "probability": column(best.values),
            }
        if self.kind == "probs":
            logits = logits.softmax(-1)
        elif self.kind == "logprobs":
            logits = logits.log_softmax(-1)
        return {COLUMN[self.kind]: column(logits.squeeze(-1) if len(self.used) == 1 else logits)}

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in all columns; special tokens make it an upper bound."""
        tokens = rows * len(self.backbone.token_names) or tokens
        return tokens * (2 if self.kind == "tokens" else len(self.used))


class Likelihood(Task):
    """`pll`: the sum over residues of the log-probability that the model gives each of them.

    Unmasked, in one pass; or with each residue masked in turn (Salazar et al. 2020, arXiv
    1910.14659), one pass a residue, which is what the models were trained to answer.
    """

    needs = Want(logits=True)

    def __init__(self, card: TaskCard, options: InferOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        _check_vocabulary(backbone)
        if (options.kind, options.alphabet) != (InferOptions.kind, InferOptions.alphabet):
            raise MgenError(
                "--score gives one number a row: --kind and --alphabet do not go with it",
                "leave them out, or leave out --score",
            )
        self.masked = options.score == "masked-pll"
        self.used = [number for number, name in enumerate(backbone.vocabulary) if name]
        if len(self.used) == 1:
            _refuse_single(backbone, "leave out --score, use --kind logits")
        self._check_scoring()
        self.place = {number: place for place, number in enumerate(self.used)}

    def variants(self, row: Row) -> Sequence[Row]:
        """The row; when masked, once for each residue with that residue hidden."""
        if not self.masked:
            return (row,)
        return [
            self.backbone.masked(row, position)._replace(
                fields={**row.fields, "position": position, "id": truth}
            )
            for position, truth in enumerate(self.backbone.residues(row))
        ]

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """`pll` (n,) float32: of the row, or of the variant's hidden residue."""
        found = _residue_logits(activations)[:, self.used].log_softmax(-1)
        lengths = activations.mask.sum(dim=1).tolist()
        sums = []
        for log_probs, row in zip(_split(found, lengths), rows):
            if self.masked:
                sums.append(log_probs[row.fields["position"], self.place[row.fields["id"]]])
                continue
            truth = [self.place[number] for number in self.backbone.residues(row)]
            index = torch.tensor(truth, device=log_probs.device)
            sums.append(log_probs.gather(1, index[:, None]).double().sum())
        return {"pll": torch.stack(sums).float()}

    def gather(self, columns: Columns, counts: Sequence[int]) -> Columns:
        """The sum over each row's variants."""
        scores = columns["pll"]
        assert isinstance(scores, Tensor)
        sums = [part.double().sum().float() for part in _split(scores, counts)]
        return {"pll": torch.stack(sums)}

    def values(self, rows: int, tokens: int) -> int:
        """One number a row."""
        return rows

    def _check_scoring(self) -> None:
        """Raises `MgenError` for a backbone that cannot score: now, not at the first batch."""
        try:
            row = self.backbone.prepare(Row(0, "", "A"))  # a residue of DNA, RNA and proteins
        except RowError:
            return
        self.backbone.residues(row)
        if self.masked:
            self.backbone.masked(row, 0)


def _residue_logits(activations: Activations) -> Tensor:
    """(residues of all rows, V) float32: a bfloat16 softmax would lose the small ones."""
    assert activations.logits is not None
    return activations.logits[activations.mask].float()


def _split(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The values of each row."""
    return torch.split(values, list(lengths))


def _check_vocabulary(backbone: Backbone) -> None:
    if not backbone.vocabulary:
        raise MgenError(
            f"{backbone.card.name} gives no token probabilities", "use `mgen embed` with it"
        )


def _is_letter(name: str) -> bool:
    return len(name) == 1 and name.isalpha()


def _refuse_single(backbone: Backbone, hint: str) -> NoReturn:
    # Of one number a softmax is always 1.
    raise MgenError(f"{backbone.card.name} gives one number a token, no probabilities", hint)
