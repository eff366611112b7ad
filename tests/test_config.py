"""Configs: files merged, flags win, mistakes named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mgen_core import MgenError
from mgen_core.config import checked, make_config, make_options, read_config


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
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
        ("a: !!python/object/apply:os.system [echo]\n", "is not YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, what):
    path = written(tmp_path, "run.yaml", text)
    with pytest.raises(MgenError, match=what) as caught:
        read_config([path])
    assert str(path) in caught.value.what


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MgenError, match="cannot read"):
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
