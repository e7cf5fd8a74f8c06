"""What every section of the configuration has in common: frozen, checked, no unknown keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import core_schema


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


class Schema(BaseModel):
    """Base of every section: frozen, hashable, no unknown keys, docstrings become help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """The section in full, where a file or a flag may write it as one word."""
        return value

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        values = cls.spelled_out(value)
        if not isinstance(values, dict):
            return values
        for name, given in list(values.items()):
            field = cls.model_fields.get(name)
            # A section that is given in part keeps the defaults of the place where it stands.
            if field and isinstance(given, dict) and isinstance(field.default, Schema):
                default = field.default.model_dump(exclude_unset=True, by_alias=True)
                values = {**values, name: {**default, **given}}
            # To Python (and so to pydantic) true is the number 1.
            if isinstance(given, bool) and field and field.annotation in (int, float):
                raise ValueError(f"{name} must be a number, not {str(given).lower()}")
        return values


class Frozen(Mapping[str, Any]):
    """A mapping of a file whose keys somebody else knows; hashable, its values too."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        """Copies the values; lists become tuples."""
        self._values = {str(key): _frozen(value) for key, value in (values or {}).items()}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self.plain())

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON have it."""
        return {key: _plain(value) for key, value in self._values.items()}

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """A mapping with text keys, read into a Frozen and written as a plain dict."""
        return core_schema.no_info_before_validator_function(
            lambda value: value.plain() if isinstance(value, Frozen) else value,
            core_schema.no_info_after_validator_function(
                cls, core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.plain()
            ),
        )


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Frozen(value)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Frozen):
        return value.plain()
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def fixed(**keywords: Any) -> Any:
    """A field that a resumed run must keep: changing it would change what the run is."""
    return Field(json_schema_extra={"resume": "fixed"}, **keywords)


def positional(**keywords: Any) -> Any:
    """A field that may also be given without its flag, by its place among such fields."""
    return Field(json_schema_extra={"positional": True}, **keywords)
