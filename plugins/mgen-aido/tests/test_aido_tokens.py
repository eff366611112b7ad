"""What is read as what, and what is set aside."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_aido.tokens import NUCLEOTIDES, PROTEINS, ReferenceTokens, Vocabulary, read_as

from mgen_core import Row, RowError

VOCABULARIES = {"nucleotides": NUCLEOTIDES, "proteins": PROTEINS}
# Fragments of bracketed names, gaps, chains, spaces of several kinds, letters outside Latin-1.
PIECES = st.sampled_from(
    [*"ACGTUNacgtLMKXBJ-.*|[]<>/1 \t\n\xa0Ωé", "[MASK]", "[MASK", "[CLS]", "<cdr1>", "</cdr", "||"]
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)


def slow_tokens(text: str, vocabulary: Vocabulary) -> list[int]:
    """The rules, one position after another."""
    found: list[int] = []
    run = ""

    def close() -> None:
        nonlocal run
        if run == "|" and vocabulary.chain:
            found.append(vocabulary.tokens.index("[SEP]"))
        elif run:
            assert vocabulary.unknown is not None
            found.append(vocabulary.unknown)
        run = ""

    at = 0
    while at < len(text):
        fitting = [token for token in vocabulary.tokens if text.startswith(token, at)]
        if fitting:
            close()
            longest = max(fitting, key=len)
            found.append(vocabulary.tokens.index(longest))
            at += len(longest)
            continue
        if text[at].isspace():
            close()
        else:
            run += text[at]
        at += 1
    close()
    return found


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(deadline=None)
@given(text=TEXTS)
def test_reference_reads_as_the_rules_say(kind: str, text: str) -> None:
    tokens = ReferenceTokens(VOCABULARIES[kind])
    assert list(tokens.encode(text)) == slow_tokens(text, VOCABULARIES[kind])


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(deadline=None)
@given(text=TEXTS, room=st.integers(0, 40))
def test_a_cut_text_keeps_its_first_tokens(kind: str, text: str, room: int) -> None:
    tokens = ReferenceTokens(VOCABULARIES[kind])
    assert tokens.encode(tokens.cut(text, room)) == tokens.encode(text)[:room]


@pytest.mark.parametrize(
    ("kind", "text", "cleaned", "note"),
    [
        ("nucleotides", "acgu", "ACGT", "U read as T"),
        ("nucleotides", "ACRYG", "ACNNG", "ambiguity codes read as N"),
        ("nucleotides", " ACGT\n", "ACGT", None),
        ("proteins", "mkvj", "MKVX", "J read as X"),
        ("proteins", "MKV*", "MKV", "trailing '*' dropped"),
        ("proteins", "XBUZO", "XBUZO", None),
    ],
)
def test_clean_reads_what_people_write(
    kind: str, text: str, cleaned: str, note: str | None
) -> None:
    tokens = read_as(VOCABULARIES[kind], "clean")
    assert tokens.clean(text) == cleaned
    assert tokens.note(text, cleaned) == note
    assert tokens.encode(cleaned) == bytes(VOCABULARIES[kind].tokens.index(c) for c in cleaned)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("aido_dna_dummy", "AC-GT", "illegal character '-' at position 3"),
        ("aido_dna_dummy", "AC[MASK]", "illegal character '[' at position 3"),
        ("aido_protein_dummy", "MK-V", "illegal character '-' at position 3"),
        ("aido_protein_dummy", "MK*V", "illegal character '*' at position 3"),
        ("aido_protein_dummy", "", "empty sequence"),
        ("aido_protein_dummy", None, "no sequence"),
        ("aido_protein_dummy", 7, "not a sequence: 7"),
        ("dna_onehot", "ACXG", "illegal character 'X' at position 3"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(
    name: str, text: Any, reason: str, open_model: Any
) -> None:
    with pytest.raises(RowError) as caught:
        open_model(name).backbone.prepare(Row(0, "", text))
    assert str(caught.value) == reason


@pytest.mark.parametrize("text", ["", " \t", None])
def test_reference_sets_empty_rows_aside_too(text: Any, open_model: Any) -> None:
    backbone = open_model("aido_dna_dummy", tokens="reference").backbone
    with pytest.raises(RowError):
        backbone.prepare(Row(0, "", text))


def test_a_protein_given_to_a_dna_model_is_named(open_model: Any) -> None:
    backbone = open_model("aido_dna_dummy").backbone
    with pytest.raises(RowError, match="a protein, where aido_dna_dummy takes DNA: illegal"):
        backbone.prepare(Row(0, "", "MKVLAAGIVGLCAKAYLEHPKE"))


def test_onehot_fails_where_the_reference_has_no_word(open_model: Any) -> None:
    backbone = open_model("dna_onehot", tokens="reference").backbone
    for text in ("ACGTx", "acgt", "AC-G"):
        with pytest.raises(RowError, match="not in the vocabulary"):
            backbone.prepare(Row(0, "", text))


@pytest.mark.parametrize("name", ["aido_dna_dummy", "aido_protein_dummy", "dna_onehot"])
@pytest.mark.parametrize("tokens", ["clean", "reference"])
def test_truncation_keeps_the_special_tokens(name: str, tokens: Any, open_model: Any) -> None:
    backbone = open_model(name, tokens=tokens).backbone
    row = backbone.prepare(Row(0, "", "ACGTACGTACGT"))
    cut = backbone.truncate(row, 8)
    assert backbone.measure(cut) == 8
    whole, short = backbone.collate([row]), backbone.collate([cut])
    specials = backbone.measure(row) - 12
    assert int(short["mask"].sum()) == 8 - specials
    assert short["tokens"][-1] == whole["tokens"][-1] and len(short["tokens"]) == 8
    with pytest.raises(RowError):
        backbone.truncate(row, specials)
