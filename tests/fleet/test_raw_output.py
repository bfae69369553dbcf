"""What C++ writes to descriptor 2 does not reach the terminal; what Python says does."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from pathlib import Path
from headrace.fleet.raw_output import RawOutput
raw = RawOutput(Path(sys.argv[1]) / "new" / "raw")
raw.divert()
os.write(2, b"raw line\\n")
print("said", file=sys.stderr)
sys.stderr.buffer.write(b"access log\\n")
sys.stderr.flush()
raw.keep_in(Path(sys.argv[1]))
"""


def test_raw_lines_go_to_the_file_and_python_to_the_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == "said\naccess log\n"
    assert (tmp_path / "headrace-serve.err").read_text() == "raw line\n"
