"""Predictions of fine-tuned models: a head over the last hidden state of the backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mgen_core import Activations, Backbone, Columns, MgenError, Ragged, Row, Task, TaskCard, Want

from .adapters import Adapter, Gives, ResNet1D, check_adapter, make_adapter, mirror, pairs
from .plugin import ClassifyOptions, ClassifyPairsOptions, HeadOptions, RegressOptions


class Head(Task):
    """What the four tasks share: an adapter with weights, filled by the core."""

    gives: Gives = "rows"
    head: Adapter

    def __init__(self, card: TaskCard, options: HeadOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        if not options.adapter:
            raise MgenError(
                f"{card.name} needs a head: no adapter given",
                "give --option adapter=NAME, as the fine-tuned model's config names it",
            )
        self.adapter = options.adapter
        self.args = _arguments(options.adapter_args)
        self.as_reference = options.as_reference
        check_adapter(self.adapter, self.args, self.gives)
        self.labels = options.labels
        self.outputs = self._count(options.outputs)
        self.layer = backbone.layer(-1)
        self.needs = Want(layers=(self.layer,))

    def usual(self) -> int | None:
        """Outputs where nobody says how many; None: somebody must."""
        return 1

    def width(self) -> int:
        """Features that the adapter is made for."""
        return self.backbone.width

    def build(self) -> Adapter:
        """The adapter, empty, its parameters named as in the checkpoint after `adapter.`."""
        sizes = (self.width(), self.outputs)
        return make_adapter(self.adapter, self.args, *sizes, as_reference=self.as_reference)

    @property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        """How many outputs, and their names where they have some."""
        named = {"mgen.labels": json.dumps(self.labels)} if self.labels else {}
        return {"mgen.outputs": str(self.outputs), **named}

    def _count(self, given: int | None) -> int:
        found = len(self.labels) or self.usual() if given is None else given
        if found is None:
            raise MgenError(
                f"{self.card.name}: number of classes unknown", "give --option outputs=N"
            )
        if found < 1:
            raise MgenError(f"outputs is {found}", "it must be 1 or more")
        if self.labels and len(self.labels) != found:
            raise MgenError(
                f"{len(self.labels)} labels for {found} outputs", "name each of them, once"
            )
        return found


class Classes(Head):
    """A label among several, or several labels that are each true or not."""

    options: ClassifyOptions

    def __init__(self, card: TaskCard, options: ClassifyOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        if self.outputs == 1 and not options.multilabel:
            raise MgenError("one class alone is always right", "give --option multilabel=true")

    def usual(self) -> int | None:
        return None

    def decide(self, logits: Tensor) -> dict[str, Tensor]:
        """Columns of logits (n, C).

        `label` (n,) int32 and its `probability` (n,); multilabel: (n, C) int8 and (n, C).
        """
        logits = logits.float()  # a bfloat16 softmax would lose the small ones
        if self.options.multilabel:
            probability = logits.sigmoid()
            label = (probability > 0.5).to(torch.int8)
        else:
            best = logits.softmax(dim=-1).max(dim=-1)
            probability, label = best.values, best.indices.int()
        return {"label": label, "probability": probability, "logits": logits}

    def numbers(self) -> int:
        """In the columns of one row or token."""
        return self.outputs * 3 if self.options.multilabel else self.outputs + 2


class Classify(Classes):
    """A class for each row, or several."""

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """`label`, its `probability`, `logits` (n, C): see `decide`. A label may have a name."""
        found = self.decide(self.head(activations.layer(self.layer), _tokens(activations)))
        if not self.labels or self.options.multilabel:
            return found
        return {**found, "label": [self.labels[number] for number in found["label"].tolist()]}

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in all columns."""
        return rows * self.numbers()


class ClassifyTokens(Classes):
    """A class for each residue."""

    gives = "tokens"

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """The columns of `decide`, an entry a residue, ragged."""
        lengths = activations.mask.sum(dim=1).tolist()
        logits = self.head(activations.layer(self.layer)[activations.mask])
        return {name: Ragged(value, lengths) for name, value in self.decide(logits).items()}

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in all columns; special tokens make it an upper bound."""
        return tokens * self.numbers()


class Regress(Head):
    """Numbers for each row."""

    options: RegressOptions

    def __init__(self, card: TaskCard, options: RegressOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        if bool(options.label_mean) != bool(options.label_std) or 0 in options.label_std:
            raise MgenError(
                "label_mean or label_std alone, or a label_std of 0, gives no label units",
                "give both, as they were in training",
            )
        for name in ("label_mean", "label_std"):
            given = getattr(options, name)
            if given and len(given) not in (1, self.outputs):
                raise MgenError(
                    f"{name} has {len(given)} numbers for {self.outputs} outputs",
                    "give one for each output",
                )
        if options.scaled and (options.label_mean or options.label_std):
            raise MgenError(
                "scaled takes the mean and deviation of the labels from the checkpoint",
                "leave out label_mean and label_std, or scaled",
            )

    def build(self) -> Adapter:
        adapter = super().build()
        if self.options.scaled:
            adapter.add_module("scaler", Scaler())
        return adapter

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """`prediction` (n,) float32, or (n, outputs) of several."""
        found = self._raw(activations).float()
        if self.options.scaled and not self.as_reference:
            found = cast(Tensor, self.head.get_submodule("scaler")(found))
        if self.options.label_std:
            found = found * found.new_tensor(self.options.label_std)
        if self.options.label_mean:
            found = found + found.new_tensor(self.options.label_mean)
        return {"prediction": found.squeeze(1)}

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in the column."""
        return rows * self.outputs

    def _raw(self, activations: Activations) -> Tensor:
        """(n, outputs), in the units of training."""
        hidden = activations.layer(self.layer)
        if not self.options.scaled:
            return cast(Tensor, self.head(hidden, _tokens(activations)))
        if self.as_reference and isinstance(self.head, ResNet1D):
            return self.head.scaled_as_reference(hidden, _tokens(activations))
        # That task of ModelGenerator leaves out the special tokens at both ends.
        return cast(Tensor, self.head(hidden, activations.mask))


