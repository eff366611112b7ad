"""Sizes of the named models, for planning without weights: their own config.json wins."""

from __future__ import annotations

from typing import Any

GENES = 19_264


def _sizes(width: int, depth: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": GENES,
    }


GEOMETRY = {
    "aido_cell_3m": _sizes(128, 6, 4, 320),
    "aido_cell_10m": _sizes(256, 8, 8, 640),
    "aido_cell_100m": _sizes(640, 18, 20, 1664),
    "aido_cell_650m": _sizes(1280, 32, 20, 3392),
}
