"""The README's Python runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
def test_the_snippet_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"## From Python\n\n```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage(prompt_tokens=" in done.stdout
    assert re.search(r"\d+ replicas; other clients find the gateway at http://127\.0\.0\.1:\d+", done.stdout)
