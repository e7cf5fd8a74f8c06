"""What every section of the configuration has in common: frozen, checked, no unknown keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


def fixed(**keywords: Any) -> Any:
    """A field that a resumed run must keep: changing it would change what the run is."""
    return Field(json_schema_extra={"resume": "fixed"}, **keywords)


def positional(**keywords: Any) -> Any:
    """A field that may also be given without its flag, by its place among such fields."""
    return Field(json_schema_extra={"positional": True}, **keywords)
