"""How YAML files become sections and back, and what is said of a mistake in one."""

import difflib
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llama_jax.config.section import ConfigError, Schema

T = TypeVar("T", bound="Schema")


def configs_folder() -> Path:
    """The configs/ folder: inside the package when installed, beside it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def read(schema: type[T], path: str | Path) -> T:
    """Reads one YAML file into a section.

    Raises ConfigError naming the file, every bad key and, for an unknown key, the nearest one.
    """
    return parse(schema, read_yaml(path), str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the rule that the last of two equal keys wins in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises YAMLError for a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice[0]}' stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values of a YAML file, unchecked but for being `key: value` lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    return values


def parse(schema: type[T], values: dict[str, Any], origin: str) -> T:
    """Checks a dict against a section; errors begin with `origin` (a file name, say)."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, schema, origin)) from error


def explain(error: ValidationError, schema: type[Schema], origin: str) -> str:
    """One line per mistake: origin, dotted key, what is wrong, the nearest valid key."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, dotted_keys(schema), n=1, cutoff=0.5)
            message = "unknown key" + (f"; the nearest is '{near[0]}'" if near else "")
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] != "value_error":
            message += f" (got {reprlib.repr(item['input'])})"  # YAML aliases may unfold for ever
        lines.append(": ".join(part for part in (origin, key, message) if part))
    return "\n".join(lines)


def dotted_keys(schema: type[Schema], prefix: str = "") -> list[str]:
    """Every key of a schema, sections spelt out as section.field."""
    keys = []
    for name, field in schema.model_fields.items():
        key = prefix + flag_name(name, field)
        keys.append(key)
        inner = field.annotation
        if get_origin(inner) is tuple:  # of sections, which go by number
            inner, key = get_args(inner)[0], f"{key}.0"
        if isinstance(inner, type) and issubclass(inner, Schema):
            keys += dotted_keys(inner, f"{key}.")
    return keys


def flag_name(name: str, field: FieldInfo) -> str:
    """How users write a field, in YAML and as a flag."""
    return field.alias or name


def save(section: Schema, path: str | Path) -> None:
    """Writes a section as YAML that `read` gives back equal."""
    values = section.model_dump(mode="json", by_alias=True)
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
