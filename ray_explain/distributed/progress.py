"""What is being done, for a person to watch: bars on a terminal, a line now and then elsewhere.

Work runs on many actors; each tells a small board on the cluster how far it is, and the driver draws the board.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0  # without a terminal
_SECONDS_BETWEEN_LOOKS = 0.5


class State(NamedTuple):
    """How far one piece of work is."""

    done: float
    total: float
    note: str  # "loss 1.32"


@ray.remote(num_cpus=0)
class Board:
    """Where workers say how far they are."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._lines: dict[str, None] = {}
        self._begun = Counter[Hashable]()

    def tell(self, key: str, done: float, total: float, note: str = "") -> None:
        """The latest word on `key`; the first one makes its bar."""
        self._states[key] = State(done, total, note)

    def say(self, line: str) -> None:
        """A sentence for the person who watches and for the log, once, also where a worker that was lost says it
        again."""
        self._lines[line] = None

    def begin(self, piece: Hashable) -> int:
        """How often this piece of work was begun, this time counted."""
        self._begun[piece] += 1
        return self._begun[piece]

    def all(self) -> tuple[dict[str, State], list[str]]:
        """All that was told and said so far."""
        return self._states, list(self._lines)


class Teller:
    """A worker's end of the board for one key: tells at most twice a second, never waits, drops out with the board."""

    def __init__(self, board: Any, key: str) -> None:
        self._board, self._key, self._last = board, key, 0.0

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Say that `done` of `total` is done."""
        now = time.monotonic()
        if self._board is not None and (done >= total or now - self._last > _SECONDS_BETWEEN_LOOKS):
            self._last = now
            self._board.tell.remote(self._key, done, total, note)


class _Bars:
    """Bars on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def draw(self, states: dict[str, State]) -> None:
        for key, state in states.items():
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(key, total=state.total, note="")
            self._progress.update(self._tasks[key], completed=state.done, total=state.total, note=state.note)


class _Lines:
    """Lines in a log: at the start and the end of each piece, and every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self._console, self._since = console, time.monotonic()
        self._said: dict[str, tuple[float, State]] = {}  # when last, and what

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def draw(self, states: dict[str, State]) -> None:
        now = time.monotonic()
        for key, state in states.items():
            last, said = self._said.get(key, (float("-inf"), State(0, -1, "")))
            is_due = now - last >= SECONDS_BETWEEN_LINES or state.done >= state.total
            if state == said or not is_due or not state.done:
                continue
            self._said[key] = (now, state)
            line = f"  {key:<34} {state.done:>7.0f} / {state.total:.0f}  {now - self._since:5.0f} s  {state.note}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that is to live as long as this process' node, so that no lost worker takes it along."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def watching() -> Iterator[Any]:
    """A board for the block's workers to tell, drawn until the block ends. Ray must be running."""
    board = Board.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    console = Console(markup=False)
    has_bars = console.is_terminal and not console.is_dumb_terminal
    with _Bars(console) if has_bars else _Lines(console) as drawer:
        drawing = _Drawing(board, console, drawer)
        drawing.start()
        try:
            yield board
        finally:
            drawing.over.set()
            drawing.join(timeout=10)
            if ray.is_initialized():
                drawing.draw()
                ray.kill(board)


class _Drawing(threading.Thread):
    """Draws the board until it is `over`, and says each line once, here and in the log."""

    def __init__(self, board: Any, console: Console, drawer: _Bars | _Lines) -> None:
        super().__init__(daemon=True)
        self._board, self._console, self._drawer = board, console, drawer
        self._n_said, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(_SECONDS_BETWEEN_LOOKS):
            self.draw()

    def draw(self) -> None:
        states, lines = ray.get(self._board.all.remote())
        for line in lines[self._n_said :]:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            logger.warning("%s", line)
        self._n_said = len(lines)
        self._drawer.draw(states)
