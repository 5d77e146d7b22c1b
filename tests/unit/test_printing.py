"""Consoles, streams and messages without control characters of other people's texts."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import cast

import pytest
from rich.table import Table

from headwater.errors import error_text, printable
from headwater.printing import PrintableConsole, PrintableStream

ESCAPES = "\x1b]0;t\x07\x1b[2J\x9b1m\x7f\u202egpj\u2028\r\x00"


def test_stream_replaces_control_characters_and_keeps_lines() -> None:
    out = io.StringIO()
    with redirect_stdout(cast(io.StringIO, PrintableStream(out))):
        print(f"a\t{ESCAPES}\nb")
    assert out.getvalue() == "a\t\ufffd]0;t\ufffd\ufffd[2J\ufffd1m\ufffd\ufffdgpj\ufffd\ufffd\ufffd\nb\n"


def test_console_keeps_own_colours_and_no_foreign_escapes() -> None:
    out = io.StringIO()
    console = PrintableConsole(file=out, force_terminal=True, color_system="standard", width=60)
    with redirect_stdout(cast(io.StringIO, PrintableStream(out))):
        table = Table("a")
        table.add_row(f"[red]{ESCAPES}x[/red]")
        console.print(table)
        PrintableConsole(force_terminal=True, color_system="standard").print("[green]own[/green]")  # as typer's help
    assert "\x1b[31m" in out.getvalue() and "\x1b[32mown" in out.getvalue()
    rest = out.getvalue().replace("\x1b[", "")  # of SGR sequences nothing else is left
    assert printable(rest) == rest and "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no  such\nfile", "no such file"),
        ("out of range\nException raised from at (most recent call first):\nframe #0: f", "out of range"),
        ("failed\nstack backtrace:\n 0: rust_begin_unwind", "failed"),
        ("bad\nTraceback (most recent call last):\n  File", "bad"),
        ("word " * 60, ("word " * 40) + "…"),
        ("\x1b[2Jx", "\ufffd[2Jx"),
        ("", "ValueError"),
    ],
)
def test_message_of_library_is_one_line_cut_at_word(message: str, shown: str) -> None:
    assert error_text(ValueError(message)) == shown
