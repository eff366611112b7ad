"""Embeddings: hidden states pooled over residues, or kept one a residue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from mgen_core import Activations, Backbone, Columns, MgenError, Ragged, Row, Task, TaskCard, Want

from .plugin import EmbedOptions, Pool


class Embed(Task):
    """Each pool of each layer is a column, all from one forward pass."""

    def __init__(self, card: TaskCard, options: EmbedOptions, backbone: Backbone) -> None:
        super().__init__(card, options, backbone)
        self.pools = tuple(dict.fromkeys(options.pool))
        self.layers = {number: backbone.layer(number) for number in options.layers}
        self.needs = Want(layers=tuple(sorted(set(self.layers.values()))))
        if "cls" in self.pools and backbone.cls_position is None:
            raise MgenError(
                f"{backbone.card.name} has no CLS token, so there is nothing for --pool cls",
                "use --pool mean",
            )

    @property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        """The names of a row's tokens, where they have names."""
        names = self.backbone.token_names if "tokens" in self.pools else ()
        return {"mgen.tokens": json.dumps(list(names))} if names else {}

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """(n, H) float a pooled column; (residues, H) ragged for `tokens`.

        Where the backbone names them, `tokens` are (n, tokens, H).
        """
        return {
            self._name(pool, number): self._pooled(pool, activations.layer(layer), activations.mask)
            for number, layer in self.layers.items()
            for pool in self.pools
        }

    def values(self, rows: int, tokens: int) -> int:
        """Numbers in all columns; special tokens make it an upper bound for `tokens`."""
        tokens = rows * len(self.backbone.token_names) or tokens
        entries = sum(tokens if pool == "tokens" else rows for pool in self.pools)
        return entries * len(self.layers) * self.backbone.width

    def _name(self, pool: Pool, number: int) -> str:
        alone = len(self.pools) * len(self.layers) == 1
        return "embedding" if alone else f"embedding_{pool}_{number}"

    def _pooled(self, pool: Pool, hidden_BLH: Tensor, mask_BL: Tensor) -> Tensor | Ragged:
        if pool == "tokens" and self.backbone.token_names:
            size = (len(mask_BL), len(self.backbone.token_names), hidden_BLH.shape[-1])
            return hidden_BLH[mask_BL].reshape(size)
        if pool == "tokens":
            return Ragged(hidden_BLH[mask_BL], mask_BL.sum(dim=1).tolist())
        if pool == "cls":
            position = self.backbone.cls_position
            assert position is not None
            return hidden_BLH[:, position]
        outside = ~mask_BL.unsqueeze(-1)
        # In float32: a bfloat16 sum over a thousand residues would lose most of its digits.
        hidden_BLH = hidden_BLH.float()
        if pool == "max":
            return hidden_BLH.masked_fill(outside, float("-inf")).amax(dim=1)
        # Filled, not multiplied: what a model leaves in padding may be NaN.
        return hidden_BLH.masked_fill(outside, 0).sum(dim=1) / mask_BL.sum(dim=1, keepdim=True)
