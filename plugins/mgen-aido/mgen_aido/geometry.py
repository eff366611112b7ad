"""Sizes of the named models, as their config.json has them: for planning without weights, for
the models that have none, and for benchmarks. Weights bring their own config.json, which wins."""

from __future__ import annotations

from .config import Fields


def _sizes(width: int, depth: int, heads: int, inner: int, **others: object) -> Fields:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **others,
    }


LAYER_NORM = {"normalization_type": "LayerNorm"}
MIXTURE = {
    "moe": True,
    "num_experts": 8,
    "experts_per_token": 2,
    "use_lm_head": False,
    "tie_word_embeddings": False,
}
RNA_650M = _sizes(1280, 33, 20, 3392, max_position_embeddings=1024, **LAYER_NORM)
RNA_1B600M = _sizes(2048, 32, 32, 5440, max_position_embeddings=1024, **LAYER_NORM)
PROTEIN_16B = _sizes(2304, 36, 36, 7680, **MIXTURE)
DEBUG = _sizes(64, 2, 4, 128)

GEOMETRY: dict[str, Fields] = {
    "aido_rna_1m_mars": _sizes(128, 6, 8, 320, add_linear_bias=False, max_position_embeddings=1024),
    "aido_rna_25m_mars": _sizes(512, 8, 16, 1344, max_position_embeddings=1024, **LAYER_NORM),
    "aido_rna_650m": RNA_650M,
    "aido_rna_650m_cds": RNA_650M,
    "aido_rna_1b600m": RNA_1B600M,
    "aido_rna_1b600m_cds": RNA_1B600M,
    "aido_dna_300m": _sizes(1024, 24, 16, 2688, max_position_embeddings=4000, **LAYER_NORM),
    "aido_dna_7b": _sizes(4352, 32, 32, 11584, max_position_embeddings=4000, **LAYER_NORM),
    "aido_protein_16b": PROTEIN_16B,
    "aido_protein_16b_v1": PROTEIN_16B,
    # No weights are published for these; dna_dummy and protein_dummy are ours.
    "aido_dna_debug": DEBUG,
    "aido_protein_debug": DEBUG,
    "aido_dna_dummy": _sizes(32, 2, 4, 64),
    "aido_protein_dummy": _sizes(32, 2, 4, 48, **{**MIXTURE, "num_experts": 4}),
}
