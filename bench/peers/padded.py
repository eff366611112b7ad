"""Mean embeddings as most scripts make them: 32 neighbours at a time, padded, in input order.

`python padded.py MODEL FASTA OUTPUT`
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, EsmModel

model_folder, fasta, output = sys.argv[1:]
sequences = Path(fasta).read_text().split("\n")[1::2]
tokenizer = AutoTokenizer.from_pretrained(model_folder)
model = EsmModel.from_pretrained(model_folder, add_pooling_layer=False).eval()
found = []
for start in range(0, len(sequences), 32):
    inputs = tokenizer(
        sequences[start : start + 32],
        padding=True,
        truncation=True,
        max_length=1024,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    special = inputs.pop("special_tokens_mask")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    real = (1 - special).unsqueeze(-1)
    found.append((hidden * real).sum(1) / real.sum(1))
np.save(Path(output, "embeddings.npy"), torch.cat(found).numpy())
