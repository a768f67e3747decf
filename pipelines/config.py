"""Configurations of the jobs, their command lines, and what a job prints and returns.

A job's configuration is one frozen pydantic model. Its fields are the command line: `segment_len` is
`--segment-len`; a field that is itself a `Config` is a section, written `--section.field VALUE`,
`section.field VALUE` or `section.field=VALUE`.
"""

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}


class InputError(ValueError):
    """What the user gave cannot be used: one line saying what, the value, what is allowed, what to do."""


class StrictError(Exception):
    """The job is done and its output stands, but it met faults that were to fail it (exit code 2)."""

    def __init__(self, result: dict[str, Any], message: str) -> None:
        super().__init__(message)
        self.result = result


class Config(pydantic.BaseModel):
    """A frozen configuration (section); every field is described, with its unit. Its numbers are finite."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_count(value: Any) -> Any:
    """A count such as 65536, "65536", "64k" (k, m, g: 1024 to the power 1, 2, 3) as an int, or ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)([kmg]?)", value.strip().lower().replace("_", ""))
    if match is None:
        raise ValueError("needs a whole number, also with k, m or g: 512, 64k, 1m")
    return int(match[1]) * _UNITS[match[2]]


def split_commas(value: Any) -> Any:
    """For list fields: every comma in an item begins a new item ("4k,64k" is two)."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return items
    split = [part.split(",") if isinstance(part, str) else [part] for part in items]
    return [part for parts in split for part in parts if part != ""]


Count = Annotated[int, pydantic.BeforeValidator(parse_count)]
"""An int field that also takes 4k, 64k, 1m."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON-able value; people are shown the first 16."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def as_command(job: str, config: Config, left_out: Sequence[str] = ()) -> str:
    """What to type for a configuration: the settings that were given, with DIR as the output."""
    words = [
        f"--{name.replace('_', '-')} {shlex.quote('DIR' if name == 'output' else _typed(getattr(config, name)))}"
        for name in type(config).model_fields
        if name in config.model_fields_set and name not in left_out
    ]
    return " ".join([f"python pipelines/{job}.py", *words])


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# --- the command line -------------------------------------------------------------------------------


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    base: Mapping[str, Any] | None = None,
) -> tuple[ConfigT, bool]:
    """The configuration that a command line asks for, and whether it says --dry-run.

    `base` holds nested values that lie between the defaults and the command line (a recipe). Raises InputError; --help
    prints and exits with 0.
    """
    fields = _fields(config_class)
    parser = _parser(fields, prog, description, base or {})
    given = vars(parser.parse_args(_canonical(argv, fields)))
    dry_run = bool(given.pop("dry_run"))
    values: dict[str, Any] = json.loads(json.dumps(base or {}))
    for name, text in given.items():
        _put(values, name, _value(text, fields[name].annotation))
    return build(config_class, values), dry_run


def given(name: str, config_class: type[Config], argv: Sequence[str]) -> Any:
    """What a command line gives for a field (dotted) of one value; None: nothing. InputError for unknown options."""
    fields = _fields(config_class)
    words = _canonical(argv, fields)
    found = None
    for word, following in itertools.pairwise([*words, ""]):
        head, equals, value = word.partition("=")
        if head == f"--{name}":
            found = value if equals else following
    return None if found is None else _value(found, fields[name].annotation)


def build(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The configuration with these (nested) values; InputError, in one line, names every wrong field."""
    try:
        return config_class.model_validate(values)
    except pydantic.ValidationError as error:
        names = list(_fields(config_class))
        raise InputError("; ".join(_explain(fault, names) for fault in error.errors())) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _fields(config_class: type[Config], prefix: str = "") -> dict[str, pydantic.fields.FieldInfo]:
    """Dotted name -> field, sections opened."""
    found = {}
    for name, field in config_class.model_fields.items():
        if _is_section(field.annotation):
            found.update(_fields(typing.cast(type[Config], field.annotation), f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """(the type without None, whether None was allowed)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [part for part in typing.get_args(annotation) if part is not type(None)]
        if len(others) < len(typing.get_args(annotation)):
            return (others[0] if len(others) == 1 else typing.Union[tuple(others)]), True  # noqa: UP007
    return annotation, False


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(_without_none(annotation)[0]) in (list, tuple)


def _is_plain(annotation: Any) -> bool:
    """Whether pydantic takes the value of this type from a plain string."""
    annotation = _without_none(annotation)[0]
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(annotation))
    return annotation in (str, int, float, bool, Path)


