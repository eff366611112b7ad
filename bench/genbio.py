"""One forward pass of GenBio's encoders: mgen against a plain implementation of the same maths.

    nox -s bench -- genbio

Prints how many times as fast mgen is, median (lowest to highest) over passes run in turn, by the
clock and by processor time: a machine has other work. Weights and letters are random, the same on
both sides; lengths are those of real rows.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plain
import torch
from mgen_aido import plugin
from mgen_aido.backbone import EncoderBackbone
from mgen_aido.geometry import GEOMETRY
from mgen_aido.options import EncoderOptions
from torch import Tensor, nn

from mgen_core import Row, Want
from mgen_core.checkpoint import Checkpoint
from mgen_core.weights import fill, parameters_on_meta

ROUNDS, SECONDS = 5, 20  # of each race, at least
DATA = Path(__file__).parents[2] / "shared/data"
LONGEST = 420  # letters of a row; with longer ones a pass takes a minute
# The first such rows of two FASTA files, for where the files are not.
GENES = [252, 417, 264, 255]
PROTEINS = [142, 398, 222, 264, 241, 375]
CARDS = {card.name: card for card in plugin.CARDS}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RNA_650M = GEOMETRY["aido_rna_650m"]
# AIDO.Protein-16B at a quarter of its width and a sixth of its depth.
MIXTURE = {
    **GEOMETRY["aido_protein_16b"],
    "hidden_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "intermediate_size": 1920,
}

Pass = Callable[[], Tensor]  # to (B, L, H)
Ready = Callable[[Sequence[Row]], Pass]  # everything but the pass itself is done


class Lap(NamedTuple):
    """Seconds of one pass."""

    clock: float
    processor: float


def main() -> None:
    """All races."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    genes = lengths("genes-100.fna", GENES)
    proteins = lengths("bacterial-proteome.faa", PROTEINS)
    for precision in DTYPES:
        dense = contenders("aido_rna_650m", RNA_650M, precision)
        for counts in ([30], genes[:1], genes):
            race(f"AIDO.RNA-650M, {precision}", dense, rows("ACGT", counts))
        del dense
        mixture = contenders("aido_protein_16b", MIXTURE, precision)
        for counts in (proteins[:1], proteins):
            title = f"AIDO.Protein-16B scaled down, {precision}"
            race(title, mixture, rows("ACDEFGHIKLMNPQRSTVWY", counts))


def lengths(file: str, known: list[int]) -> list[int]:
    """Letters of the first rows of a file that are not too long; `known` without the file."""
    if not (DATA / file).exists():
        return known
    found: list[int] = []
    for line in (DATA / file).read_text().splitlines():
        if line.startswith(">"):
            found.append(0)
        else:
            found[-1] += len(line)
    return [length for length in found if length <= LONGEST][: len(known)]


def rows(letters: str, counts: Sequence[int]) -> list[Row]:
    draw = random.Random(0)
    return [
        Row(number, str(number), "".join(draw.choices(letters, k=count)))
        for number, count in enumerate(counts)
    ]


# --------------------------------------------------------------------------- who runs


def contenders(card: str, config: Mapping[str, Any], precision: str) -> dict[str, Ready]:
    """The same model in every form, by name; mgen's own last."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        loose, fused = (opened(card, Path(folder), fuse) for fuse in (False, True))
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    first = textbook(loose, dtype)
    tensors = first.state_dict()
    found = {"plain": padded(loose, first)}
    if loose.known.experts:
        every = textbook(loose, dtype, plain.AllExperts)
        every.load_state_dict(tensors)
        found["all experts"] = padded(loose, every)
    published = Checkpoint(None, {f"bert.{name}": tensor for name, tensor in tensors.items()})
    found["mgen"] = packed(loose, published, dtype)
    found["mgen fuse=true"] = packed(fused, published, dtype)
    return found


def opened(card: str, folder: Path, fuse: bool) -> EncoderBackbone:
    backbone = CARDS[card].load(CARDS[card], EncoderOptions(weights=folder, fuse=fuse))
    assert isinstance(backbone, EncoderBackbone)
    backbone.want = Want(layers=(backbone.known.depth,))
    return backbone


def textbook(
    backbone: EncoderBackbone, dtype: torch.dtype, mixture: type[plain.Mixture] = plain.Mixture
) -> plain.Encoder:
    """Random weights in `dtype`; routers stay float32, as GenBio's do."""
    module = plain.Encoder(backbone.known, mixture).to(dtype)
    for part in module.modules():
        if isinstance(part, plain.Mixture):
            part.router.float()
    return module


def padded(backbone: EncoderBackbone, module: nn.Module) -> Ready:
    def ready(rows: Sequence[Row]) -> Pass:
        ids = [backbone.collate([row])["tokens"] for row in rows]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return lambda: module(tokens)

    return ready


def packed(backbone: EncoderBackbone, published: Checkpoint, dtype: torch.dtype) -> Ready:
    with parameters_on_meta():
        module = backbone.build()
    fill(module, backbone, published, dtype=dtype, device=torch.device("cpu"))

    def ready(rows: Sequence[Row]) -> Pass:
        inputs, want = backbone.collate(rows), backbone.want
        return lambda: backbone.forward(module, inputs, want).layer(*want.layers)

    return ready


# --------------------------------------------------------------------------- the race


@torch.inference_mode()
def race(title: str, contenders: Mapping[str, Ready], rows: Sequence[Row]) -> None:
    """Every contender in turn, round after round; then the ratios within a round."""
    passes = {name: ready(rows) for name, ready in contenders.items()}
    counts = [len(row.data) for row in rows]
    print(f"\n{title}, rows of {counts} letters")
    differences = compared({name: once() for name, once in passes.items()})
    rounds: list[dict[str, Lap]] = []
    begun = time.perf_counter()
    while len(rounds) < ROUNDS or time.perf_counter() - begun < SECONDS:
        rounds.append({name: lap(once) for name, once in passes.items()})
    names = list(passes)
    for place, name in enumerate(names):
        for other in names[:place] if name.startswith("mgen") else ():
            tell(f"{name} / {other}", [(one[other], one[name]) for one in rounds])
    print("  largest difference from plain:", differences)


def compared(outputs: Mapping[str, Tensor]) -> str:
    """Where mgen has no zeros: those are at padding, which plain has computed."""
    real = outputs["mgen"].any(dim=-1)
    expected = outputs["plain"][real].float()
    found = {
        name: (output[real].float() - expected).abs().max() for name, output in outputs.items()
    }
    told = (f"{name} {float(most):.1e}" for name, most in found.items() if name != "plain")
    return f"{', '.join(told)}; largest value {float(expected.abs().max()):.1f}"


def lap(once: Pass) -> Lap:
    clock, processor = time.perf_counter(), time.process_time()
    once()
    return Lap(time.perf_counter() - clock, time.process_time() - processor)


def tell(title: str, pairs: Sequence[tuple[Lap, Lap]]) -> None:
    """How many times as fast the second of each pair is."""
    clock = [slow.clock / fast.clock for slow, fast in pairs]
    processor = statistics.median(slow.processor / fast.processor for slow, fast in pairs)
    print(
        f"  {title:28} {statistics.median(clock):5.2f} ({min(clock):.2f} to {max(clock):.2f})"
        f"   by processor time {processor:5.2f}   {len(pairs)} rounds",
        flush=True,
    )


if __name__ == "__main__":
    main()
