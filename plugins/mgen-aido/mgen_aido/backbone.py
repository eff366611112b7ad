"""`rnabert` and `fm4bio` as backbones: published names to parameters, rows to activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mgen_core import Activations, BackboneCard, Inputs, Want, WeightsError
from mgen_core.packed import unpacked

from .config import Config, Family, parse
from .encoder import Encoder, Form
from .geometry import GEOMETRY
from .options import EncoderOptions
from .sequences import Sequences

# Where encoder names begin: published files, bare encoders, ModelGenerator's fine-tuned ones.
PREFIXES = ("bert.", "", "backbone.encoder.")

# Our names of modules, and the published names of what they are made of.
OUTER = {
    "embeddings.words": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.structure": "embeddings.str_embeddings",
    "norm": "encoder.ln",
}
HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
    "head": "output_embed",
}
LAYER: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("attention.ln",),
    "attention.query": ("attention.self.query",),
    "attention.key": ("attention.self.key",),
    "attention.value": ("attention.self.value",),
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "mlp_norm": ("ln",),
    "mlp.router": ("mlp.router",),
}

# Tables that older versions stored, and copies of tied weights.
UNUSED = (r".*\binv_freq", r".*\bposition_ids", r"cls\.predictions\.decoder\.bias")
COPIES = (r"cls\.predictions\.decoder\.weight", r"output_embed\.weight")
HEADS = (r"cls\..*", r"output_embed\..*")


class EncoderBackbone(Sequences):
    """An encoder of one family, with the weights and config of one model."""

    units = ("Block",)
    keep_float32 = (r"blocks\.\d+\.mlp\.router_weight",)

    def __init__(self, card: BackboneCard, options: EncoderOptions, family: Family) -> None:
        super().__init__(card, options, family.vocabulary)
        self.family = family
        # Random parameters are drawn by name: joined ones would be others.
        self.fuse = options.fuse and options.weights is not None
        self.eager = options.pads or (family.eager and options.tokens == "reference")
        self.plain = self.eager
        self.config = self.read_config(card, options)
        self.depth: int | None = self.config.depth if self.config else None
        self.vocabulary = family.vocabulary.tokens
        self.cls_position = 0 if family.vocabulary.before else None
        if self.config is not None:
            self._adopt(self.config)

    def read_config(self, card: BackboneCard, options: EncoderOptions) -> Config | None:
        """From the weights; else as published; None where only the weights would tell."""
        if options.weights is not None:
            return parse(options.config(), self.family)
        return parse(GEOMETRY[card.name], self.family) if card.name in GEOMETRY else None

    def _adopt(self, config: Config) -> None:
        self.vocabulary = output_names(config)
        if config.positions == "absolute":
            self.max_positions = config.max_positions
        if (self.card.weights and self.card.max_tokens is None) or self.max_positions:
            most = min(config.max_positions, self.card.max_tokens or config.max_positions)
            self.card = replace(self.card, max_tokens=most)

    @property
    def known(self) -> Config:
        """The config. Raises `WeightsError` where only the weights would tell."""
        if self.config is None:
            raise WeightsError(
                f"the sizes of {self.card.name} are in the config.json of its weights",
                "give --weights FOLDER",
            )
        return self.config

    @property
    def width(self) -> int:
        return self.card.width if self.config is None and self.card.width else self.known.width

    # -- with weights ----------------------------------------------------------------------

    def build(self) -> nn.Module:
        copies = COPIES if self.known.tied else ()
        self.ignored = UNUSED + (copies if self.want.logits else HEADS)
        return Encoder(self.known, Form(self.fuse, self.eager, self.want.logits))

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        stem, kind = name.replace("_weight", ".weight").replace("_bias", ".bias").rsplit(".", 1)
        prefix = next((p for p in PREFIXES if f"{p}{OUTER['norm']}.weight" in keys), PREFIXES[0])
        if stem in HEAD:
            return (self._head_key(stem, kind, prefix),)
        if stem in OUTER:
            return (f"{prefix}{OUTER[stem]}.{kind}",)
        _, number, part = stem.split(".", 2)
        published = {**LAYER, **self.family.projections}[part]
        if self.known.experts and part in self.family.projections:
            published = tuple(f"{one}_{e}" for e in range(self.known.experts) for one in published)
        return [f"{prefix}encoder.layer.{number}.{one}.{kind}" for one in published]

    def _head_key(self, stem: str, kind: str, prefix: str) -> str:
        if stem == "head.decoder" and kind == "bias":
            return "cls.predictions.bias"
        if self.known.tied and stem in ("head.decoder", "head"):
            return f"{prefix}{OUTER['embeddings.words']}.weight"
        return f"{HEAD[stem]}.{kind}"

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        streams, logits = module(inputs, want.layers, want.logits)
        return unpacked(inputs, streams, logits)


def output_names(config: Config) -> tuple[str, ...]:
    """Names of the logits: tokens, "" for ids without one; numbers for another vocabulary."""
    if config.outputs != config.vocabulary and not config.lm_head:
        return tuple(str(number) for number in range(config.outputs))
    tokens = config.family.vocabulary.tokens
    return tokens + ("",) * (config.vocabulary - len(tokens))
