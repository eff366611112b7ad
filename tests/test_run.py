"""A run leaves every row exactly once, goes on where it stopped, and refuses to mix runs."""

import dataclasses
import json
import random

import pytest
import toy

from mgen_core import InputError, MgenError, RunError
from mgen_core.config import make_config
from mgen_core.merge import Selection, read
from mgen_core.run import plan_only, run
from mgen_core.screen import Screen


def sequences(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("ACDEFGH", k=draw.randint(1, 60))) for _ in range(count)]


def config(data, output, **more):
    return make_config(
        {
            "task": "embed",
            "backbone": "toy",
            "data": (str(data),),
            "output": output,
            "batch_tokens": 256,
            **more,
        }
    )


def start(data, output, **more):
    return run(config(data, output, **more), toy.catalog(), Screen())


def merged(output, **more):
    return read(output, toy.catalog(), Selection(**more))


def test_every_row_comes_out_once_in_order_with_its_vector(tmp_path):
    texts = sequences(200)
    report = start(toy.write_csv(tmp_path / "in.csv", texts), tmp_path / "run")
    assert (report.rows, report.done, report.failed, report.missing_batches) == (200, 200, 0, 0)
    table = merged(tmp_path / "run")
    assert table.column_names == ["row", "id", "embedding"]
    assert table["row"].to_pylist() == list(range(200))
    assert table["id"].to_pylist() == [f"s{n % 7}" for n in range(200)]
    for vector, text in zip(table["embedding"].to_pylist(), texts):
        assert vector == pytest.approx(toy.mean_of(text), rel=1e-6)


def test_all_pools_and_layers_come_from_one_pass(tmp_path):
    texts = ["ACD", "A", "GGGGG"]
    start(
        toy.write_csv(tmp_path / "in.csv", texts),
        tmp_path / "run",
        options={"pool": ["mean", "max", "cls", "tokens"], "layers": [0, -1]},
    )
    table = merged(tmp_path / "run")
    assert len(table.column_names) == 2 + 8
    assert table["embedding_max_-1"].to_pylist()[0] == [ord("D"), 3.0, 1.0, 0.0]
    assert table["embedding_cls_-1"].to_pylist()[0] == [0.0, 0.0, 1.0, 0.0]
    assert table["embedding_mean_0"].to_pylist()[1] == [2 * v for v in toy.mean_of("A")]
    tokens = table["embedding_tokens_-1"].to_pylist()
    assert [len(rows) for rows in tokens] == [3, 1, 5]
    assert [vector[0] for vector in tokens[0]] == [ord(letter) for letter in "ACD"]


