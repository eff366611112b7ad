"""ESM2 (Lin et al. 2023, doi 10.1126/science.ade2574), from the files published on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgen_core.dense import activated
from mgen_core.packed import Spans
from mgen_core.rotary import Rotation

from .esm import LETTERS, SPECIAL, Encoder, EsmBackbone, EsmConfig, Rotary, attend

# In training 15 % of the tokens were picked and 80 % of those zeroed, so embeddings are scaled
# to keep their mean. The factor depends on the mask tokens of an input, and there are none here.
TOKEN_DROPOUT = 1 - 0.15 * 0.8

# Names here -> published names, below `encoder.layer.N`.
LAYER = {
    "attention_norm": "attention.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "ffn_norm": "LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}
OUTSIDE = {
    "embed.weight": "embeddings.word_embeddings.weight",
    "embed_norm.weight": "embeddings.layer_norm.weight",
    "embed_norm.bias": "embeddings.layer_norm.bias",
    "norm.weight": "encoder.emb_layer_norm_after.weight",
    "norm.bias": "encoder.emb_layer_norm_after.bias",
}

DEPTHS = {320: 6, 480: 12, 640: 30, 1280: 33, 2560: 36, 5120: 48}
ACCEPTED = {
    "model_type": ("esm",),
    "vocab_size": (33,),
    "position_embedding_type": ("rotary",),
    "is_folding_model": (False, None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


@dataclass(frozen=True)
class Esm2Config(EsmConfig):
    layer_norm_eps: float = 1e-12
    rope_theta: float = 10_000.0
    token_dropout: bool | None = False
    emb_layer_norm_before: bool | None = False
    tie_word_embeddings: bool = True

    accepted = ACCEPTED


class Esm2Layer(nn.Module):
    def __init__(self, config: Esm2Config) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor, turn: Rotation, spans: Spans) -> Tensor:
        """(T, H) to (T, H)."""
        x = self.attention_norm(hidden)
        qkv = self.query(x), self.key(x), self.value(x)
        hidden = self.output(attend(qkv, self.heads, turn, spans)).add_(hidden)
        inner = activated(self.up, self.ffn_norm(hidden), "gelu")
        found: Tensor = self.down(inner).add_(hidden)
        return found


class Esm2Head(nn.Module):
    """Hidden state to logits of the 33 tokens."""

    def __init__(self, config: Esm2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, 33, bias=False)
        self.bias = nn.Parameter(torch.zeros(33))

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.layer_norm(activated(self.dense, hidden, "gelu")))
        return logits + self.bias


class Esm2Encoder(Encoder):
    def __init__(self, config: Esm2Config, *, logits: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.scale = TOKEN_DROPOUT if config.token_dropout else 1.0
        self.embed = nn.Embedding(33, width)
        self.embed_norm = nn.LayerNorm(width, eps) if config.emb_layer_norm_before else None
        self.rotary = Rotary(width // config.num_attention_heads, config.rope_theta)
        self.layers = nn.ModuleList(Esm2Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps)
        self.head = None
        if logits:
            self.head = Esm2Head(config)
            if config.tie_word_embeddings:
                self.head.decoder.weight = self.embed.weight

    def start(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed(tokens).mul_(self.scale)
        return self.embed_norm(hidden) if self.embed_norm else hidden


class Esm2(EsmBackbone):
    config: Esm2Config
    kind = Esm2Config
    depths = DEPTHS
    vocabulary = (*SPECIAL, *LETTERS, ".", "-", "<null_1>", "<mask>")
    units = ("Esm2Layer",)
    ignored = (
        r"(esm\.)?contact_head\..*",
        r"(esm\.)?pooler\..*",
        r"(esm\.)?embeddings\.position_(ids|embeddings\.weight)",
        r"(esm\.)?(encoder\.layer\.\d+\.attention\.self\.)?rotary_embeddings\.inv_freq",
        r"(lm_head|classifier)\..*",
    )

    def build(self) -> nn.Module:
        return Esm2Encoder(self.config, logits=self.want.logits)

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        prefix = "esm." if "esm.embeddings.word_embeddings.weight" in keys else ""
        if name == "rotary.inv_freq":
            # The models were trained with these numbers rounded to float16, and only the files
            # know that: computed afresh, distant residues would see each other elsewhere.
            stored = [key for key in keys if key.endswith("rotary_embeddings.inv_freq")]
            return stored[:1]
        if name in OUTSIDE:
            return (prefix + OUTSIDE[name],)
        if name.startswith("head."):
            return ("lm_head" + name.removeprefix("head"),)
        _, number, part, kind = name.split(".")
        return (f"{prefix}encoder.layer.{number}.{LAYER[part]}.{kind}",)
