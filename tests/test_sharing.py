"""Work shared by processes: each item by one of them, whatever happens to the others."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from microbat.sharing import alone, share

WORKER = """
import sys, time
from pathlib import Path
from microbat.sharing import share
place, me = Path(sys.argv[1]), sys.argv[2]
names = [f"item{i}" for i in range(12)]
def work(names):
    for name in names:
        with (place / "log").open("a") as log:
            log.write(f"{name} {me}\\n")
        (place / f"{name}.begun").touch()
        if me == "dies":
            time.sleep(60)
        time.sleep(0.05)
        (place / name).touch()
share(place / "locks", lambda: [n for n in names if not (place / n).exists()], work, at_once=2)
"""


def start(place: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(place), name])


def log(place: Path) -> list[list[str]]:
    return [line.split() for line in (place / "log").read_text().splitlines()]


def test_processes_do_each_item_once_and_end_together(tmp_path):
    workers = [start(tmp_path, name) for name in ("one", "two")]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    assert sorted(item for item, _ in log(tmp_path)) == sorted(f"item{i}" for i in range(12))


def test_what_a_process_left_behind_is_done_by_another(tmp_path):
    dies = start(tmp_path, "dies")
    while not (tmp_path / "item0.begun").exists():
        time.sleep(0.01)
    other = start(tmp_path, "other")
    while sum(who == "other" for _, who in log(tmp_path)) < 10:  # all but the two that the first one holds
        time.sleep(0.01)
    time.sleep(0.2)
    assert other.poll() is None  # it waits for them
    dies.kill()
    dies.wait()
    assert other.wait(timeout=60) == 0
    assert all((tmp_path / f"item{i}").exists() for i in range(12))


def test_items_are_handed_out_up_to_at_once(tmp_path):
    done, sizes = set(), []

    def work(names: list[str]) -> None:
        sizes.append(len(names))
        done.update(names)

    share(tmp_path, lambda: [n for n in "abcde" if n not in done], work, at_once=2)
    assert sizes == [2, 2, 1]


def test_an_item_that_somebody_finished_meanwhile_is_not_done_again(tmp_path):
    done, worked = set(), []

    def work(names: list[str]) -> None:
        worked.extend(names)
        done.update(names)

    with alone(tmp_path, "a"):
        worker = threading.Thread(target=share, args=(tmp_path, lambda: [n for n in "ab" if n not in done], work))
        worker.start()
        while worked != ["b"]:
            time.sleep(0.01)
        done.add("a")
    worker.join(timeout=60)
    assert worked == ["b"]
