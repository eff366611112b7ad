"""Rows end to end, without padding, and back.

Rows lie longest first, so that rows of equal length are neighbours: attention takes them as one
block without a mask, and no layer ever computes on padding. What a layer must know about lengths
is plain numbers on the CPU: no layer waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .api import Activations, Inputs

# (rows, length) of each block of equal rows.
Spans = tuple[tuple[int, int], ...]

PAD = b"\0"


def pack(
    rows: Sequence[bytes], before: int = 0, after: int = 0, *, pads: bool = False
) -> dict[str, Any]:
    """Token ids of each row as one stream; with `pads` all rows are as long as the longest.

    - `tokens`, `positions`: (T,) int64.
    - `spans`: the blocks of equal length, in stream order.
    - `mask`: (B, L) bool, True at residues: without the first `before` and last `after` tokens.
    - `real`: (B, L) bool, True at tokens: not at padding.
    - `slots`: (T,) int64, where each token goes in B x L; None when the stream is in place.
    """
    # numpy, for it is done beside the passes: for each operation of torch two threads would hand
    # the interpreter to each other.
    length = np.array([len(row) for row in rows])[:, None]
    if pads:
        width = max(map(len, rows))
        rows = [row.ljust(width, PAD) for row in rows]
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    width = lengths[order[0]]
    spans = tuple((len(list(same)), n) for n, same in groupby(lengths[row] for row in order))
    tokens = np.frombuffer(b"".join(rows[number] for number in order), np.uint8)
    column = np.arange(width)
    positions = np.concatenate([np.tile(column[:size], count) for count, size in spans])
    starts = np.repeat(np.array(order) * width, [lengths[number] for number in order])
    return {
        "tokens": torch.from_numpy(tokens.astype(np.int64)),
        "positions": torch.from_numpy(positions),
        "spans": spans,
        "mask": torch.from_numpy((column >= before) & (column < length - after)),
        "real": torch.from_numpy(column < length),
        "slots": None if len(spans) == 1 else torch.from_numpy(starts + positions),
    }


def unpack(stream: Tensor, slots: Tensor | None, rows: int, width: int) -> Tensor:
    """(T, H) back to (B, L, H), with zeros at padding."""
    if slots is None:
        return stream.view(rows, width, -1)
    padded = stream.new_zeros(rows * width, stream.shape[-1])
    return padded.index_copy_(0, slots, stream).view(rows, width, -1)


def unpacked(
    inputs: Inputs,
    streams: Mapping[int, Tensor],
    logits: Tensor | None = None,
) -> Activations:
    """What a backbone gives of packed rows: layers (T, H) and logits (T, V), each as (B, L, ...).

    `inputs` has what `pack` gave.
    """
    mask: Tensor = inputs["mask"]

    def padded(stream: Tensor) -> Tensor:
        return unpack(stream, inputs["slots"], *mask.shape)

    hidden = {number: padded(stream) for number, stream in streams.items()}
    return Activations(hidden, mask, None if logits is None else padded(logits), inputs["real"])
