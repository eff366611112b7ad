"""Mean embeddings from transformers' feature-extraction pipeline, 8 rows a batch as in its guide.

`python pipeline.py MODEL FASTA OUTPUT`

What it gives for a row has special tokens and padding in it, which the length tells apart.
"""

import sys
from pathlib import Path

import numpy as np
from transformers import pipeline

model_folder, fasta, output = sys.argv[1:]
sequences = Path(fasta).read_text().split("\n")[1::2]
extractor = pipeline("feature-extraction", model=model_folder, device="cpu")
features = extractor(
    (letters for letters in sequences),
    batch_size=8,
    return_tensors=True,
    tokenize_kwargs={"truncation": True, "max_length": 1024},
)
found = []
for letters, hidden in zip(sequences, features):
    residues = min(len(letters), 1022)
    found.append(hidden.squeeze(0)[1 : residues + 1].mean(0))
np.save(Path(output, "embeddings.npy"), np.stack(found))
