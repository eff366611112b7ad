"""What one rank has found, all plan with."""

import json

from ranks.processes import run, sequences


def test_all_ranks_take_the_budget_of_the_first(tmp_path):
    data = sequences(tmp_path / "in.fasta", "dna", [400] * 500)
    words = ("embed", data, "--backbone", "aido_dna_dummy", "--batch-tokens", "auto")
    ended = run(*words, output=tmp_path / "run", devices=2)
    record = json.loads((tmp_path / "run/run.json").read_text())
    tokens = record["identity"]["batch_tokens"]
    assert f"batches   at most {tokens:,} tokens: " in ended.said
    assert "done      500 of 500 rows" in ended.said
    assert len(list((tmp_path / "run").glob("done/rank-*.jsonl"))) == 2