def _value(text: Any, annotation: Any) -> Any:
    """A command line's string, or strings, as what pydantic is to check."""
    inner, optional = _without_none(annotation)
    if isinstance(text, list):
        item = next((part for part in typing.get_args(inner) if part is not Ellipsis), str)
        if optional and len(text) == 1 and text[0].lower() == "none":
            return None
        if len(text) == 1 and text[0].startswith("["):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(text[0])
        return [_value(part, item) for part in text]
    if optional and text.lower() in ("none", "null"):
        return None
    if not _is_plain(inner):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
    return text


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _canonical(argv: Sequence[str], fields: Mapping[str, pydantic.fields.FieldInfo]) -> list[str]:
    """The arguments with every accepted way to name a field written as `--section.field`."""
    out: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        head, equals, value = word.partition("=")
        name = head.removeprefix("--").replace("-", "_")
        dashed = word.startswith("--") and len(word) > 2
        if word in ("-h", "--help", "--dry-run", "--dry_run"):
            out.append(word.replace("_", "-"))
        elif name in fields and (dashed or equals or "." in name):
            if fields[name].annotation is bool and not equals:
                says = bool(words) and _is_value(words[0], fields)
                equals, value = "=", words.pop(0) if says else "true"
            out.append(f"--{name}{equals}{value}")
        elif dashed and _negated(name) in fields and not equals:
            out.append(f"--{_negated(name)}=false")
        elif dashed or (re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name) and equals):
            raise InputError(f"unknown option {head}{_nearest(name, fields, '--' if dashed else '')}")
        elif _names_section(name, fields) and not (out and out[-1].startswith("--") and "=" not in out[-1]):
            raise InputError(f"unknown option {head}{_nearest(name, fields, '')}")
        else:
            out.append(word)
    return out


def _is_value(word: str, fields: Mapping[str, pydantic.fields.FieldInfo]) -> bool:
    """Whether a word behind a field can be nothing but its value, right or wrong."""
    head = word.partition("=")[0].replace("-", "_")
    return not (word.startswith("-") or head in fields or _names_section(head, fields))


def _names_section(name: str, fields: Mapping[str, pydantic.fields.FieldInfo]) -> bool:
    """Whether a word reads like a field of a known section: `model.something`."""
    section, dot, last = name.rpartition(".")
    return bool(dot) and last.isidentifier() and any(known.startswith(section + ".") for known in fields)


def _negated(name: str) -> str:
    section, dot, last = name.rpartition(".")
    return section + dot + last.removeprefix("no_") if last.startswith("no_") else name.removeprefix("no_")


def _nearest(name: str, names: typing.Iterable[str], dashes: str = "--") -> str:
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    shown = near or known
    written = ", ".join(dashes + (word.replace("_", "-") if dashes else word) for word in shown)
    return f"; did you mean {written}?" if near else f"; known are {written}"


def _parser(
    fields: Mapping[str, pydantic.fields.FieldInfo],
    prog: str,
    description: str,
    base: Mapping[str, Any],
) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, field in fields.items():
        shown = "--" + name.replace("_", "-")
        options = [shown] if shown == f"--{name}" else [shown, f"--{name}"]
        meta = name.rpartition(".")[2].upper()
        if _is_list(field.annotation):
            parser.add_argument(
                *options, dest=name, nargs="+", action="extend", metavar=meta, help=_help(name, field, base)
            )
        else:
            meta = "BOOL" if field.annotation is bool else meta
            parser.add_argument(*options, dest=name, metavar=meta, help=_help(name, field, base))
    dry_run = "print the resolved configuration as JSON and stop"
    parser.add_argument("--dry-run", action="store_true", default=False, help=dry_run)
    return parser


def _help(name: str, field: pydantic.fields.FieldInfo, base: Mapping[str, Any]) -> str:
    default: Any = base
    for part in name.split("."):
        default = default.get(part) if isinstance(default, Mapping) else None
    if default is None:
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if field.is_required():
            return f"{field.description} (required)".replace("%", "%%")
    if isinstance(default, pydantic.BaseModel):
        default = default.model_dump(mode="json")
    shown = default if isinstance(default, str) else json.dumps(default, default=_as_typed)
    if default is None:  # a field whose `none` would be read as a word is said to be left out
        shown = "none" if _without_none(field.annotation)[1] else "not given"
    return f"{field.description} (default: {shown})".replace("%", "%%")


def _as_typed(value: Any) -> Any:
    """A value within a default, as it can be given again."""
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, pydantic.BaseModel) else str(value)


def _explain(fault: Mapping[str, Any], names: list[str]) -> str:
    """One pydantic error as: field, value, what is allowed."""
    place = [str(part) for part in fault["loc"]]
    dotted = ".".join(place)
    prefixes = (".".join(place[:n]) for n in range(len(place), 0, -1))
    known = next((prefix for prefix in prefixes if prefix in names), dotted)
    option = "--" + known.replace("_", "-")
    if fault["type"] == "missing":
        return f"{option} is required"
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {dotted}{_nearest(dotted, names, '')}"
    if fault["type"] == "too_short":
        least = int(fault["ctx"]["min_length"])
        return f"{option} needs at least {least} {'value' if least == 1 else 'values'}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").removeprefix("a valid ")
    if fault["type"] in ("bool_parsing", "bool_type"):
        message = "yes or no"
    if fault["type"] == "value_error" and not place:
        return message
    shown = "" if isinstance(fault["input"], Mapping) else f" {fault['input']!r}:"
    verb = "" if fault["type"] == "value_error" else " needs to be"
    return f"{option}{shown}{verb} {message}"
