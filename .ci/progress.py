# SPDX-License-Identifier: MIT
"""Run a long build and print its progress: progress.py NAME LOG COMMAND...

The command's output goes to LOG; only ninja's step counters are printed. If the command fails, the end of LOG
is printed and the command's exit status is returned.
"""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

EVERY_S = 5.0  # at most one line in this time
AT_LEAST_S = 15.0  # and at least one in this time
TAIL_LINES = 40


def main() -> int:
    name, log_path, command = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    step = "starting"
    done = threading.Event()

    def elapsed() -> str:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        return f"{minutes}m{seconds:02d}s"

    def report() -> None:
        shown, shown_at = None, 0.0
        while not done.wait(EVERY_S):
            now = time.monotonic()
            if step != shown or now - shown_at >= AT_LEAST_S:
                print(f"{name}: {step}, {elapsed()}", flush=True)
                shown, shown_at = step, now

    print(f"{name}: building, all output in {log_path}", flush=True)
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            counter = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if counter:
                step = f"step {counter[1]} of {counter[2]}"
    done.set()
    reporter.join()
    if process.returncode != 0:
        lines = log_path.read_text(errors="replace").splitlines()
        print(*(line[:400] for line in lines[-TAIL_LINES:]), sep="\n")
        print(f"{name}: failed after {elapsed()}, exit status {process.returncode}; all output in {log_path}")
        return process.returncode if process.returncode > 0 else 1
    print(f"{name}: done, {elapsed()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
