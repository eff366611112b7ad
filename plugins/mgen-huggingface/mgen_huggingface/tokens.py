"""The tokenizer that a model's folder holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mgen_core import WeightsError

PROBE = "GAC"  # letters of the protein, DNA and RNA alphabets alike
MOST_SPARE = 128  # embeddings are often padded to a round number of tokens, never by more
MEND = "put the model's own tokenizer files (tokenizer.json or vocab.txt) beside config.json"


class Tokens:
    """Texts to token numbers.

    `names` are the tokens by number, `special` the numbers of those that stand for no part of a
    text, `unknown` what stands for letters that the tokenizer does not have.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._tokenizer = open_tokenizer(folder)
        self.names = token_names(self._tokenizer, size)
        self.unknown: int | None = self._tokenizer.unk_token_id
        residues = {self.unknown, self._tokenizer.mask_token_id}
        self.special = frozenset(self._tokenizer.all_special_ids) - residues

    def ids(self, text: str) -> list[int]:
        """Token numbers, special ones included."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def knows(self, letter: str) -> bool:
        """Whether it has a token for a single letter."""
        return self.unknown not in self.ids(letter)

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model's forward pass takes, each (B, L) and padded on the right."""
        # Not padded by the tokenizer: that changes its state, and planning uses it meanwhile.
        made = self._tokenizer(list(texts), return_attention_mask=True)
        fillers = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
        }
        longest = max(map(len, made["input_ids"]))
        return {
            name: torch.tensor(
                [line + [fillers.get(name, 0)] * (longest - len(line)) for line in lines]
            )
            for name, lines in made.items()
        }

    def residues(self, batch: dict[str, Tensor]) -> Tensor:
        """Where a batch holds neither padding nor special tokens, (B, L) bool."""
        special = torch.isin(batch["input_ids"], torch.tensor(sorted(self.special)))
        return batch["attention_mask"].bool() & ~special

    def wants_spaces(self) -> bool:
        """Whether it knows letters, but not when they are written together."""
        return self.unknown in self.ids(PROBE) and self.unknown not in self.ids(" ".join(PROBE))

    def lacks_lower_case(self) -> bool:
        """Whether no token is a lower case letter (with or without the mark of a word's edge)."""
        return not any(re.fullmatch("[▁Ġ]?[a-z]|##[a-z]", name) for name in self.names)

    def starts_with_special(self) -> bool:
        """Whether a special token comes first."""
        return self.ids(PROBE)[0] in self.special


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises `WeightsError` when it has none that can be used."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each kind of tokenizer fails in its own way
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"no usable tokenizer in {folder}: {reason}", MEND) from error
    if tokenizer.pad_token_id is None:
        raise WeightsError(f"the tokenizer in {folder} has no padding token", "name one there")
    tokenizer.model_max_length = int(1e30)  # the plan minds lengths; this would only warn
    return tokenizer


def token_names(tokenizer: Any, size: int) -> tuple[str, ...]:
    """The tokens by number, for a model that has `size` of them.

    Raises `WeightsError` when they do not fit: where vocabulary files are missing, transformers
    makes a tokenizer of nothing but special tokens.
    """
    numbers: dict[str, int] = tokenizer.get_vocab()
    spare = size - max(numbers.values()) - 1
    if not 0 <= spare < MOST_SPARE or not set(numbers) - set(tokenizer.all_special_tokens):
        raise WeightsError(f"the tokenizer knows {len(numbers)} tokens, the model {size}", MEND)
    names = [f"<spare_{number}>" for number in range(size)]
    for token, number in numbers.items():
        names[number] = token
    return tuple(names)
