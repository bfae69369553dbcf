"""Joining a cluster that cannot be joined."""

import subprocess
import sys
import textwrap

PROGRAM = """
    import sys
    import ray
    from ray._private.utils import check_version_info
    from headrace.errors import FatalStartError
    from headrace.fleet import cluster

    def init(**arguments):
        check_version_info({"ray_version": "2.1.0", "python_version": "3.9.1"}, "here")

    ray.init = init
    try:
        cluster.join("10.0.0.1:6379", takes_stdout=False)
    except FatalStartError as error:
        print(error.message.replace(ray.__version__, "OURS").replace(sys.version.split()[0], "OURS"))
"""


def test_other_versions_are_told_in_one_line() -> None:
    """In Ray's own words for them, so that a Ray that words it otherwise is noticed."""
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=True
    )
    assert told.stdout == (
        "cannot join the Ray cluster at 10.0.0.1:6379: it runs Ray 2.1.0 and Python 3.9.1, this process Ray OURS "
        "and Python OURS; install one version everywhere\n"
    )