def test_bad_rows_are_told_and_carried_as_null_rows(tmp_path):
    texts = ["ACD", "", "AC!D", "A~C", "G" * 200, "GG"]
    report = start(toy.write_csv(tmp_path / "in.csv", texts), tmp_path / "run")
    assert (report.done, report.failed) == (2, 4)
    table = merged(tmp_path / "run")
    assert table["row"].to_pylist() == list(range(6))
    assert table["error"].to_pylist() == [
        None,
        "empty sequence",
        "illegal character '!' at position 3",
        "output is not finite in float32 (NaN or infinity)",
        "longer than 101 tokens: 201",
        None,
    ]
    assert [vector is None for vector in table["embedding"].to_pylist()] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    assert merged(tmp_path / "run", drop_failed=True)["row"].to_pylist() == [0, 5]
    lines = (tmp_path / "run/failed/plan.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert told[0] == {"row": 1, "id": "s1", "reason": "empty sequence"}


def test_truncation_happens_on_request_only(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["G" * 200, "AC"])
    start(data, tmp_path / "run", too_long="truncate")
    assert merged(tmp_path / "run")["embedding"].to_pylist()[0] == toy.mean_of("G" * 100)


def test_on_error_stop_leaves_nothing_behind(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["ACD", "A!"])
    with pytest.raises(RunError, match=r"row 1 \(id s1\): illegal character"):
        start(data, tmp_path / "run", on_error="stop")
    assert not (tmp_path / "run").exists()


def test_a_second_start_computes_nothing_again(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", sequences(50))
    start(data, tmp_path / "run")
    before = toy.done_lines(tmp_path / "run")
    start(data, tmp_path / "run")
    assert toy.done_lines(tmp_path / "run") == before


def test_a_lost_or_cut_part_and_a_torn_line_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mgen_core.parts.PART_BYTES", 0)  # a part a batch
    data = toy.write_csv(tmp_path / "in.csv", sequences(100))
    start(data, tmp_path / "run")
    whole = merged(tmp_path / "run")
    lines = toy.done_lines(tmp_path / "run")
    (tmp_path / "run" / lines[0]["file"]).unlink()
    cut = tmp_path / "run" / lines[1]["file"]
    cut.write_bytes(cut.read_bytes()[:-5])
    log = tmp_path / "run/done/rank-00000.jsonl"
    log.write_text(log.read_text()[:-20])
    with pytest.raises(RunError, match="3 of") as caught:
        merged(tmp_path / "run")
    assert "finish the run" in caught.value.hint
    report = start(data, tmp_path / "run")
    assert report.missing_batches == 0
    assert merged(tmp_path / "run").equals(whole)


def test_a_flipped_bit_is_found(tmp_path):
    start(toy.write_csv(tmp_path / "in.csv", sequences(20)), tmp_path / "run")
    part = tmp_path / "run" / toy.done_lines(tmp_path / "run")[0]["file"]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        merged(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "float16"}, 'dtype was "float32", now "float16"'),
        ({"batch_tokens": 512}, "batch_tokens was 256, now 512"),
        ({"options": {"pool": ["max"]}}, 'pool was "mean", now "max"'),
        ({"x_col": "id"}, "input has changed"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, change, told):
    data = toy.write_csv(tmp_path / "in.csv", sequences(20))
    start(data, tmp_path / "run")
    whole = merged(tmp_path / "run")
    with pytest.raises(RunError, match="holds another run") as caught:
        start(data, tmp_path / "run", **change)
    assert told in caught.value.what and "--overwrite" in caught.value.hint
    assert merged(tmp_path / "run").equals(whole)
    start(data, tmp_path / "run", overwrite=True, **change)
    assert merged(tmp_path / "run").num_rows == 20


@pytest.mark.parametrize("key", ["weights", "precision"])
def test_another_model_in_the_same_folder_is_refused(tmp_path, monkeypatch, key):
    data = toy.write_csv(tmp_path / "in.csv", sequences(20))
    start(data, tmp_path / "run", precision="fp32")
    if key == "weights":  # of a model without any, its seed
        monkeypatch.setattr(toy, "CARD", dataclasses.replace(toy.CARD, seed=1))
    with pytest.raises(RunError, match=f"holds another run .{key} (has changed|was .fp32., now)"):
        start(data, tmp_path / "run", precision="bf16" if key == "precision" else "fp32")


def test_a_changed_input_is_refused(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", sequences(20))
    start(data, tmp_path / "run")
    toy.write_csv(data, [*sequences(19), "W"])
    with pytest.raises(RunError, match="input has changed"):
        start(data, tmp_path / "run")


def test_auto_keeps_what_the_run_was_begun_with(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", sequences(20))
    start(data, tmp_path / "run", batch_tokens=512)
    assert start(data, tmp_path / "run", batch_tokens=None).missing_batches == 0


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.docx").write_text("years of work")
    data = toy.write_csv(tmp_path / "in.csv", sequences(5))
    with pytest.raises(RunError, match=r"not empty and holds no run \(thesis.docx\)"):
        start(data, tmp_path / "run")
    start(data, tmp_path / "run", overwrite=True)
    start(data, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/thesis.docx").read_text() == "years of work"


def test_an_input_without_rows_and_one_without_good_rows(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        start(toy.write_csv(tmp_path / "a.csv", []), tmp_path / "run")
    with pytest.raises(InputError, match="none of the 3 rows") as caught:
        start(toy.write_csv(tmp_path / "b.csv", ["!", "!A", "A!"]), tmp_path / "run")
    assert "takes protein" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("mgen_core.storage.free_bytes", lambda path: 10)
    with pytest.raises(RunError, match="GB are free"):
        start(toy.write_csv(tmp_path / "in.csv", sequences(5)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plan_only_writes_nothing(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["AAAA", "AAAA", "CC", "!"])
    forecast = plan_only(config(data, tmp_path / "run"), toy.catalog(), ["here", "here"])
    plan = forecast.plan
    assert (plan.rows, plan.failed, plan.distinct, plan.batches) == (4, 1, 2, 1)
    assert plan.tokens == 5 + 3 and plan.computed == 10
    assert [(share.batches, share.tokens) for share in forecast.shares] == [(1, 10), (0, 0)]
    assert not (tmp_path / "run").exists()


def test_a_layer_that_is_not_there(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["AC"])
    with pytest.raises(MgenError, match="no layer 7 in toy") as caught:
        start(data, tmp_path / "run", options={"layers": ["7"]})
    assert "0 (embeddings) to 1" in caught.value.hint


def test_order_of_rows_and_budget_do_not_change_a_row(tmp_path):
    texts = sequences(60)
    small = toy.write_csv(tmp_path / "in.csv", texts)
    start(small, tmp_path / "small", batch_tokens=64)
    start(small, tmp_path / "large", batch_tokens=4096)
    start(toy.write_csv(tmp_path / "rev.csv", texts[::-1]), tmp_path / "reversed")
    expected = merged(tmp_path / "small")["embedding"].to_pylist()
    assert merged(tmp_path / "large")["embedding"].to_pylist() == expected
    assert merged(tmp_path / "reversed")["embedding"].to_pylist()[::-1] == expected


def test_windows_join_seamlessly(tmp_path, monkeypatch):
    from mgen_core.job import Job
    from mgen_core.plan import PlanSettings

    monkeypatch.setattr(
        Job, "settings", lambda job, tokens: PlanSettings(tokens, job.max_tokens, window_rows=17)
    )
    texts = sequences(100)
    texts[16] = texts[17] = texts[99] = "!"
    start(toy.write_csv(tmp_path / "in.csv", texts), tmp_path / "run")
    table = merged(tmp_path / "run")
    assert table["row"].to_pylist() == list(range(100))
    bad = [row for row, error in enumerate(table["error"].to_pylist()) if error]
    assert bad == [16, 17, 99]


@pytest.mark.parametrize("writer", ["parquet", "tsv", "pt", "safetensors", "npz"])
@pytest.mark.parametrize("pool", ["mean", "tokens"])
def test_every_writer_gives_the_same_table(tmp_path, writer, pool):
    # A batch of its own, all of it failed: a part without rows.
    texts = ["~" * 90, *sequences(20), "!"]
    data = toy.write_csv(tmp_path / "in.csv", texts)
    start(data, tmp_path / "parquet", options={"pool": [pool]}, batch_tokens=100)
    start(data, tmp_path / "run", options={"pool": [pool]}, batch_tokens=100, writer=writer)
    assert merged(tmp_path / "run").to_pylist() == merged(tmp_path / "parquet").to_pylist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_precision(tmp_path, dtype):
    data = toy.write_csv(tmp_path / "in.csv", ["ACD", "W"])
    start(data, tmp_path / "run", dtype=dtype, writer="safetensors")
    column = merged(tmp_path / "run").schema.field("embedding")
    assert column.type.value_type == ("halffloat" if dtype == "float16" else "uint16")
    if dtype == "bfloat16":
        with pytest.raises(MgenError, match="bfloat16"):
            start(data, tmp_path / "other", dtype=dtype)
        assert not (tmp_path / "other").exists()


def test_the_merged_file_says_where_it_comes_from(tmp_path):
    start(toy.write_csv(tmp_path / "in.csv", ["ACD"]), tmp_path / "run")
    told = merged(tmp_path / "run").schema.metadata
    assert (told[b"mgen.task"], told[b"mgen.backbone"]) == (b"embed", b"toy")
    assert len(told[b"mgen.input"]) == 64 and told[b"mgen.version"]


def test_a_refused_start_does_not_tidy_up_what_another_is_making(tmp_path):
    from mgen_core import storage

    run_folder = tmp_path / "run"
    run_folder.mkdir()
    data = toy.write_csv(tmp_path / "in.csv", ["ACD"])
    with (
        storage.lock(run_folder / "run.lock"),
        pytest.raises(RunError, match="is at work"),
    ):
        start(data, run_folder)
    assert (run_folder / "run.lock").exists()


def test_a_failed_start_removes_the_folders_that_it_made_and_no_other(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", ["!"])
    with pytest.raises(InputError):
        start(data, tmp_path / "a/b/run")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        start(data, tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_a_default_that_is_spelled_out_is_the_same_run(tmp_path):
    data = toy.write_csv(tmp_path / "in.csv", sequences(5))
    start(data, tmp_path / "run")
    start(data, tmp_path / "run", options={"pool": "mean", "layers": [-1]})


@pytest.mark.parametrize("kind", ["device", "cpu"])
def test_out_of_memory_halves_the_passes_and_changes_no_row(tmp_path, monkeypatch, kind):
    import torch

    data = toy.write_csv(tmp_path / "in.csv", sequences(60))
    start(data, tmp_path / "whole")
    forward = toy.Toy.forward

    def little(self, module, inputs, want):
        if inputs["codes"].numel() > 100:
            if kind == "device":
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return forward(self, module, inputs, want)

    monkeypatch.setattr(toy.Toy, "forward", little)
    start(data, tmp_path / "run")
    found, expected = (
        read(tmp_path / name, toy.catalog(), Selection()) for name in ("run", "whole")
    )
    assert found == expected
    limits = {line["limit"] for line in toy.done_lines(tmp_path / "run")}
    assert limits and max(limit for limit in limits if limit) <= 200


def test_a_row_that_alone_exceeds_the_memory_is_set_aside(tmp_path, monkeypatch):
    import torch

    forward = toy.Toy.forward

    def full(self, module, inputs, want):
        if inputs["codes"].shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, module, inputs, want)

    monkeypatch.setattr(toy.Toy, "forward", full)
    texts = [*sequences(60), "A" * 70]
    long = sum(len(text) > 49 for text in texts)
    report = start(toy.write_csv(tmp_path / "in.csv", texts), tmp_path / "run", batch_tokens=64)
    assert (report.done, report.failed) == (61 - long, long)
    errors = merged(tmp_path / "run")["error"].to_pylist()
    assert errors[60] == "out of memory with one row alone: 71 tokens"
    assert [bool(error) for error in errors] == [len(text) > 49 for text in texts]