class Scaler(nn.Module):
    """From units of training to those of the labels, which are not negative."""

    _mean: Tensor
    _std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Buffers: in a bfloat16 run they stay float32.
        self.register_buffer("_mean", torch.zeros(1))
        self.register_buffer("_std", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, outputs) to the same."""
        return (x * self._std + self._mean).clamp_min(0)


class ClassifyPairs(Head):
    """How probable it is that two residues of a row are a pair (base pairs, contacts).

    Only half of the pairs is computed, since the other half is the same. Memory for a row of L
    residues: what the adapter takes (`adapters`), and columns of L^2 x (outputs + 1) numbers, or
    3 x top_pairs.
    """

    gives = "pairs"
    options: ClassifyPairsOptions

    def __init__(self, card: TaskCard, options: ClassifyPairsOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        if options.top_pairs is not None and options.top_pairs < 1:
            raise MgenError(f"top_pairs is {options.top_pairs}", "it must be 1 or more")

    def usual(self) -> int | None:
        return 1 if self.adapter == "ResNet2DAdapter" else 2

    def width(self) -> int:
        # All adapters but this one are made for the features of two tokens.
        return self.backbone.width * (1 if self.adapter == "MLPAdapterWithoutOutConcat" else 2)

    @property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        """How the pairs of a row lie in its list."""
        told = (
            "i < j, residues counted from 0, the most probable pairs first"
            if self.options.top_pairs
            else "row-major: residues x residues entries, counted in the column residues"
        )
        return {**super().metadata, "mgen.pairs": told}

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """`residues` (n,) int32, `probability` and `logits` of residues^2 pairs, ragged.

        With `top_pairs`: `i`, `j` int32 and `probability` of the most probable pairs, ragged.
        """
        one = self._top if self.options.top_pairs else self._all
        # Special tokens are computed too, since convolutions see them, and then left out.
        mask, seen = activations.mask, _tokens(activations)
        if self.as_reference:  # padding enters them there
            seen = torch.ones_like(seen)
        each = zip(activations.layer(self.layer), seen, mask)
        found = [one(hidden[real], residues[real]) for hidden, real, residues in each]
        columns: dict[str, Any] = {name: _end_to_end([r[name] for r in found]) for name in found[0]}
        if not self.options.top_pairs:
            columns["residues"] = mask.sum(dim=1).int()
        return columns

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in all columns; special tokens, and several rows, make it an upper bound."""
        if self.options.top_pairs:
            return 3 * min(rows * self.options.top_pairs, tokens * tokens)
        return rows + tokens * tokens * (self.outputs + 1)

    def _all(self, hidden_LH: Tensor, residues_L: Tensor) -> dict[str, Tensor]:
        """Columns of one row, (residues^2, ...)."""
        logits = mirror(self.head.triangle(hidden_LH).float(), len(hidden_LH))
        logits = logits[residues_L][:, residues_L]
        probability = _paired(logits).sigmoid()
        if not self.head.self_pairs:
            probability.fill_diagonal_(0)
        return {"probability": probability.flatten(), "logits": logits.flatten(0, 1).squeeze(1)}

    def _top(self, hidden_LH: Tensor, residues_L: Tensor) -> dict[str, Tensor]:
        """Columns of one row, (top_pairs,) or fewer."""
        assert self.options.top_pairs is not None
        i, j = pairs(len(hidden_LH), hidden_LH.device)
        others = (i == j) | ~residues_L[i] | ~residues_L[j]
        logits = _paired(self.head.triangle(hidden_LH).float()).masked_fill(others, -torch.inf)
        length = int(residues_L.sum())
        best = logits.topk(min(self.options.top_pairs, length * (length - 1) // 2))
        number = residues_L.cumsum(0) - 1
        return {
            "i": number[i[best.indices]].int(),
            "j": number[j[best.indices]].int(),
            "probability": best.values.sigmoid(),
        }


def _paired(logits: Tensor) -> Tensor:
    """(..., C) to (...): of two classes, the second says that it is a pair."""
    # Trained alone, with a sigmoid: the first one means nothing.
    return logits[..., min(1, logits.shape[-1] - 1)]


def _end_to_end(pieces: Sequence[Tensor]) -> Ragged:
    return Ragged(torch.cat(list(pieces)), [len(piece) for piece in pieces])


def _tokens(activations: Activations) -> Tensor:
    """(B, L) bool: everything but padding, for these adapters count special tokens."""
    return activations.mask if activations.tokens is None else activations.tokens


def _arguments(text: str) -> dict[str, Any]:
    """Of the adapter, from JSON."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MgenError(
            f"adapter_args is not JSON: {error}", 'write {"hidden_sizes": [12]}'
        ) from error
    if not isinstance(found, dict):
        raise MgenError(f"adapter_args is no object: {text:.60}", 'write {"hidden_sizes": [12]}')
    return found
