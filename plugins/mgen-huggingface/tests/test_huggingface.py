"""The `huggingface` backbone: tiny encoders of several families, loaded as transformers does."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import BERT_VOCABULARY, bert_folder, esm2_folder
from mgen_huggingface import plugin
from safetensors.torch import load_file, save_file

from mgen_core import Backbone, Row, RowError, Want, WeightsError
from mgen_core.checkpoint import open_checkpoint
from mgen_core.config import checked
from mgen_core.testing import check_invariance, check_measure, sample_rows
from mgen_core.weights import fill, parameters_on_meta

CARD = next(card for card in plugin.mgen_backbones() if card.name == "huggingface")
TINY: dict[str, Any] = {
    "vocab_size": len(BERT_VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def write_bert_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def saved(folder: Path, model: Any) -> Path:
    """A folder that transformers writes, with the tokenizer of a BERT over amino acids."""
    model.save_pretrained(folder)
    write_bert_vocabulary(folder)
    return folder


def bert(folder: Path) -> Path:
    return bert_folder(folder)


def esm(folder: Path) -> Path:
    return esm2_folder(folder)


def distilbert(folder: Path) -> Path:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    config = transformers.DistilBertConfig(vocab_size=TINY["vocab_size"], **sizes)
    return saved(folder, transformers.DistilBertForMaskedLM(config))


def roberta(folder: Path) -> Path:
    config = transformers.RobertaConfig(**TINY, pad_token_id=0, max_position_embeddings=60)
    return saved(folder, transformers.RobertaForMaskedLM(config))


def electra(folder: Path) -> Path:
    config = transformers.ElectraConfig(**TINY, embedding_size=16)
    return saved(folder, transformers.ElectraForMaskedLM(config))


def t5(folder: Path) -> Path:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=TINY["vocab_size"], **sizes, pad_token_id=0)
    return saved(folder, transformers.T5ForConditionalGeneration(config))


FAMILIES = [bert, esm, distilbert, roberta, electra, t5]
MASKED = [bert, esm, distilbert, roberta, electra]


def opened(folder: Path, **options: Any) -> Backbone:
    return CARD.load(CARD, plugin.AutoOptions(weights=folder, **options))


def loaded(folder: Path, want: Want) -> tuple[Backbone, torch.nn.Module]:
    backbone = opened(folder)
    backbone.want = want
    with parameters_on_meta():
        module = backbone.build()
    cpu = torch.device("cpu")
    fill(module, backbone, open_checkpoint(folder), dtype=torch.float32, device=cpu)
    return backbone, module


def rows(*lengths: int) -> list[Row]:
    draw = random.Random(1)
    letters = "ACDEFGHIKLMNPQRSTVWY"
    return [Row(n, str(n), "".join(draw.choices(letters, k=k))) for n, k in enumerate(lengths)]


def assert_equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], seen: Any) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_transformers(tmp_path: Path, family: Callable[[Path], Path]) -> None:
    folder = family(tmp_path)
    auto = transformers.AutoModelForTextEncoding if family is t5 else transformers.AutoModel
    theirs = auto.from_pretrained(folder).eval()
    for layers in ((2,), (0, 1, 2)):
        want = Want(layers=layers)
        backbone, module = loaded(folder, want)
        inputs = backbone.collate([backbone.prepare(row) for row in rows(33, 9, 20)])
        found = backbone.forward(module, inputs, want)
        expected = theirs(**inputs["model"], output_hidden_states=True).hidden_states
        seen = inputs["model"]["attention_mask"].bool()
        assert_equal([found.layer(n) for n in layers], [expected[n] for n in layers], seen)


@torch.inference_mode()
@pytest.mark.parametrize("family", MASKED)
def test_logits_are_those_of_transformers(tmp_path: Path, family: Callable[[Path], Path]) -> None:
    folder = family(tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    want = Want(layers=(2,), logits=True)
    backbone, module = loaded(folder, want)
    inputs = backbone.collate([backbone.prepare(row) for row in rows(33, 9, 20)])
    found = backbone.forward(module, inputs, want)
    expected = theirs(**inputs["model"], output_hidden_states=True)
    assert found.logits is not None
    assert found.logits.shape[2] == len(backbone.vocabulary)
    seen = inputs["model"]["attention_mask"].bool()
    theirs_all = [expected.logits, expected.hidden_states[2]]
    assert_equal([found.logits, found.layer(2)], theirs_all, seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_padding_and_order_change_nothing(
    tmp_path: Path, family: Callable[[Path], Path]
) -> None:
    backbone = opened(family(tmp_path))
    if family is t5:
        backbone.vocabulary = ()  # no masked-language head
    prepared = [backbone.prepare(row) for row in sample_rows("protein") if len(row.data) < 58]
    check_measure(backbone, prepared)
    check_invariance(backbone, prepared, tolerance=1e-5)


def test_token_numbers(tmp_path: Path) -> None:
    backbone = opened(bert(tmp_path))
    (row,) = [Row(0, "a", "MKX")]
    number = BERT_VOCABULARY.index
    expected = [number(token) for token in ("[CLS]", "M", "K", "X", "[SEP]")]
    inputs = backbone.collate([row, Row(1, "b", "M")])
    assert inputs["model"]["input_ids"].tolist()[0] == expected
    assert inputs["residues"].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert list(backbone.vocabulary) == BERT_VOCABULARY
    assert backbone.measure(row) == 5
    assert backbone.cls_position == 0


def test_tokens_without_letters_of_their_own(tmp_path: Path) -> None:
    """Byte pairs: fewer tokens than letters, so cutting letters is not cutting tokens."""
    folder = saved(tmp_path, transformers.BertModel(transformers.BertConfig(**TINY)))
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    pairs_of_letters(folder, "ACGT")
    backbone = opened(folder)
    row = backbone.prepare(Row(0, "a", "acgacgacgacg"))
    assert row.data == "ACGACGACGACG"
    whole = backbone.measure(row)
    assert 2 < whole < len(row.data)
    for tokens in range(2, whole + 1):
        cut = backbone.truncate(row, tokens)
        assert backbone.measure(cut) <= tokens
        assert row.data.startswith(cut.data)
    assert backbone.truncate(row, whole) == row


def pairs_of_letters(folder: Path, letters: str) -> None:
    from tokenizers import Tokenizer, models, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, "AC", "GA", "GAC", "ACGA"]
    merges = [("A", "C"), ("G", "A"), ("GA", "C"), ("AC", "GA")]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="[UNK]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("MKJV", "illegal character 'J' at position 3"),
        ("MK*V", "illegal character '*' at position 3"),
        ("MK1**", "illegal character '1' at position 3"),
        ("", "empty sequence"),
        (" *", "empty sequence"),
        (None, "no sequence"),
    ],
)
def test_what_is_set_aside(tmp_path: Path, given: str | None, reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        opened(bert(tmp_path)).prepare(Row(0, "a", given))


def test_a_trailing_stop_is_dropped_and_said(tmp_path: Path) -> None:
    backbone = opened(bert(tmp_path))
    row = Row(0, "a", "MKV*")
    assert backbone.prepare(row).data == "MKV"
    assert backbone.note(row, backbone.prepare(row)) == "trailing '*' dropped"


def test_how_letters_are_written_can_be_said(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    for given in ("mkv", "MKV", "M K V"):
        assert opened(folder).prepare(Row(0, "a", given)).data == "MKV"
    with pytest.raises(RowError, match="in an order"):  # a word, not letters
        opened(folder, spaces=False).prepare(Row(0, "a", "MKV"))
    with pytest.raises(RowError, match="illegal character 'm' at position 1"):
        opened(folder, upper=False).prepare(Row(0, "a", "mkv"))


@pytest.mark.parametrize(("family", "most"), [(bert, 512), (roberta, 59), (esm, None), (t5, None)])
def test_longest_input(tmp_path: Path, family: Callable[[Path], Path], most: int | None) -> None:
    backbone = opened(family(tmp_path))
    assert backbone.max_positions == backbone.card.max_tokens == most
    if most:
        backbone, module = loaded(tmp_path, Want(layers=(2,)))
        inputs = backbone.collate(rows(most - 2))
        with torch.inference_mode():
            backbone.forward(module, inputs, Want(layers=(2,)))


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    file = folder / "model.safetensors"
    new = load_file(file)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in new.items()
    }
    assert old.keys() != new.keys()
    save_file(old, file)
    want = Want(layers=(2,))
    _, module = loaded(folder, want)
    torch.testing.assert_close(
        module.get_parameter("embeddings.LayerNorm.weight"), new["bert.embeddings.LayerNorm.weight"]
    )


def test_rotary_frequencies_come_from_the_file(tmp_path: Path) -> None:
    _, module = loaded(esm(tmp_path), Want(layers=(2,)))
    found = module.get_buffer("rotary_embeddings.inv_freq")
    assert torch.equal(found, found.half().float())


def test_a_layer_too_many_in_the_file_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"unexpected \(bert\.encoder\.layer\.1"):
        loaded(folder, Want(layers=(1,)))


@pytest.mark.parametrize("lost", ["vocab.txt", "half"])
def test_a_folder_without_its_vocabulary_is_refused(tmp_path: Path, lost: str) -> None:
    folder = bert(tmp_path)
    if lost == "half":
        (folder / "vocab.txt").write_text("\n".join([*BERT_VOCABULARY, "A A"]))
    else:
        (folder / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "never_heard_of"}, "never_heard_of"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "mine"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"model_type": "convbert"}, "other rows"),
        ({"model_type": "big_bird"}, "other rows"),
        ({"model_type": "bart"}, "a decoder"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = bert(tmp_path)
    (folder / "mine.py").write_text("raise SystemExit('a checkpoint ran code')")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        opened(folder)


def test_a_config_cannot_choose_what_code_runs(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    (folder / "mine.py").write_text("raise SystemExit('a checkpoint ran code')")
    change = {
        "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"},
        "_attn_implementation_internal": "someone/kernels",
        "attn_implementation": "someone/kernels",
    }
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    _, module = loaded(folder, Want(layers=(2,)))
    assert type(module) is transformers.BertModel
    assert module.config._attn_implementation == "sdpa"


def test_collating_leaves_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    """Padding is a state of the tokenizer, which planning uses from another thread meanwhile."""
    backbone = opened(bert(tmp_path))
    backend = backbone.tokens._tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    batch = backbone.collate(rows(5, 9))["model"]["input_ids"]
    assert batch.shape == (2, 11)
    assert backend.padding is None and backend.truncation is None


def test_options_are_read_from_the_command_line() -> None:
    given = {"weights": None, "spaces": "false", "upper": "auto"}
    assert checked(plugin.AutoOptions, given) == plugin.AutoOptions(spaces=False)


def test_it_asks_for_weights() -> None:
    with pytest.raises(WeightsError) as caught:
        CARD.load(CARD, plugin.AutoOptions())
    assert "--weights" in caught.value.hint
