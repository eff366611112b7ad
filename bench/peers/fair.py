"""Mean embeddings with fair-esm, after its `esm-extract`: 4,096 tokens a batch, a file a row.

`python fair.py MODEL FASTA OUTPUT`

The model is built here, since published files hold a Python object that torch reads no more.
"""

import json
import sys
from pathlib import Path

import torch
from esm import ESM2, Alphabet, FastaBatchedDataset

model_folder, fasta, output = sys.argv[1:]
sizes = json.loads(Path(model_folder, "config.json").read_text())
alphabet = Alphabet.from_architecture("ESM-1b")
layers = sizes["num_hidden_layers"]
model = ESM2(layers, sizes["hidden_size"], sizes["num_attention_heads"], alphabet)
model.load_state_dict(torch.load(Path(model_folder, "fair.pt")))
model.eval()

dataset = FastaBatchedDataset.from_file(fasta)
batches = dataset.get_batch_indices(4096, extra_toks_per_seq=1)
loader = torch.utils.data.DataLoader(
    dataset, collate_fn=alphabet.get_batch_converter(1022), batch_sampler=batches
)
with torch.no_grad():
    for labels, letters, tokens in loader:
        out = model(tokens, repr_layers=[layers], return_contacts=False)
        hidden = out["representations"][layers]
        for place, label in enumerate(labels):
            residues = min(1022, len(letters[place]))
            mean = hidden[place, 1 : residues + 1].mean(0).clone()
            result = {"label": label, "mean_representations": {layers: mean}}
            torch.save(result, Path(output, f"{label}.pt"))
