"""The command line as a user runs it, and folders like those that GenBio publishes."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from layouts import write_layout

H, I, LAYERS = 32, 48, 2  # noqa: E741
FIELDS = {
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "add_linear_bias": False,
    "hidden_act": "swiglu",
    "normalization_type": "RMSNorm",
    "position_embedding_type": "rope",
    "max_position_embeddings": 64,
}
MLP = {
    "rnabert": {"up_proj": (I, H), "gate_proj": (I, H), "down_proj": (H, I)},
    "fm4bio": {"dense_h_to_4h": (2 * I, H), "dense_4h_to_h": (H, I)},
}
TOKENS = {"rnabert": 16, "fm4bio": 128}


@pytest.fixture
def mgen(tmp_path):
    """`mgen(*words, code=0)`: run it in the test's folder, or `cwd`; what it said on stderr."""

    def run(*words, code=0, cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "mgen_core", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


@pytest.fixture
def merged(mgen, tmp_path):
    """`merged(*words)`: run the words, then merge; the table of the file."""

    def run(*words):
        mgen(*words)
        mgen("merge", "predictions")
        return pq.read_table(tmp_path / "predictions.parquet")

    return run


@pytest.fixture
def published(tmp_path):
    """`published(family, layout, **config)`: a folder of random weights in published names."""

    def folder(family, layout="bin-sharded", **config):
        path = tmp_path / "weights"
        fields = {"model_type": family, "vocab_size": TOKENS[family], **FIELDS}
        tensors = {name: torch.randn(shape) for name, shape in shapes(family).items()}
        if config.get("position_embedding_type") == "absolute":
            tensors["bert.embeddings.position_embeddings.weight"] = torch.randn(64, H)
        words = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = words
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        write_layout(path, tensors, layout)
        (path / "config.json").write_text(json.dumps(fields | config))
        return path

    return folder


def shapes(family):
    """Published names and shapes of a small model without biases."""
    found = {
        "bert.embeddings.word_embeddings.weight": (TOKENS[family], H),
        "bert.encoder.ln.weight": (H,),
        "cls.predictions.transform.dense.weight": (H, H),
        "cls.predictions.transform.dense.bias": (H,),
        "cls.predictions.transform.LayerNorm.weight": (H,),
        "cls.predictions.bias": (TOKENS[family],),
    }
    for layer in range(LAYERS):
        place = f"bert.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found[f"{place}.attention.{part}.weight"] = (H, H)
        for part, shape in MLP[family].items():
            found[f"{place}.mlp.{part}.weight"] = shape
        found |= {f"{place}.attention.ln.weight": (H,), f"{place}.ln.weight": (H,)}
    return found
