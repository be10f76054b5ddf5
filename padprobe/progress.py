"""The progress display of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console


class Speed(bars.ProgressColumn):
    """Steps per second."""

    def render(self, task: bars.Task) -> str:
        return f"{task.speed:.1f}/s" if task.speed else ""


@contextmanager
def display() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """Shows on stderr what runs, what is done and what is left.

    Yields two functions: ``progress(what, done, total)`` updates the bar, ``say(line)`` prints a line above it.
    """
    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), Speed()]
    columns += [bars.TimeElapsedColumn(), bars.TimeRemainingColumn()]
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:

        def progress(what: str, done: int, total: int) -> None:
            task = next((task.id for task in shown.tasks if task.description == what), None)
            if task is None:
                for old in shown.task_ids:
                    shown.remove_task(old)
                task = shown.add_task(what, total=total or None)
            shown.update(task, completed=done, total=total or None)

        yield progress, lambda line: shown.console.print(line, highlight=False)
