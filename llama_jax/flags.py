"""Command-line flags: `--section.field VALUE` on top of a YAML file, and the help that lists them.

Flags are merged into the file's values before anything is checked, so that file and flags are
judged together, by the schema alone, with one kind of message.
"""

import itertools
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from llama_jax.config import ConfigError, Frozen, Schema, flag_name

Annotation = Any


def split(args: Sequence[str], positional: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Arguments as (flag without dashes, its values): --a 1 2 --b=3 --c -> a [1, 2], b [3], c [].

    Words before the first flag are the values of `positional`, in order.

    Raises ConfigError for a value that neither has a place nor follows a flag.
    """
    flags: list[tuple[str, list[str]]] = []
    words = itertools.takewhile(lambda arg: not arg.startswith("--"), args)
    given = [(name, [word]) for name, word in zip(positional, words, strict=False)]
    for arg in args[len(given) :]:
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(arg)
        else:
            raise ConfigError(f"'{arg}' follows no flag; settings are given as --name VALUE")
    return given + flags


def positional(schema: type[Schema]) -> list[str]:
    """Fields whose values may stand before the flags, in order."""
    return [
        flag_name(name, field)
        for name, field in schema.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("positional")
    ]


def merge(schema: type[Schema], values: dict[str, Any], flags: list[tuple[str, list[str]]]) -> Any:
    """The values with every flag laid over them; what they mean is checked by the schema later."""
    for name, words in flags:
        values = _set(schema, values, name.split("."), words, name)
    return values


def _set(annotation: Annotation, node: Any, path: list[str], words: list[str], flag: str) -> Any:
    """The node with the value at `path` replaced; containers are copied, not changed."""
    if not path:
        return _value(annotation, words, flag)
    key, rest = path[0], path[1:]
    if _is_section(annotation):
        node = annotation.spelled_out(node)
    if isinstance(node, list | tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise ConfigError(f"--{flag}: '{key}' must be the number of an entry, from 0")
        items = list(node)
        items[int(key)] = _set(_item(annotation), items[int(key)], rest, words, flag)
        return items
    inner = dict(node) if isinstance(node, dict) else {}
    inner[key] = _set(_field(annotation, key), inner.get(key), rest, words, flag)
    return inner


def _value(annotation: Annotation, words: list[str], flag: str) -> Any:
    """The words of a flag as the schema will read them: text, a list of texts, True or None."""
    optional = type(None) in get_args(annotation)
    kind = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    kind = kind if optional else annotation
    if get_origin(kind) is tuple:
        return words
    if not words and kind is bool:
        return True
    if len(words) != 1:
        raise ConfigError(f"--{flag} takes one value, not {len(words)}")
    return None if optional and words[0].lower() in ("none", "null") else words[0]


def _field(annotation: Annotation, key: str) -> Annotation:
    if _is_section(annotation):
        for name, field in annotation.model_fields.items():
            if flag_name(name, field) == key:
                return field.annotation
    return None


def _item(annotation: Annotation) -> Annotation:
    return next(iter(get_args(annotation)), None)


def _is_section(annotation: Annotation) -> TypeGuard[type[Schema]]:
    return isinstance(annotation, type) and issubclass(annotation, Schema)


def print_help(command: str, summary: str, schema: type[Schema]) -> None:
    """Every setting of a command, by section, with its type, default and meaning."""
    console = Console(highlight=False)
    words = "".join(f" {name.upper()}" for name in positional(schema))
    console.print(
        f"usage: llama-jax {command}{words} \\[--config FILE.yaml] \\[--section.field VALUE ...]"
    )
    console.print(f"\n{escape(summary)}\n")
    console.print("--config FILE.yaml reads settings from a file (or configs/runs by name);")
    console.print("flags come on top of it. --debug shows where an error comes from.")
    _print_section(console, schema, "", "settings", PydanticUndefined)


def _print_section(
    console: Console, schema: type[Schema], prefix: str, title: str, default: Any
) -> None:
    table = Table.grid(padding=(0, 2))
    sections = []
    for name, field in schema.model_fields.items():
        key = prefix + flag_name(name, field)
        value = field.default if default is PydanticUndefined else getattr(default, name)
        meaning = escape(" ".join((field.description or "").split()))
        if _is_section(field.annotation):
            sections.append((field.annotation, key, meaning, value))
            continue
        given = "[bold]required[/]" if value is PydanticUndefined else f"default {_shown(value)}"
        kind = escape(_type_name(field.annotation))
        table.add_row(f"  --{key}", f"[dim]{kind}[/], {given}. {meaning}")
    console.print(f"\n[bold]{title}[/]")
    console.print(Padding(table, (0, 0)))
    for inner, key, meaning, value in sections:
        _print_section(console, inner, f"{key}.", f"{key}[/]: {meaning}[bold]", value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return escape(" ".join(map(str, value))) or "empty"
    return escape(str(value))


def _type_name(annotation: Annotation) -> str:
    """int, number, text, 'a | b', 'text ...' for a list."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return "-".join(map(_type_name, inner))
    if origin is tuple:
        return f"{_type_name(inner[0])} ..."
    if origin in (Union, types.UnionType):
        return " | ".join("none" if a is type(None) else _type_name(a) for a in inner)
    if _is_section(annotation):
        return " and ".join(annotation.model_fields)
    names = {bool: "true | false", int: "integer", float: "number", str: "text"}
    return {**names, Frozen: "name: value ..."}[annotation]
