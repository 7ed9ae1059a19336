"""Blocks prepared side by side, as Ray tasks: by processes of this machine, or of a cluster.

Where a method prepares a block from the float model alone, blocks need not wait for each other. This process makes the
float stream, one block ahead of the next, and hands each block's inputs and targets to a task; the task reads the block's
weights by itself and sends back what it prepared. Everything that depends on the quantized stream (solving, refining,
measuring, the shards) stays here, in order, so that shards are written once and hold the same bytes as without workers.

Where the float inputs come from: storing all of them takes (blocks + 1) x S x L x K numbers, hundreds of gigabytes; computing
them in each task takes half as many float passes as there are blocks, more than training does. The pass made here costs one
forward of each block, which a run without workers makes as well, and keeps the streams of twice as many blocks as there are
workers, so that none waits for this process. They lie in Ray's object store, which shares them between the processes of a
machine, sends them to others and spills them to disk.
"""

import dataclasses
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from microbat.calibrate.engine import prepare_block
from microbat.calibrate.job import Ahead, Blocks, FloatBlock, Job, Prepared
from microbat.calibrate.stream import Activations

RETRIES = 3  # of a block whose worker died
NO_MEMORY = ("alloc", "out of memory")  # what torch says where memory ends is a RuntimeError


@dataclass(frozen=True, kw_only=True)
class Workers:
    """``count`` processes on this machine, or on the Ray cluster at ``address``, which has microbat and the model's folder on
    each machine."""

    count: int
    address: str = ""

    @classmethod
    def of(cls, count: int, address: str = "") -> "Workers | None":
        """None where one process does it all; ValueError for less than one, ImportError without Ray."""
        if count < 1:
            raise ValueError(f"workers={count} must be at least 1")
        if count == 1 and not address:
            return None
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ImportError("workers are Ray tasks: pip install 'microbat[ray]'") from error
        return cls(count=count, address=address)

    def ahead(self, has: Callable[[int], bool]) -> Ahead:
        """What has blocks prepared before their turn, but for those of which ``has`` says that they are done."""

        return lambda job, blocks: self._prepared(job, blocks, has)

    def _prepared(self, job: Job, blocks: Blocks, has: Callable[[int], bool]) -> Blocks:
        import ray

        threads = torch.get_num_threads()
        self._start(ray, threads)
        task = ray.remote(num_cpus=threads, num_gpus=int(job.device.type == "cuda"), max_retries=RETRIES)(_prepare)
        try:
            shared = ray.put((job, threads, version("microbat")))
            window: deque[tuple[FloatBlock, Any, Any]] = deque()
            last = None
            for block in blocks:
                first = last if block.follows else ray.put(_bare(block.inputs))
                last = ray.put(_bare(block.targets))
                given = dataclasses.replace(block, module=None, inputs=None, targets=None)
                block.module = None  # this process loads it anew when its turn comes
                ready = None if has(given.index) else task.remote(shared, given, first, last)
                window.append((given, (first, last), ready))
                if len(window) == 2 * self.count:
                    yield _taken(ray, job, *window.popleft())
            while window:
                yield _taken(ray, job, *window.popleft())
        finally:
            ray.shutdown()

    def _start(self, ray: Any, threads: int) -> None:
        if self.address:
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        ray.init(
            address="local",
            num_cpus=self.count * threads,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _system_config={"task_oom_retries": RETRIES},
        )


def _prepare(shared: tuple[Job, int, str], given: FloatBlock, inputs: Any, targets: Any) -> Prepared:
    """The task: one block, by itself. Threads are as many as where it was called, for equal sums."""
    job, threads, wanted = shared
    if version("microbat") != wanted:
        raise ValueError(f"microbat is {version('microbat')} on a worker, and {wanted} where the run was started")
    torch.set_num_threads(threads)
    return prepare_block(job, _with(given, [inputs, targets], job))


def _taken(ray: Any, job: Job, given: FloatBlock, streams: tuple[Any, Any], task: Any) -> FloatBlock:
    """A block with its streams, and what its task prepared; ValueError, naming the block, for one that failed for good."""
    name = given.name
    resume = "Blocks that are finished are kept: the same command, with fewer workers, goes on after them"
    try:
        prepared = None if task is None else ray.get(task)
    except ray.exceptions.OutOfMemoryError as error:
        raise ValueError(f"{name}: there was no memory for its worker ({_first_line(error)}). {resume}") from error
    except ray.exceptions.WorkerCrashedError as error:
        raise ValueError(
            f"{name}: its worker died {RETRIES + 1} times, as it does where the system has no memory for it. {resume}"
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MemoryError) or (
            isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in NO_MEMORY)
        ):
            raise ValueError(f"{name}: its worker ran out of memory ({_first_line(cause)}). {resume}") from error
        raise cause from error
    return dataclasses.replace(_with(given, ray.get(list(streams)), job), prepared=prepared)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _bare(stream: Activations) -> tuple[Any, tuple[int, ...]]:
    """A stream as Ray stores it, which knows no tensors."""
    return stream.values.cpu().numpy(), stream.lengths


def _with(given: FloatBlock, streams: Iterable[Any], job: Job) -> FloatBlock:
    """``given`` with its streams, in Ray's memory, which is read-only; nobody writes to a float stream."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        inputs, targets = (Activations(torch.from_numpy(array), lengths, job.device) for array, lengths in streams)
    return dataclasses.replace(given, inputs=inputs, targets=targets)
