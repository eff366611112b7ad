"""config.json of a GenBio cell model, checked: what we cannot compute is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mgen_core import WeightsError

DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
    "hidden_act": "swiglu",
    "normalization_type": "RMSNorm",
    "layer_norm_eps": 1e-5,
    "add_linear_bias": True,
    "position_embedding_type": "absolute",
    "bin_num": 100,
    "bin_alpha": 1.0,
    "pad_token_id": -2,
    "mask_token_id": -1,
}

TURNED = "cellspatialfoundation"  # of two axes of rotary positions


@dataclass(frozen=True)
class Config:
    """Sizes and switches of one model.

    - `bins`, `alpha`: vectors that a value is mixed of, and how much of its scores is kept.
    - `masked`, `padding`: values that stand for a hidden gene and for none.
    """

    width: int
    depth: int
    heads: int
    inner: int
    genes: int
    rms: bool
    eps: float
    bias: bool
    bins: int
    alpha: float
    masked: float
    padding: float


def parse(fields: Mapping[str, Any], model_type: str) -> Config:
    """The config of a model. Raises `WeightsError` naming the field that is not supported."""
    read = _Reader({"model_type": model_type, **DEFAULTS, **fields})
    read.choice("model_type", (model_type,))
    read.choice("hidden_act", ("swiglu",))
    read.choice("position_embedding_type", ("absolute",))
    width, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if width % heads:
        read.reject("num_attention_heads", f"it must divide hidden_size, {width}")
    if model_type == TURNED and width // heads % 4:
        read.reject("num_attention_heads", "features of a head must be a multiple of 4 to turn")
    return Config(
        width=width,
        depth=read.size("num_hidden_layers"),
        heads=heads,
        inner=read.size("intermediate_size"),
        genes=read.size("max_position_embeddings"),
        rms=read.choice("normalization_type", ("RMSNorm", "LayerNorm")) == "RMSNorm",
        eps=read.number("layer_norm_eps"),
        bias=read.choice("add_linear_bias", (True, False)),
        bins=read.size("bin_num"),
        alpha=read.number("bin_alpha"),
        masked=read.number("mask_token_id"),
        padding=read.number("pad_token_id"),
    )


class _Reader:
    """Fields by name and type; whatever does not fit is a `WeightsError`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def reject(self, name: str, why: str) -> NoReturn:
        raise WeightsError(
            f"config.json: {name} is {self.fields[name]!r:.60}, which is not supported ({why})",
            "check that --backbone is the model that these weights belong to",
        )

    def choice(self, name: str, known: tuple[Any, ...]) -> Any:
        if self.fields[name] not in known:
            self.reject(name, f"known: {', '.join(map(str, known))}")
        return self.fields[name]

    def number(self, name: str) -> float:
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.reject(name, "not a number")
        return float(value)

    def size(self, name: str) -> int:
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.reject(name, "not a whole number above 0")
        return int(value)
