"""The two families: AIDO.RNA and AIDO.DNA are `rnabert`, AIDO.Protein is `fm4bio`."""

from __future__ import annotations

from dataclasses import replace

from .config import Family
from .tokens import NUCLEOTIDES, PROTEINS

RNABERT = Family(
    model_type="rnabert",
    vocabulary=NUCLEOTIDES,
    acts=("swiglu",),
    positions=("rope", "absolute"),
    defaults={"vocab_size": 16, "max_position_embeddings": 512},
    projections={
        "mlp.up": ("mlp.up_proj",),
        "mlp.gate": ("mlp.gate_proj",),
        "mlp.up_gate": ("mlp.up_proj", "mlp.gate_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
    eager=True,
)

FM4BIO = Family(
    model_type="fm4bio",
    vocabulary=PROTEINS,
    acts=("swiglu", "geglu"),
    positions=("rope", "absolute"),
    defaults={"vocab_size": 128, "max_position_embeddings": 2048},
    projections={
        "mlp.up_gate": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    },
)

# Its positions are a column and a row of an alignment.
RAG = replace(FM4BIO, positions=("rope_2d",))
