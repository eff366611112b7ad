"""Weights folders with random numbers, in the layouts that published models really have.

`python tests/layouts.py esm2 FOLDER --size 8m` makes one by hand, with the true geometry.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded")

ESM2_SIZES = {  # layers, hidden size, heads; the MLP is four times as wide
    "8m": (6, 320, 20),
    "35m": (12, 480, 20),
    "150m": (30, 640, 20),
    "650m": (33, 1280, 20),
}
ESM2_VOCABULARY = [
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
]
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]

Shapes = dict[str, tuple[int, ...]]


def esm2_folder(
    path: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    layout: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    masked_lm: bool = True,
    **config: Any,
) -> Path:
    """A folder like those of facebook/esm2_*, or (not `masked_lm`) one saved from EsmModel.

    As published, it holds tensors that a rotary model does not use: position embeddings, position
    ids, and the rotary frequencies of every layer, here rounded to half precision so that a
    loader that computes them instead of reading them is found out.
    """
    settings: dict[str, Any] = {
        "architectures": ["EsmForMaskedLM" if masked_lm else "EsmModel"],
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "emb_layer_norm_before": False,
        "esmfold_config": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "is_folding_model": False,
        "layer_norm_eps": 1e-05,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.25.0.dev0",
        "use_cache": True,
        "vocab_list": None,
        "vocab_size": 33,
    } | config
    encoder = _drawn(_esm2_shapes(settings), seed)
    head = _drawn(_esm2_head_shapes(settings), seed + 1)
    width = settings["hidden_size"] // settings["num_attention_heads"]
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2) / width)
    for layer in range(settings["num_hidden_layers"]):
        key = f"encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        encoder[key] = frequencies.half().float()
    tensors = {name: value.to(dtype) for name, value in encoder.items()}
    positions = torch.arange(settings["max_position_embeddings"])
    tensors["embeddings.position_ids"] = positions.unsqueeze(0)
    if masked_lm:
        tensors = {f"esm.{name}": value for name, value in tensors.items()}
        tensors |= {f"lm_head.{name}": value.to(dtype) for name, value in head.items()}
        tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"]
    else:
        tensors["pooler.dense.weight"] = head["dense.weight"].to(dtype)
        tensors["pooler.dense.bias"] = head["dense.bias"].to(dtype)
    special = {name: f"<{name.removesuffix('_token')}>" for name in _special("cls", "eos")}
    _write_json(path / "config.json", settings)
    _write_tokenizer(path, ESM2_VOCABULARY, "EsmTokenizer", special)
    return write_layout(path, tensors, layout)


def bert_folder(
    path: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    layout: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A folder like that of a BERT over amino acids (BertForMaskedLM, with the unused pooler)."""
    settings: dict[str, Any] = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "type_vocab_size": 2,
        "vocab_size": len(BERT_VOCABULARY),
    } | config
    drawn = _drawn(_bert_shapes(settings), seed)
    tensors = {name: value.to(dtype) for name, value in drawn.items()}
    positions = torch.arange(settings["max_position_embeddings"])
    tensors["bert.embeddings.position_ids"] = positions.unsqueeze(0)
    words = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = words
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    special = {name: f"[{name.removesuffix('_token').upper()}]" for name in _special("cls", "sep")}
    _write_json(path / "config.json", settings)
    _write_tokenizer(path, BERT_VOCABULARY, "BertTokenizer", special | {"do_lower_case": False})
    return write_layout(path, tensors, layout)


def write_layout(folder: Path, state_dict: Mapping[str, Tensor], layout: str) -> Path:
    """Store a state dict in one of `LAYOUTS`; sharded means two files and an index.

    As in published files, `.bin` holds a tied tensor under each of its names, safetensors once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, sharded = layout.partition("-")
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    save: Callable[[dict[str, Tensor], Path], None] = torch.save
    tensors = dict(state_dict)
    if kind == "safetensors":
        tensors = _untied(tensors)
        save = _save_safetensors
    if not sharded:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    names = list(tensors)
    shard_of: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        shard_of |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    _write_json(folder / f"{stem}.{suffix}.index.json", index)
    return folder


def _save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr(), name)
    kept = set(first.values())
    return {name: tensor.contiguous() for name, tensor in tensors.items() if name in kept}


def _drawn(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random values under which a deep model stays alive: norms near 1, unit gain elsewhere."""
    random = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        if name.endswith("bias"):
            value *= 0.02
        elif len(shape) == 1:
            value = 1 + 0.05 * value
        else:
            value /= math.sqrt(shape[-1])
        values[name] = value
    return values


def _esm2_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        place = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{place}.attention.{part}", hidden, hidden)
        shapes |= _norm(f"{place}.attention.LayerNorm", hidden)
        shapes |= _linear(f"{place}.intermediate.dense", wide, hidden)
        shapes |= _linear(f"{place}.output.dense", hidden, wide)
        shapes |= _norm(f"{place}.LayerNorm", hidden)
    shapes |= _norm("encoder.emb_layer_norm_after", hidden)
    if config["emb_layer_norm_before"]:
        shapes |= _norm("embeddings.layer_norm", hidden)
    maps = config["num_hidden_layers"] * config["num_attention_heads"]
    return shapes | _linear("contact_head.regression", 1, maps)


def _esm2_head_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    shapes: Shapes = {"bias": (config["vocab_size"],)}
    return shapes | _linear("dense", hidden, hidden) | _norm("layer_norm", hidden)


def _bert_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    shapes |= _norm("bert.embeddings.LayerNorm", hidden)
    for layer in range(config["num_hidden_layers"]):
        place = f"bert.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{place}.attention.{part}", hidden, hidden)
        shapes |= _norm(f"{place}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{place}.intermediate.dense", wide, hidden)
        shapes |= _linear(f"{place}.output.dense", hidden, wide)
        shapes |= _norm(f"{place}.output.LayerNorm", hidden)
    shapes |= _linear("bert.pooler.dense", hidden, hidden)
    shapes |= {"cls.predictions.bias": (config["vocab_size"],)}
    shapes |= _linear("cls.predictions.transform.dense", hidden, hidden)
    return shapes | _norm("cls.predictions.transform.LayerNorm", hidden)


def _linear(name: str, wide: int, deep: int) -> Shapes:
    return {f"{name}.weight": (wide, deep), f"{name}.bias": (wide,)}


def _norm(name: str, wide: int) -> Shapes:
    return {f"{name}.weight": (wide,), f"{name}.bias": (wide,)}


def _special(*names: str) -> Iterable[str]:
    return (f"{name}_token" for name in (*names, "mask", "pad", "unk"))


def _write_tokenizer(
    folder: Path, vocabulary: Iterable[str], tokenizer: str, settings: dict[str, Any]
) -> None:
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    _write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": tokenizer})
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=["esm2"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=ESM2_SIZES, default="8m")
    parser.add_argument("--layout", choices=LAYOUTS, default="safetensors")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    layers, hidden, heads = ESM2_SIZES[asked.size]
    esm2_folder(
        asked.folder,
        hidden=hidden,
        layers=layers,
        heads=heads,
        layout=asked.layout,
        seed=asked.seed,
    )
    print(asked.folder)


if __name__ == "__main__":
    _main()
