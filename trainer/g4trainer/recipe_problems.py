"""What is told of a recipe that pydantic refused: of each wrong field its path, what was got, and what to write."""

import difflib
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo


def option(default: Any, write: str, **constraints: Any) -> Any:
    """A field whose error message ends with `write WRITE`."""
    return Field(default, json_schema_extra={"write": write}, **constraints)


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each field of a model that is wrong; a union's members count once."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        if not detail["loc"]:  # raised by a validator of the whole model, in whole lines
            lines.update((line, line) for line in str(detail["ctx"]["error"]).splitlines())
            continue
        field, path = _field_at(detail["loc"], model)
        lines.setdefault(path, f"{path}: {_what_to_write(detail, field, path, model)}")
    return list(lines.values())


def _field_at(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[FieldInfo | None, str]:
    """The field at a pydantic error's location, and its path without the names of union members."""
    owner: type[BaseModel] | None = model
    path: list[str] = []
    field: FieldInfo | None = None
    for part in location:
        if owner is None:
            break
        path.append(str(part))
        field = owner.model_fields.get(str(part))
        annotation = field.annotation if field else None
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return field, ".".join(path)


def _what_to_write(detail: Any, field: FieldInfo | None, path: str, model: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        *owner, key = map(str, detail["loc"])  # a key may hold a dot itself
        section = owner[0] if owner else ""
        known = list((model.model_fields[section].annotation if section else model).model_fields)  # type: ignore[union-attr]
        close = difflib.get_close_matches(key, known, n=1)
        return f"unknown key; {f'did you mean {close[0]}? ' if close else ''}Known here: {', '.join(known)}."
    got = "nothing" if detail["type"] == "missing" else repr(detail["input"])
    extra = field.json_schema_extra if field else None
    write = extra["write"] if isinstance(extra, dict) else f"a section with its keys, for example [{path}]"
    return f"got {got}; write {write}."
