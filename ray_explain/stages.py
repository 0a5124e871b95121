"""What a step of ground truth is: tables in, tables out, every row accounted for. Knows nothing of Ray."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from ray_explain.errors import JobFailed

READ = "read"  # in `Result.measured`: how many lines, records or rows there were to be made into cases
_EXAMPLES_SHOWN = 3


class Result(NamedTuple):
    """The rows a stage made of a table, and why it made none of others."""

    table: pa.Table  # of the stage's schema_out
    dropped: list[tuple[str, str]]  # (id of the row, reason); a reason is a short fixed phrase, it is counted
    measured: Mapping[str, Any] = MappingProxyType({})  # for the manifest; of stages numbers, which are summed


def check_dropped(what: str, dropped: Sequence[tuple[str, str]], size: int, max_dropped: float) -> None:
    """Raises: JobFailed: more than a share `max_dropped` of `size` are dropped; the first are shown."""
    if len(dropped) > max_dropped * size:
        shown = "; ".join(f"{case}: {reason}" for case, reason in dropped[:_EXAMPLES_SHOWN])
        raise JobFailed(
            f"{what}: {len(dropped)} of {size} were dropped, more than `cluster.max_dropped` = {max_dropped}; the "
            f"first: {shown}"
        )


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
