"""What a step of ground truth is: tables in, tables out, every row accounted for. Knows nothing of Ray."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

_MEASURED = b"measured"


class Result(NamedTuple):
    """The rows a stage made of a table, and why it made none of others."""

    table: pa.Table  # of the stage's schema_out
    dropped: list[tuple[str, str]]  # (id of the row, reason); a reason is a short fixed phrase, it is counted


class Stage(Protocol):
    """Loads what it needs once, when made from its config, then turns tables into tables.

    A row's output may not depend on the other rows of its table, nor on how many tables came before.
    """

    def __init__(self, config: dict[str, Any]) -> None: ...

    @property
    def schema_in(self) -> pa.Schema:
        """Schema of the tables it takes; like that of what it makes, it may depend on the model that was loaded."""
        ...

    @property
    def schema_out(self) -> pa.Schema:
        """Schema of what is made."""
        ...

    def __call__(self, table: pa.Table) -> Result: ...


def measured(table: pa.Table, numbers: Mapping[str, float]) -> pa.Table:
    """`table` with what a stage counted in the making, such as calls and cost; a manifest holds their sums."""
    return table.replace_schema_metadata({_MEASURED: json.dumps(dict(numbers)).encode()})


def measured_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, float]:
    """The numbers that `measured` put there, if any."""
    return dict(json.loads((metadata or {}).get(_MEASURED, b"{}")))
