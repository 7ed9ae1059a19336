"""Programs in a process of their own: what ends well, what is stopped, what cannot get out."""

import os
import subprocess
import sys
import time

import pytest

from microbat.evaluation import sandbox
from microbat.evaluation.sandbox import runs_to_its_end


@pytest.fixture(params=["as the system allows", "without namespaces"])
def isolation(request, monkeypatch):
    if request.param == "without namespaces":
        monkeypatch.setattr(sandbox, "_isolation", tuple)
    return request.param


@pytest.mark.parametrize(
    ("program", "good"),
    [
        ("assert 1 + 1 == 2", True),
        ("if __name__ == '__main__':\n    x = 'ä\\n' * 3", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("import ctypes; ctypes.string_at(0)", False),
        ("input()", False),
        ("x = bytearray(3 << 30)", False),
        ("open('big', 'wb').write(b'0' * (17 << 20))", False),
        ("open('here', 'w').write('scratch'); assert open('here').read() == 'scratch'", True),
        ("print('x' * 10_000_000)", True),
    ],
)
def test_programs(isolation, program, good):
    assert runs_to_its_end(program) is good


def test_endless_loops_and_sleepers_are_stopped(isolation, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    started = time.monotonic()
    assert not runs_to_its_end("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "SECONDS", 10)
    monkeypatch.setattr(sandbox, "RUNNER", sandbox.RUNNER.replace('"CPU": 10', '"CPU": 1'))
    assert not runs_to_its_end("while True: pass")
    assert time.monotonic() - started < 20


def test_the_callers_secrets_and_folder_stay_outside(isolation, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    program = "import os; assert 'secret' not in os.environ.values(); assert os.listdir('.') == []; assert os.getcwd() != {!r}"
    assert runs_to_its_end(program.format(os.getcwd()))


def test_sets_iterate_in_the_same_order_every_time(isolation):
    words = "list({'red', 'green', 'blue', 'black', 'white', 'grey'})"
    environment = {"PYTHONHASHSEED": "0"}
    order = subprocess.check_output([sys.executable, "-c", f"print({words})"], env=environment, text=True).strip()
    assert all(runs_to_its_end(f"assert {words} == {order}") for _ in range(3))


def test_children_end_with_the_program(isolation, tmp_path):
    beat = tmp_path / "beat"
    program = (
        "import subprocess, sys\n"
        f"code = \"import time\\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)\"\n"
        "subprocess.Popen([sys.executable, '-c', code])\n"
        "import time; time.sleep(0.5)\n"
    )
    ended = runs_to_its_end(program)
    before = beat.stat().st_size if beat.is_file() else 0
    assert before or not ended  # an ordinary user may not fork at all, root may
    time.sleep(0.3)
    assert (beat.stat().st_size if beat.is_file() else 0) == before


def test_there_is_no_network_where_namespaces_are_allowed():
    if not sandbox._isolation():
        pytest.skip("this system allows no user namespaces")
    program = (
        "import socket\n"
        "server = socket.socket()\n"
        "try:\n"
        "    socket.create_connection(('192.0.2.1', 9), timeout=1)\n"
        "except TimeoutError:\n"
        "    raise\n"
        "except OSError as error:\n"
        "    assert error.errno == 101, error  # unreachable: not even an interface\n"
    )
    assert runs_to_its_end(program)
