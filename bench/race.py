"""Forward passes of the same model in several forms, run in turn.

A race prints how many times as fast mgen is, median (lowest to highest) of the ratios within a
round, by the clock and by processor time: a machine has other work.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgen_core import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Pass = Callable[[], Tensor]  # to (B, L, H)
Ready = Callable[[Sequence[Row]], Pass]  # everything but the pass itself is done


class Lap(NamedTuple):
    """Seconds of one pass."""

    clock: float
    processor: float


def rows(letters: str, counts: Sequence[int]) -> list[Row]:
    """Random rows of so many letters."""
    draw = random.Random(0)
    return [
        Row(number, str(number), "".join(draw.choices(letters, k=count)))
        for number, count in enumerate(counts)
    ]


@torch.inference_mode()
def race(
    title: str,
    contenders: Mapping[str, Ready],
    rows: Sequence[Row],
    *,
    rounds: int = 5,
    seconds: float = 20,
) -> None:
    """Every contender in turn, so many rounds and seconds at least; the first is the plain one."""
    passes = {name: ready(rows) for name, ready in contenders.items()}
    counts = [len(row.data) for row in rows]
    print(f"\n{title}, rows of {counts} letters")
    differences = compared({name: once() for name, once in passes.items()})
    laps: list[dict[str, Lap]] = []
    begun = time.perf_counter()
    while len(laps) < rounds or time.perf_counter() - begun < seconds:
        laps.append({name: lap(once) for name, once in passes.items()})
    names = list(passes)
    for place, name in enumerate(names):
        for other in names[:place] if name.startswith("mgen") else ():
            tell(f"{name} / {other}", [(one[other], one[name]) for one in laps])
    print(f"  largest difference from {names[0]}: {differences}")


def compared(outputs: Mapping[str, Tensor]) -> str:
    """Where mgen has no zeros: those are at padding, which others have computed."""
    first, *others = outputs
    real = outputs["mgen"].any(dim=-1)
    expected = outputs[first][real].float()
    told = [
        f"{name} {float((outputs[name][real].float() - expected).abs().max()):.1e}"
        for name in others
        if outputs[name].shape == outputs[first].shape
    ]
    return f"{', '.join(told)}; largest value {float(expected.abs().max()):.1f}"


def lap(once: Pass) -> Lap:
    """A pass by both clocks."""
    clock, processor = time.perf_counter(), time.process_time()
    once()
    return Lap(time.perf_counter() - clock, time.process_time() - processor)


def tell(title: str, pairs: Sequence[tuple[Lap, Lap]]) -> None:
    """How many times as fast the second of each pair is."""
    clock = [slow.clock / fast.clock for slow, fast in pairs]
    processor = statistics.median(slow.processor / fast.processor for slow, fast in pairs)
    print(
        f"  {title:36} {statistics.median(clock):5.2f} ({min(clock):.2f} to {max(clock):.2f})"
        f"   by processor time {processor:5.2f}   {len(pairs)} rounds",
        flush=True,
    )
