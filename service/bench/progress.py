"""How far a bench is, on stderr: one line that is written over on a terminal, else a line for each trial."""

from __future__ import annotations

from typing import TextIO

_CELLS = 24


class Progress:
    """Writes to `stream`; what is told between bars stands on lines of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._width = 0

    def tell(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def bar(self, share: float, text: str) -> None:
        """The bar at `share`, 0 to 1, with `text` behind it; nothing where there is no terminal."""
        if not self._is_terminal:
            return
        share = min(max(share, 0.0), 1.0)
        full = round(share * _CELLS)
        line = f"[{'#' * full}{'.' * (_CELLS - full)}] {share:4.0%} {text}"
        self._clear()
        self._stream.write(line)
        self._stream.flush()
        self._width = len(line)

    def end(self) -> None:
        """Take the bar away."""
        self._clear()
        self._stream.flush()

    def _clear(self) -> None:
        if self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._width = 0
