# SPDX-License-Identifier: MIT
"""Child processes that end with this one; test_convert_folders.py tests that they do if it is killed."""

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
        # ggml's backtrace is off: in it, two threads that fail at the same time wait for each other for ever.
        assert found == [[str(script), seconds, "b c"], str(tmp_path), "__main__", "1"]
