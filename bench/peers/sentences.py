"""Mean embeddings from sentence-transformers: `encode` of a transformer and a mean pool.

`python sentences.py MODEL FASTA OUTPUT [residues]`

Its mean has the special tokens in it. With `residues` the vectors of the tokens are asked for
instead, and those of the residues averaged here: to compare numbers, not times.
"""

import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

model_folder, fasta, output, *residues = sys.argv[1:]
sequences = Path(fasta).read_text().split("\n")[1::2]
words = Transformer(model_folder)
words.max_seq_length = 1024
model = SentenceTransformer(
    modules=[words, Pooling(words.get_embedding_dimension(), "mean")], device="cpu"
)
if residues:
    tokens = model.encode(sequences, output_value="token_embeddings")
    found = np.stack([vectors[1:-1].mean(0) for vectors in tokens])
else:
    found = model.encode(sequences)
np.save(Path(output, "embeddings.npy"), found)
