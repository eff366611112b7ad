"""Several `--config` files and dotted flags to one configuration, by ModelGenerator's rules.

What comes later wins: mapping by mapping down to each leaf. Lists and free dicts are leaves. Where
a class is chosen (task, backbone, adapter, data module) its arguments survive a change of class as
far as the new one has them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MgenError
from ..plain_yaml import about
from . import classes
from .classes import Names, choices
from .sources import SECTIONS, SINGLE, Source, parse_value, read_config

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Block:
    """A chosen class: its name without a package, the path as it was written, its arguments."""

    name: str
    path: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Foreign:
    """A merged configuration. `ignored` are the keys given that mean nothing at prediction."""

    model: Block | None = None
    data: Block | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Block, ...] = ()
    ckpt: str | None = None
    ignored: tuple[str, ...] = ()


def merge_configs(sources: Sequence[Source]) -> Foreign:
    """Files and flags (name, value), in the order given.

    Raises `MgenError` for a key or class that ModelGenerator does not have, or that we do not know.
    """
    state: dict[str, Any] = {}
    for source in sources:
        if isinstance(source, Path):
            with about(source):
                state = ROOT.merge(state, read_config(source), "")
        else:
            flag, value = source[0].lstrip("-"), source[1]
            with about(f"--{flag} {value}"):
                path = flag.split(".")
                state = ROOT.put(state, path, parse_value(path[-1], value), "")
    return _foreign(state)


def block(value: Mapping[str, Any] | None) -> Block | None:
    """A merged {class_path, init_args}."""
    if value is None:
        return None
    path = str(value["class_path"])
    return Block(path.rpartition(".")[2], path, value["init_args"])


def _foreign(state: Mapping[str, Any]) -> Foreign:
    trainer = state.get("trainer") or {}
    callbacks = [block(one) for one in trainer.get("callbacks") or []]
    return Foreign(
        model=block(state.get("model")),
        data=block(state.get("data")),
        trainer={key: value for key, value in trainer.items() if key != "callbacks"},
        callbacks=tuple(one for one in callbacks if one is not None),
        ckpt=state.get("ckpt_path"),
        ignored=tuple(_ignored(state)),
    )


# Arguments that translation reads, or that change nothing by themselves.
_READ_OF_TASK = classes.words(
    "adapter adapter_dim_multiplier backbone multilabel n_classes num_outputs strict_loading "
    "use_legacy_adapter"
)
_READ_OF_BACKBONE = classes.words(
    "config_overwrites enable_rag from_scratch frozen lora_alpha lora_modules_to_save lora_r "
    "lora_target_modules lora_use_rslora max_length model_init_args save_peft_only use_peft "
    "vocab_file"
)
_NOT_READ_OF_DATA = classes.words(
    "backbone_class_path collate_fn extra_cols num_workers persistent_workers pin_memory sampler "
    "shuffle truncate_extra_cols"
)
_READ_OF_TRAINER = classes.words(
    "accelerator callbacks devices fast_dev_run limit_predict_batches num_nodes precision strategy"
)


def _ignored(state: Mapping[str, Any]) -> list[str]:
    model, data = block(state.get("model")), block(state.get("data"))
    backbone = block(model.args.get("backbone")) if model else None
    given = {
        "": {key: state.get(key) for key in (*SECTIONS[3:], *SINGLE[1:])},
        "trainer.": _but(state.get("trainer") or {}, _READ_OF_TRAINER),
        "model.": _but(model.args if model else {}, _READ_OF_TASK),
        "model.backbone.": _but(backbone.args if backbone else {}, _READ_OF_BACKBONE),
        "data.": {k: (data.args if data else {}).get(k) for k in sorted(_NOT_READ_OF_DATA)},
    }
    return [
        section + key
        for section, values in given.items()
        for key, value in values.items()
        if value is not None and value is not False
    ]


def _but(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


# --------------------------------------------------------------------------- places


class Place:
    """Where a value lies, and how a later value meets an earlier one: here it replaces it."""

    def merge(self, old: Any, new: Any, where: str) -> Any:
        """The value after `new`, a part of a file, was given on top of `old`."""
        return new

    def put(self, old: Any, path: Sequence[str], new: Any, where: str) -> Any:
        """The same for a value at a dotted path below this place."""
        if not path:
            return self.merge(old, new, where)
        inside = dict(old) if isinstance(old, Mapping) else {}
        inside[path[0]] = Place().put(inside.get(path[0]), path[1:], new, where)
        return inside

    def append(self, old: Any, new: Any, where: str) -> Any:
        """The value after `key+: new`."""
        added = new if isinstance(new, list) else [new]
        return self.merge(None, [*_as_list(old), *added], where)


@dataclass(frozen=True)
class Group(Place):
    """A mapping of known keys."""

    keys: Mapping[str, Place]

    def merge(self, old: Any, new: Any, where: str) -> Any:
        if not isinstance(new, Mapping):
            if new is None:
                return old
            raise MgenError(f"{where} is {new!r:.40}", "write `key: value` lines below it")
        for key, value in new.items():
            old = self.put(old, str(key).split("."), value, where)
        return old

    def put(self, old: Any, path: Sequence[str], new: Any, where: str) -> Any:
        if not path:
            return self.merge(old, new, where)
        inside = dict(old or {})
        key, more = path[0].removesuffix("+"), path[1:]
        place = self.keys.get(key)
        below = f"{where}.{key}".lstrip(".")
        if place is None:
            raise MgenError(f"unknown key {below!r}", choices(key, self.keys))
        inside[key] = _put_or_append(place, path[0], inside.get(key), more, new, below)
        return inside


@dataclass(frozen=True)
class Slot(Place):
    """Where a class is chosen: `NAME`, or {class_path, init_args}.

    `kind` is the word for it; `arguments` gives the names that a class takes (None: any) and
    raises `MgenError` for a class that there is not; `inner` are arguments that are places too.
    """

    kind: str
    arguments: Callable[[str], Names | None]
    inner: Mapping[str, Place] = field(default_factory=dict)

    def merge(self, old: Any, new: Any, where: str) -> Any:
        if new is None:
            return None
        if isinstance(new, str):
            return self._of_class(old, new)
        if not isinstance(new, Mapping):
            raise MgenError(f"{where} is {new!r:.40}", f"name a {self.kind}")
        if not any(key in new for key in CLASS_KEYS):
            new = {"init_args": new}
        if "class_path" in new:
            old = self._of_class(old, str(new["class_path"]))
        for key in new:
            if key not in CLASS_KEYS:
                raise MgenError(f"unknown key {where}.{key}", choices(str(key), CLASS_KEYS))
        for key in ("init_args", "dict_kwargs"):
            given = new.get(key) or {}
            if not isinstance(given, Mapping):
                raise MgenError(f"{where}.{key} is {given!r:.40}", "write `key: value` lines")
            for name, value in given.items():
                old = self._put_argument(old, [str(name)], value, where)
        return self._chosen(old, where)

    def put(self, old: Any, path: Sequence[str], new: Any, where: str) -> Any:
        if not path:
            return self.merge(old, new, where)
        if path[0] == "class_path":
            return self._of_class(old, str(new))
        if path[0] not in CLASS_KEYS:
            return self._put_argument(old, path, new, where)
        if not path[1:]:
            return self.merge(old, {path[0]: new}, where)
        return self._put_argument(old, path[1:], new, where)

    def _of_class(self, old: Any, path: str) -> dict[str, Any]:
        names = self.arguments(path)
        kept = old["init_args"] if old else {}
        if names is not None:
            kept = {key: value for key, value in kept.items() if key in names}
        return {"class_path": path, "init_args": kept}

    def _chosen(self, old: Any, where: str) -> dict[str, Any]:
        if not old:
            raise MgenError(
                f"{where} has arguments, but no {self.kind} is chosen yet",
                f"give its class_path there, or before it (--{where} NAME)",
            )
        return dict(old)

    def _put_argument(self, old: Any, path: Sequence[str], new: Any, where: str) -> dict[str, Any]:
        chosen = self._chosen(old, where)
        name, more = path[0].removesuffix("+"), path[1:]
        names = self.arguments(chosen["class_path"])
        if names is not None and name not in names:
            what = f"{chosen['class_path']} has no argument {name!r}"
            raise MgenError(what, choices(name, names))
        args = dict(chosen["init_args"])
        place = self.inner.get(name, Place())
        below = f"{where}.{name}"
        args[name] = _put_or_append(place, path[0], args.get(name), more, new, below)
        return {**chosen, "init_args": args}


class Callbacks(Place):
    """A list of classes; a dotted flag below it means the last one."""

    def merge(self, old: Any, new: Any, where: str) -> Any:
        return [CALLBACK.merge(None, one, where) for one in _as_list(new)]

    def put(self, old: Any, path: Sequence[str], new: Any, where: str) -> Any:
        if not path:
            return self.merge(old, new, where)
        if not old:
            raise MgenError(f"no callback yet that could take {path[0]!r}", f"give --{where} NAME")
        return [*old[:-1], CALLBACK.put(old[-1], path, new, where)]


def _put_or_append(
    place: Place, key: str, old: Any, more: Sequence[str], new: Any, where: str
) -> Any:
    if key.endswith("+") and not more:
        return place.append(old, new, where)
    return place.put(old, more, new, where)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _arguments_of(kind: str, known: Mapping[str, Names | None]) -> Callable[[str], Names | None]:
    return lambda path: known[classes.known_class(kind, path, known)]


def _backbone(path: str) -> Names:
    # Which backbones there are is known to the plugins alone: asked later.
    return classes.arguments_of_backbone(path.rpartition(".")[2])


def _callback(path: str) -> Names | None:
    return classes.CALLBACKS.get(classes.own_name(path) or "")


CALLBACK = Slot("callback", _callback)
BACKBONE = Slot("backbone", _backbone)
ADAPTER = Slot("adapter", _arguments_of("adapter", classes.ADAPTERS))
TASK = Slot(
    "task", _arguments_of("task", classes.TASKS), {"backbone": BACKBONE, "adapter": ADAPTER}
)
DATA = Slot("data module", _arguments_of("data module", classes.DATA))
ROOT = Group(
    {
        "trainer": Group({**dict.fromkeys(classes.TRAINER, Place()), "callbacks": Callbacks()}),
        "model": TASK,
        "data": DATA,
        **dict.fromkeys((*SECTIONS[3:], *SINGLE), Place()),
    }
)
