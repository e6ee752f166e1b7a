# SPDX-License-Identifier: MIT
"""Records the panel of ``rotary run --live`` as an SVG of a terminal: a frame of a real run near its end.

The command runs on a terminal of its own, of which only this process sees what is written. The SVG needs no
font or file from elsewhere.

    python benchmarks/live_svg.py -o docs/live.svg
    python benchmarks/live_svg.py -o live.svg MODEL -p "Once upon a time" -n 200 --budget 25%
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "models/tiny-moe-q8_0.gguf", "-p", "In the beginning", "-n", "500", "--budget", "25%",
    "--store", "direct", "--seed", "1",
)  # fmt: skip
N_COLUMNS, N_LINES = 80, 30
NEAR_END = 0.8
THEME = TerminalTheme(  # of GitHub's dark pages; the terminal is dark on light ones too
    (13, 17, 23),
    (230, 237, 243),
    [
        (72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255),
        (57, 197, 207), (177, 186, 196),
    ],
)  # fmt: skip
# rich's own format loads a font from a server.
FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: 20px "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
.{unique_id}-title {{ font: bold 18px "DejaVu Sans", Verdana, Arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def record(command: list[str]) -> str:
    """All that a command writes to its terminal, as text with control sequences.

    Raises
    ------
    click.ClickException
        The command fails.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", N_LINES, N_COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    written = bytearray()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        try:
            while part := os.read(ours, 1 << 16):
                written += part
        except OSError:  # Linux's way to say that nobody has the terminal open any more
            pass
        finally:
            os.close(ours)
    text = written.decode(errors="replace")
    if process.returncode != 0:
        raise click.ClickException(f"{shlex.join(command)}: status {process.returncode}: {text[-400:]}")
    return text


def last_frame(written: str) -> Text:
    """The last frame that was drawn while tokens were made.

    Raises
    ------
    click.ClickException
        There is none, or it was drawn long before the end: frames come four times a second.
    """
    frames = re.split(r"(?:\r?\x1b\[(?:2K|1A|\?25[lh]))+", written.replace("\r\n", "\n"))
    for frame in reversed(frames):
        text = Text.from_ansi(frame.strip("\n"))
        if found := re.search(r"^tokens .*?(\d+) of (\d+)(.*\n)+.* text ", text.plain, re.MULTILINE):
            n_made, n_asked = int(found[1]), int(found[2])
            if n_made < NEAR_END * n_asked:
                raise click.ClickException(
                    f"the last frame is of {n_made} of {n_asked} tokens, less than {NEAR_END:.0%}; try "
                    "again, with another -n or --seed if the text ends early"
                )
            return text
    raise click.ClickException("no frame of generated tokens was drawn; raise -n")


def render(command: str, frame: Text) -> str:
    """A terminal with the command and a frame, as SVG."""
    console = Console(
        record=True, width=N_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        legacy_windows=False, markup=False, highlight=False, emoji=False,
    )  # fmt: skip
    console.print(Text(f"$ {command}", "bold"))
    console.print(frame)
    return console.export_svg(
        title="rotary run --live", theme=THEME, code_format=FORMAT, unique_id="live", font_aspect_ratio=0.6
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(output: Path, arguments: tuple[str, ...]) -> None:
    """Record `rotary run ARGUMENTS --live`; without arguments, the committed model at a quarter."""
    run = ["run", *(arguments or RUN), "--live"]
    frame = last_frame(record([sys.executable, "-m", "rotary_llamacpp", *run]))
    output.write_text(render(shlex.join(["rotary", *run]).replace("'", '"'), frame), encoding="utf-8")
    click.echo(f"{output}: written")


if __name__ == "__main__":
    main()
