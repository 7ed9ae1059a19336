"""A program of unknown quality in a process of its own: did it run to its end?

Keeps accidents in: endless loops, memory, forks, files, stray network calls. It is no wall against an attacker: the
program reads and writes what its user may. Run models that you do not trust in a container.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

SECONDS = 10  # of processor time; three times that on the clock, for programs that wait and machines that are busy
MEMORY = 2 << 30  # bytes of address space
FILE = 16 << 20  # bytes in a file that it writes
FINISHED = 42  # the exit status of a program that ran to its end; sys.exit(0) before the tests is not that

# The program comes on standard input, so that no file of it lies about and reading input gives end-of-file.
RUNNER = f"""
import os, resource, sys
source = sys.stdin.read()
limits = {{"CPU": {SECONDS}, "AS": {MEMORY}, "FSIZE": {FILE}, "CORE": 0, "NPROC": 0}}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
os._exit({FINISHED})
"""


def runs_to_its_end(program: str) -> bool:
    """Whether the Python ``program`` runs to its last line without an error and within the limits of this file.

    It works in a scratch folder, with an environment that holds nothing of the caller's, sets iterate in the same
    order every time, and its process group ends with it. Where user namespaces are allowed it has no network, and not
    even a daemon of its making survives.
    """
    with TemporaryDirectory(prefix="microbat-program-") as scratch:
        environment = {"PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch}
        environment |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-s", "-P", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env=environment,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=3 * SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == FINISHED


@functools.cache
def _isolation() -> tuple[str, ...]:
    """The command before the command that takes network and process table away, empty where the system forbids it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
    allowed = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True).returncode == 0
    return command if allowed else ()
