"""Our names of parameters, and the published names of the tensors that they are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Where encoder names begin: published files, bare encoders, ModelGenerator's fine-tuned ones.
PREFIXES = ("bert.", "", "backbone.encoder.")

OUTER = {
    "values.score": "gene_embedding.linear1",
    "values.mix": "gene_embedding.linear2",
    "values.bins": "gene_embedding.lookup_table",
    "values.masked": "gene_embedding.mask_embedding",
    "values.padding": "gene_embedding.pad_embedding",
    "positions": "position_embedding",
    "norm": "encoder.ln",
}
HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
}
LAYER: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("attention.ln",),
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "mlp_norm": ("ln",),
    "mlp.up_gate": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down": ("mlp.down_proj",),
}

COPY = r"cls\.predictions\.decoder\.bias"  # of cls.predictions.bias
ALL_OF_HEAD = r"cls\..*"
TABLES = r".*\.rotary_emb\.inv_freq"  # computed anew


def published(name: str, keys: Collection[str]) -> list[str]:
    """The checkpoint's keys of one of our parameters, joined along dim 0."""
    stem, kind = name.replace("_weight", ".weight").rsplit(".", 1)
    if (stem, kind) == ("head.decoder", "bias"):
        return ["cls.predictions.bias"]
    if stem in HEAD:
        return [f"{HEAD[stem]}.{kind}"]
    prefix = next((p for p in PREFIXES if f"{p}{OUTER['norm']}.weight" in keys), PREFIXES[0])
    if stem in OUTER:
        return [f"{prefix}{OUTER[stem]}.{kind}"]
    _, number, part = stem.split(".", 2)
    return [f"{prefix}encoder.layer.{number}.{one}.{kind}" for one in LAYER[part]]
