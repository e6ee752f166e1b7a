# SPDX-License-Identifier: MIT
"""Processes that end with this one; that they do when it is killed is in test_convert_folders.py."""

from __future__ import annotations

import json
import signal
import subprocess

from rotary_llamacpp.host.children import child

SCRIPT = """
import json, os, sys, time
print(json.dumps([sys.argv, sys.path[0], __name__, os.environ["GGML_NO_BACKTRACE"]]), flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_a_script_runs_as_if_by_itself_and_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for seconds, status in (("0", 0), ("3600", -signal.SIGKILL)):
        with child(str(script), seconds, "b c", stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            found = json.loads(process.stdout.readline())
            if seconds == "0":
                process.wait()
        assert process.returncode == status
        # ggml's backtrace is off: two threads that fail at once wait for each other in it, for ever.
        assert found == [[str(script), seconds, "b c"], str(tmp_path), "__main__", "1"]
