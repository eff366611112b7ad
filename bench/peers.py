"""Mean embeddings of real proteins: mgen beside the tools that people use, each as it recommends.

    nox -s bench -- peers                         2,100 proteins, ESM2-8M's geometry
    python bench/peers.py --rows 60 --rounds 1    a quick look

Each peer is a script of bench/peers, in an environment of its own that pip fills from PyPI (kept
under `.nox/peers`, or where --environments says). All run one after another, round after round,
on the same random weights and sequences; times are of whole processes, start-up included.

mgen stands for `mgen embed` and the `mgen merge` after it, since the peers too leave rows in input
order. `private` is the most memory that is no file's (RssAnon), `resident` with mapped files.
`difference` is the largest one from mgen's embeddings. sentence-transformers takes the mean with
special tokens; its difference is that of the same rows averaged over residues alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import material
import numpy as np
import torch
from processes import MB, Took, clock, mgen, ratios, size_of, took
from safetensors.torch import load_file

import mgen_core

SIZE = "8m"
MGEN = "mgen embed, merge"
EMBED = "mgen embed alone"
HEADER = f"""\
{"":22} {"seconds":>8} {"processor s":>12} {"/ mgen":>7} {"by processor":>13} {"private MB":>11} \
{"resident MB":>12} {"written MB":>11} {"difference":>11}"""


@dataclass(frozen=True)
class Peer:
    """A script of bench/peers, and what pip installs for it beside torch."""

    name: str
    script: str
    package: str


PEERS = (
    Peer("sentence-transformers", "sentences", "sentence-transformers==6.2.0"),
    Peer("fair-esm", "fair", "fair-esm==2.0.0"),
    Peer("transformers pipeline", "pipeline", "transformers==5.23.0"),
    Peer("padded, input order", "padded", "transformers==5.23.0"),
)


@dataclass
class Contender:
    """What the rounds of one tool took, and what it left: bytes, and embeddings (rows, width)."""

    took: list[Took]
    written: int = 0
    embeddings: np.ndarray | None = None


def main() -> None:
    """Environments, then the rounds, then the table."""
    asked = arguments()
    found = material.spread(material.sequences(material.PROTEINS), asked.rows)
    pythons = {peer: environment(peer, asked.environments) for peer in PEERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = convert(material.esm2(folder / "weights", SIZE))
        fasta = material.write_fasta(folder / "proteins.fasta", found)
        # Once before the clock: byte code is compiled, and files are in the page cache.
        warm = material.write_fasta(folder / "warm.fasta", found[:2])
        one_round(pythons, weights, warm, folder / "out")
        contenders: dict[str, Contender] = {}
        for number in range(asked.rounds):
            print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
            for tool, came in one_round(pythons, weights, fasta, folder / "out").items():
                earlier = contenders.setdefault(tool, Contender([]))
                came.took = earlier.took + came.took
                contenders[tool] = came
        residues = pooled_over_residues(pythons, weights, fasta, folder / "out")
        contenders[PEERS[0].name].embeddings = residues
    report(contenders, len(found))
    if asked.figures:
        asked.figures.write_text(json.dumps(figures(contenders), indent=1))


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--rows", type=int, default=2100, help="proteins, from all of the file")
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--environments", type=Path, default=material.ROOT / ".nox/peers")
    given.add_argument("--figures", type=Path, help="a JSON file for the figures")
    return given.parse_args()


# --------------------------------------------------------------------------- before the clock


def environment(peer: Peer, under: Path) -> Path:
    """The Python of an environment that holds the package; made when it is not there."""
    folder = under / peer.package
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        print(f"installing {peer.package}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pins = material.ROOT / "constraints.txt"
        pip = (python, "-m", "pip", "install", "--only-binary=:all:", "-c", pins)
        took([*pip, "torch", "numpy", peer.package])
        (folder / "complete").touch()
    return python


def convert(weights: Path) -> Path:
    """Put the same numbers beside the published layout under the names that fair-esm has."""
    renamed = {}
    for name, tensor in load_file(weights / "model.safetensors").items():
        for published, name_there in FAIR.items():
            name = name.replace(published, name_there)
        renamed[name] = tensor
    for unused in [name for name in renamed if "position" in name]:
        del renamed[unused]
    renamed["lm_head.weight"] = renamed["embed_tokens.weight"]
    torch.save(renamed, weights / "fair.pt")
    return weights


# Published names -> names in fair-esm, replaced in this order.
FAIR = {
    "esm.": "",
    "embeddings.word_embeddings.": "embed_tokens.",
    "encoder.layer.": "layers.",
    "encoder.emb_layer_norm_after.": "emb_layer_norm_after.",
    "attention.self.query.": "self_attn.q_proj.",
    "attention.self.key.": "self_attn.k_proj.",
    "attention.self.value.": "self_attn.v_proj.",
    "attention.self.rotary_embeddings.": "self_attn.rot_emb.",
    "attention.output.dense.": "self_attn.out_proj.",
    "attention.LayerNorm.": "self_attn_layer_norm.",
    "intermediate.dense.": "fc1.",
    "output.dense.": "fc2.",
    "LayerNorm.": "final_layer_norm.",
}


# --------------------------------------------------------------------------- the rounds


def one_round(
    pythons: Mapping[Peer, Path], weights: Path, fasta: Path, output: Path
) -> dict[str, Contender]:
    """Every tool once, on the same file."""
    found = by_mgen(weights, fasta, output)
    for peer, python in pythons.items():
        found[peer.name] = by_peer(peer, python, weights, fasta, output)
    return found


def by_mgen(weights: Path, fasta: Path, output: Path) -> dict[str, Contender]:
    """Embed, and merge after it."""
    run, merged = output / "run", output / "merged.parquet"
    output.mkdir()
    words = ("--weights", weights, "--too-long", "truncate", "--pool", "mean", "--output", run)
    # Nothing remembered from earlier runs: the others remember nothing either.
    cache = output.with_name("cache")
    embed = mgen("embed", fasta, "--backbone", f"esm2_{SIZE}", *words, MGEN_CACHE=str(cache))
    shutil.rmtree(cache, ignore_errors=True)
    written = size_of(output)
    both = embed + mgen("merge", run, "--to", merged)
    column = mgen_core.read(run, columns=["embedding"])["embedding"].combine_chunks()
    embeddings = column.flatten().to_numpy().reshape(len(column), -1)
    alone = Contender([embed], written, embeddings)
    together = Contender([both], size_of(output), embeddings)
    shutil.rmtree(output)
    return {EMBED: alone, MGEN: together}


def by_peer(
    peer: Peer, python: Path, weights: Path, fasta: Path, output: Path, *words: str
) -> Contender:
    """Its script; what it leaves is read and removed."""
    output.mkdir()
    script = Path(__file__).parent / f"peers/{peer.script}.py"
    # No telemetry, no look at the hub: the weights are a folder.
    came = took([python, script, weights, fasta, output, *words], HF_HUB_OFFLINE="1")
    found = Contender([came], size_of(output), embeddings(output))
    shutil.rmtree(output)
    return found


def pooled_over_residues(
    pythons: Mapping[Peer, Path], weights: Path, fasta: Path, output: Path
) -> np.ndarray | None:
    """What sentence-transformers gives when the mean is not its own."""
    peer = PEERS[0]
    return by_peer(peer, pythons[peer], weights, fasta, output, "residues").embeddings


def embeddings(folder: Path) -> np.ndarray:
    """(rows, width) of one file, or of a file a row."""
    if (folder / "embeddings.npy").exists():
        found: np.ndarray = np.load(folder / "embeddings.npy")
        return found
    files = sorted(folder.glob("*.pt"), key=lambda file: int(file.stem))
    means = (torch.load(file)["mean_representations"] for file in files)
    return np.stack([next(iter(layers.values())).numpy() for layers in means])


# --------------------------------------------------------------------------- the table


def report(contenders: Mapping[str, Contender], rows: int) -> None:
    """A line a tool, then what it comes to."""
    print(f"{rows} proteins, esm2_{SIZE}, {torch.get_num_threads()} threads, medians")
    print(HEADER)
    for tool, line in figures(contenders).items():
        print(
            f"{tool:22} {line['seconds']:8.1f} {line['processor']:12.1f} {line['ratio']:7.2f} "
            f"{line['by processor']:13.2f} {line['private'] / MB:11.0f} "
            f"{line['resident'] / MB:12.0f} {line['written'] / MB:11.1f} "
            f"{line['difference']:11.1e}",
            flush=True,
        )


def figures(contenders: Mapping[str, Contender]) -> dict[str, dict[str, float]]:
    """The table's numbers: seconds, bytes and ratios."""
    ours = contenders[MGEN]
    found = {}
    for tool, contender in contenders.items():
        by_clock, by_processor = ratios(contender.took, ours.took)
        found[tool] = {
            "seconds": clock(contender.took),
            "processor": float(np.median([one.processor for one in contender.took])),
            "ratio": by_clock,
            "by processor": by_processor,
            "private": float(max(one.private for one in contender.took)),
            "resident": float(max(one.resident for one in contender.took)),
            "written": float(contender.written),
            "difference": difference(contender.embeddings, ours.embeddings),
        }
    return found


def difference(found: np.ndarray | None, expected: np.ndarray | None) -> float:
    """The largest one of any number."""
    if found is None or expected is None or found.shape != expected.shape:
        sys.exit("a tool did not embed all rows")
    return float(np.abs(found - expected).max())


if __name__ == "__main__":
    main()
