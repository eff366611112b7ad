"""Contract checks for plugin authors: each raises `AssertionError` saying what is broken.

from mgen_core.testing import check_backbone

def test_contract():
    check_backbone("tinydna-1m")
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api import Activations, Backbone, BackboneCard, Row, Want, open_backbone
from .catalog import Catalog, discover
from .config import checked

if TYPE_CHECKING:
    from torch import Tensor

HEAVY = ("torch", "numpy", "pyarrow", "transformers", "datasets", "deepspeed", "pandas")
MODALITIES = {"dna": "ACGT", "rna": "ACGU", "protein": "ACDEFGHIKLMNPQRSTVWY"}
LENGTHS = (9, 61, 1, 30, 61, 17)


def check_backbone(
    name: str,
    *,
    catalog: Catalog | None = None,
    weights: Path | None = None,
    rows: Sequence[Row] | None = None,
    options: dict[str, Any] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Every check below on one backbone, in float32 on the CPU.

    `rows` default to random sequences of the card's modality; a backbone of another modality, or
    one that needs fields, must be given some. `tolerance` is the largest difference that
    a row's neighbours may make to its vectors: relative to a vector's
    largest number where that is above 1.
    """
    card = (catalog or discover()).find(BackboneCard, name)
    check_card(card)
    check_light(card)
    rows = rows or sample_rows(card.modality)
    chosen = checked(card.options, {**(options or {}), "weights": weights})
    backbone = open_backbone(card, chosen)
    rows = [backbone.prepare(row) for row in rows]
    check_measure(backbone, rows)
    check_invariance(backbone, rows, tolerance)


def sample_rows(modality: str) -> list[Row]:
    """A few random sequences of different lengths, the same ones every time."""
    assert modality in MODALITIES, f"no sample rows for {modality!r}: give `rows`"
    draw = random.Random(0)
    letters = MODALITIES[modality]
    return [
        Row(index, f"row-{index}", "".join(draw.choices(letters, k=length)))
        for index, length in enumerate(LENGTHS)
    ]


def check_card(card: BackboneCard) -> None:
    """What `mgen list backbones` shows is there."""
    assert card.name and card.name == card.name.strip(), "the card has no name"
    assert card.summary, f"{card.name}: the card has no summary"
    assert card.modality in (*MODALITIES, "cell", "any"), f"{card.name}: modality {card.modality!r}"
    assert card.licence != "unknown", f"{card.name}: say under which licence the weights are"


def check_light(card: BackboneCard) -> None:
    """The module that holds the card imports nothing heavy: every command imports it."""
    module = card.load.__module__
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**_environment(), "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 0, f"{module} cannot be imported alone: {done.stderr}"
    assert not done.stdout.strip(), f"{module} imports {done.stdout.strip()}; import in load()"


def check_measure(backbone: Backbone, rows: Sequence[Row]) -> None:
    """`measure` bounds the width of what `collate` makes; `truncate` obeys it."""
    for row in rows:
        tokens = backbone.measure(row)
        width = _widths(backbone.collate([row]))
        assert width <= tokens, f"row {row.id} measures {tokens} but is collated {width} wide"
        if isinstance(row.data, str) and tokens > 4:
            cut = backbone.truncate(row, tokens - 1)
            assert backbone.measure(cut) <= tokens - 1, f"truncate left row {row.id} too long"


def check_invariance(backbone: Backbone, rows: Sequence[Row], tolerance: float) -> None:
    """A row's vectors do not depend on its neighbours, on padding or on the batch's order."""
    import torch

    from .api import Task, TaskCard, TaskOptions
    from .engine import LocalEngine, place
    from .origin import find_origin

    last = backbone.layer(-1)
    task = Task(TaskCard("check", "", lambda *_: task), TaskOptions(), backbone)
    task.needs = Want(layers=(last,), logits=bool(backbone.vocabulary))
    origin = find_origin(backbone.options.weights, None, None)
    engine = LocalEngine(backbone, task, place("fp32"), origin)

    def vectors(batch: Sequence[Row]) -> list[list[torch.Tensor]]:
        """Of each row: hidden states and, where there are any, logits of its residues."""
        with torch.inference_mode():
            found = backbone.forward(engine.module, backbone.collate(batch), task.needs)
        _check_activations(backbone, found, len(batch))
        together = [found.layer(last)] + ([found.logits] if found.logits is not None else [])
        return [[t[i][found.mask[i]] for t in together] for i in range(len(batch))]

    alone = [vectors([row])[0] for row in rows]
    for name, order in (
        ("in one batch", list(range(len(rows)))),
        ("in reverse order", list(range(len(rows)))[::-1]),
        ("in pairs", [0, len(rows) - 1]),
    ):
        for index, found in zip(order, vectors([rows[index] for index in order])):
            for vector, expected in zip(found, alone[index]):
                _check_equal(vector, expected, tolerance, f"row {rows[index].id} {name}")


def _check_equal(vector: Tensor, expected: Tensor, tolerance: float, which: str) -> None:
    assert vector.shape == expected.shape, f"{which} has other residues"
    if vector.numel():
        # Relative above 1: the rounding of float32 grows with the numbers that are added up.
        size = expected.abs().amax(-1, keepdim=True).clamp(min=1)
        worst = float(((vector - expected).abs() / size).max())
        assert worst <= tolerance, f"{which} differs by {worst:.2g}"


def _check_activations(backbone: Backbone, found: Activations, rows: int) -> None:
    import torch

    hidden = found.layer(backbone.layer(-1))
    assert hidden.ndim == 3 and hidden.shape[0] == rows, f"hidden is {tuple(hidden.shape)}, not BLH"
    assert hidden.shape[2] == backbone.width, f"width is {backbone.width}, hidden {hidden.shape[2]}"
    assert found.mask.dtype == torch.bool, f"mask is {found.mask.dtype}, not bool"
    assert found.mask.shape == hidden.shape[:2], "mask and hidden differ in shape"
    tokens = found.mask if found.tokens is None else found.tokens
    assert tokens.dtype == torch.bool, f"tokens is {tokens.dtype}, not bool"
    assert tokens.shape == found.mask.shape, "tokens and mask differ in shape"
    assert bool((tokens | ~found.mask).all()), "mask is True where tokens is not"
    if rows == 1:  # nothing to pad to
        assert bool(tokens.all()), "no padding, but Activations.tokens (or mask) leaves tokens out"
    if found.logits is not None:
        assert found.logits.shape[2] == len(backbone.vocabulary), "logits do not fit vocabulary"


def _widths(inputs: Any) -> int:
    """The widest second dimension among the tensors of the inputs."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    found = [tensor.shape[1] for tensor in tensors if getattr(tensor, "ndim", 0) == 2]
    return max(found, default=0)


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "MGEN_PLUGINS"}
