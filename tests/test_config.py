"""Configs: files merged, flags win, mistakes named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mgen_core import MgenError
from mgen_core.config import checked, make_config, make_options, read_config


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    return path


def test_the_last_file_wins(tmp_path):
    first = written(tmp_path, "a.yaml", "backbone: esm2_8m\nbatch_tokens: 512\n")
    second = written(tmp_path, "b.yaml", "batch_tokens: 1024\n")
    values = read_config([first, second])
    assert values == {"backbone": "esm2_8m", "batch_tokens": 1024}
    config = make_config({**values, "task": "embed", "data": "x.csv"})
    assert (config.data, config.batch_tokens) == (("x.csv",), 1024)
    assert config.output == Path("predictions")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("backbone: [unclosed\n", "is not YAML"),
        ("- a\n- list\n", "holds no keys"),
        ("backbon: esm2_8m\n", "unknown key 'backbon'"),
        ("backbone: [a]\nlimit: 3\nbackbone: b\n", "line 3 is not YAML: 'backbone' is given twice"),
        ("a: !!python/object/apply:os.system [echo]\n", "line 1 has a tag that runs Python"),
        ("backbone: !!int abc\n", "does not fit its kind: invalid literal"),
        ("backbone: 2024-13-45\n", "does not fit its kind: month must be"),
        ("limit: " + "9" * 5000, "does not fit its kind: Exceeds the limit"),
        ("options: &a [*a]\n", "an alias to what it is part of"),
        ("options: " + "[" * 5000, "is nested too deep"),
        ("# " + "x" * (1 << 20), "larger than 1 MiB"),
        ("output: \xff\n", "not a text file"),
        ("x" * 500 + ": 1\n", "unknown key 'xxx"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, what):
    path = written(tmp_path, "run.yaml", text)
    with pytest.raises(MgenError, match=what) as caught:
        read_config([path])
    assert str(path) in caught.value.what


@pytest.mark.parametrize("merged", [False, True], ids=["lists", "merge keys"])
def test_aliases_that_multiply_are_refused_before_they_do(tmp_path, merged):
    alias = "<<: [{}]" if merged else "[{}]"
    levels = [f"a0: &a0 {{key: {'x' * 100}}}"]
    for level in range(1, 30):
        again = ", ".join([f"*a{level - 1}"] * 9)
        value = f"{{{alias.format(again)}}}" if merged else alias.format(again)
        levels.append(f"a{level}: &a{level} {value}")
    path = written(tmp_path, "run.yaml", "\n".join(levels))
    with pytest.raises(MgenError, match="repeat each other without end"):
        read_config([path])


def test_aliases_that_do_not_are_followed(tmp_path):
    text = "options: &o {pool: mean}\nlora: {<<: *o, r: 4}\n"
    assert read_config([written(tmp_path, "run.yaml", text)]) == {
        "options": {"pool": "mean"},
        "lora": {"pool": "mean", "r": 4},
    }


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MgenError, match=r"no\.yaml: cannot be read: No such file"):
        read_config([tmp_path / "no.yaml"])


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"backbone": None}, "no backbone given"),
        ({"data": ()}, "no data given"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"dtype": "float8"}, "dtype = 'float8'"),
        ({"too_long": "cut"}, "too_long = 'cut'"),
        ({"limit": "many"}, "limit = 'many'"),
        ({"output": "a\0b"}, "output 'a\\x00b' is not text"),
        ({"data": ("x", "\ud800")}, "data '\\ud800' is not text"),
    ],
)
def test_a_value_that_does_not_fit_is_named(values, what):
    with pytest.raises(MgenError) as caught:
        make_config({"task": "embed", "backbone": "b", "data": ("x",), **values})
    assert what in caught.value.what


@dataclass(frozen=True)
class Model:
    tokens: Literal["clean", "reference"] = "clean"
    fuse: bool = True


@dataclass(frozen=True)
class Work:
    layers: tuple[int, ...] = (-1,)


def test_options_go_to_those_who_have_them():
    assert make_options([Model, Work], {"fuse": "false", "layers": ["-1", "3"]}) == [
        {"fuse": "false"},
        {"layers": ["-1", "3"]},
    ]
    assert checked(Model, {"fuse": "false"}).fuse is False
    assert checked(Work, {"layers": ["-1", "3"]}).layers == (-1, 3)
    assert checked(Work, {"layers": "-1,3"}).layers == (-1, 3)


def test_an_unknown_option_suggests_the_near_one():
    with pytest.raises(MgenError, match="no option 'token'") as caught:
        make_options([Model, Work], {"token": "clean"})
    assert "did you mean tokens?" in caught.value.hint
    with pytest.raises(MgenError, match="tokens = 'dirty'"):
        checked(Model, {"tokens": "dirty"})
