"""The console and the progress bar of all research scripts."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console()


def progress_bar() -> Progress:
    """Returns a bar with a description, the count and the time; a task's `status` field is shown behind them."""
    columns = ("{task.description:17}", BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
