"""Kinds of fields that several bodies have, and pieces of JSON Schema that pydantic cannot say."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

from elasticrec.serving.api.limits import MAX_ENTRY, MAX_ID_CHARACTERS, MAX_TIMESTAMP_S


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]
Entry = Annotated[float, Field(ge=-MAX_ENTRY, le=MAX_ENTRY, allow_inf_nan=False)]  # of a vector
Whole = Annotated[int, BeforeValidator(_whole)]
Seconds = Annotated[int, Field(ge=0, le=MAX_TIMESTAMP_S), BeforeValidator(_whole)]  # since the epoch


def needs(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema of an object that has this field, and not as null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


def wish(action: str, **kinds: str) -> dict[str, Any]:
    """JSON Schema of an object with this action: which fields are there, and which are not."""
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    needed = [name for name, kind in kinds.items() if kind != "null"]
    return {"properties": {"action": {"const": action}, **properties}, "required": ["action", *needed]}
