"""config.json of a GenBio sequence model, checked: what we cannot compute is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from mgen_core import WeightsError

from .tokens import Vocabulary

Fields = Mapping[str, Any]
Act = Literal["swiglu", "geglu"]


@dataclass(frozen=True)
class Family:
    """What sets `rnabert` and `fm4bio` apart.

    - `acts`, `positions`: values of `hidden_act` and `position_embedding_type` that it knows.
    - `defaults`: its config fields that differ from `DEFAULTS`.
    - `projections`: published name of each MLP projection.
    - `eager`: the reference computes attention step by step, not with a fused kernel.
    """

    model_type: str
    vocabulary: Vocabulary
    acts: tuple[str, ...]
    positions: tuple[str, ...]
    defaults: Fields
    projections: Mapping[str, tuple[str, ...]]
    eager: bool = False


CHECK = "check that --backbone is the model that these weights belong to"
# Where weights of the other family belong.
ELSEWHERE = {
    "rnabert": "these weights are of AIDO.RNA or AIDO.DNA: try --backbone aido_dna_300m",
    "fm4bio": "these weights are of AIDO.Protein: try --backbone aido_protein_16b",
}

DEFAULTS: Fields = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "swiglu",
    "layer_norm_eps": 1e-5,
    "add_linear_bias": True,
    "position_embedding_type": "rope",
    "normalization_type": "RMSNorm",
    "rotary_percent": 1.0,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "moe": False,
    "num_experts": 0,
    "experts_per_token": 0,
    "use_lm_head": True,
    "output_vocab_size": None,
    "str_embedding_in": None,
}


@dataclass(frozen=True)
class Config:
    """Sizes and switches of one model.

    - `turning`: features of a head (of each half of it, for rope_2d) that rotate; 0: none.
    - `experts`: 0 for a dense MLP.
    - `structure`: width of the structure embedding that the input may carry; 0: none.
    """

    family: Family
    width: int
    depth: int
    heads: int
    inner: int
    vocabulary: int
    max_positions: int
    act: Act
    eps: float
    bias: bool
    rms: bool
    positions: Literal["rope", "absolute", "rope_2d"]
    turning: int
    post_norm: bool
    experts: int
    experts_per_token: int
    lm_head: bool
    outputs: int
    tied: bool
    structure: int


def parse(fields: Fields, family: Family) -> Config:
    """The config of a model. Raises `WeightsError` naming the field that is not supported."""
    read = _Reader({**DEFAULTS, **family.defaults, **fields})
    if (found := fields.get("model_type", family.model_type)) != family.model_type:
        hint = ELSEWHERE.get(str(found), CHECK)
        read.reject("model_type", f"this backbone runs {family.model_type}", hint)
    read.choice("is_decoder", (False,))
    read.choice("add_cross_attention", (False,))
    width, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if width % heads:
        read.reject("num_attention_heads", f"it must divide hidden_size, {width}")
    positions = read.choice("position_embedding_type", family.positions)
    vocabulary = read.size("vocab_size")
    if vocabulary < len(family.vocabulary.tokens):
        read.reject("vocab_size", f"{family.model_type} has {len(family.vocabulary.tokens)} tokens")
    experts, chosen = _experts(read)
    tied = read.flag("tie_word_embeddings")
    return Config(
        family=family,
        width=width,
        depth=read.size("num_hidden_layers"),
        heads=heads,
        inner=read.size("intermediate_size"),
        vocabulary=vocabulary,
        max_positions=read.size("max_position_embeddings"),
        act=read.choice("hidden_act", family.acts),
        eps=read.number("layer_norm_eps"),
        bias=read.flag("add_linear_bias"),
        rms=read.choice("normalization_type", ("RMSNorm", "LayerNorm")) == "RMSNorm",
        positions=positions,
        turning=_turning(read, positions, width // heads),
        post_norm=read.flag("apply_residual_connection_post_layernorm"),
        experts=experts,
        experts_per_token=chosen,
        lm_head=read.flag("use_lm_head"),
        outputs=vocabulary if tied else read.size("output_vocab_size", default=vocabulary),
        tied=tied,
        structure=read.size("str_embedding_in", default=0),
    )


def _experts(read: _Reader) -> tuple[int, int]:
    if not read.flag("moe"):
        return 0, 0
    experts, chosen = read.size("num_experts"), read.size("experts_per_token")
    if experts < 2:
        read.reject("num_experts", "a mixture has two or more")
    if chosen > experts:
        read.reject("experts_per_token", f"there are {experts} experts")
    return experts, chosen


def _turning(read: _Reader, positions: str, head: int) -> int:
    if positions == "absolute":
        return 0
    percent = read.number("rotary_percent")
    turning = int((head // 2 if positions == "rope_2d" else head) * min(percent, 1.0))
    if turning < 2 or turning % 2:
        read.reject("rotary_percent", f"{turning} features of a head would rotate, not pairs")
    return turning


class _Reader:
    """Fields by name and type; whatever does not fit is a `WeightsError`."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def reject(self, name: str, why: str, hint: str = CHECK) -> NoReturn:
        value = self.fields[name]
        raise WeightsError(
            f"config.json: {name} is {value!r}, which is not supported ({why})", hint
        )

    def choice(self, name: str, known: tuple[Any, ...]) -> Any:
        if self.fields[name] not in known:
            self.reject(name, f"known: {', '.join(map(str, known))}")
        return self.fields[name]

    def flag(self, name: str) -> bool:
        if not isinstance(self.fields[name], bool):
            self.reject(name, "not true or false")
        return bool(self.fields[name])

    def number(self, name: str) -> float:
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.reject(name, "not a number above 0")
        return float(value)

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0; with a default, null and 0 mean that. Strings of digits count."""
        value = self.fields[name]
        if default is not None and value in (None, 0, "0", ""):
            return default
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.reject(name, "not a whole number above 0")
        return int(value)
