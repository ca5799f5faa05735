"""An audit on several devices or machines, through Ray: one actor per device, a chunk at a time.

The chunks are the plan's own, so the records depend neither on how many workers there are nor on
which of them measured what. A worker that is lost (killed, its machine gone) is replaced, and its
chunk is done again. Only this process writes the run folder. Needs the extra ``cluster``.
"""

from __future__ import annotations

import logging
import os
import platform
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..allocator import keep_freed_memory
from .chunk import Chunk, failed_chunk
from .folder import AuditError
from .worker import Described, Worker

if TYPE_CHECKING:
    from .plan import AuditPlan, Picture

logger = logging.getLogger(__name__)

LOCAL = "local"
# Workers that one chunk may cost before its pictures are recorded as failed, and workers that may
# be lost in a row before one of them has begun.
_ATTEMPTS = 3


class Device(Worker):
    """One worker in a process of Ray's; what it raises comes back to the one that asked."""

    def __init__(self, plan: AuditPlan, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        if Path(folder).is_dir():  # relative paths of the plan are the user's
            os.chdir(folder)
        super().__init__(plan, folder=folder)

    def begin(self) -> tuple[dict[str, Any], str]:
        """Loads the model; returns what measures, and where."""
        self.__enter__()
        return self.describe(), f"process {os.getpid()} on {platform.node()}"

    def run(self, pictures: Sequence[Picture]) -> tuple[Described, Chunk]:
        """Measures one chunk; the conditions whose pipeline was made for it stand first."""
        return self.prepare(pictures), self.measure(pictures)

    def give_up(self, pictures: Sequence[Picture], reason: str) -> tuple[Described, Chunk]:
        """Returns the records of a chunk that no worker survived."""
        return {}, failed_chunk(self._pipe, self._plan, pictures, "worker_lost", reason)


class Cluster(AbstractContextManager["Cluster"]):
    """Measures chunks on Ray's workers, in whatever order they come back.

    Args:
        plan: What to draw and measure.
        address: ``"local"`` to start Ray on this machine, or the address of a cluster.
        workers: How many; default one per GPU if the plan draws on them, else one per ``threads``
            CPUs.
        threads: CPU threads of each worker. Sums of another number of threads may differ in their
            last bits, so it is the same for all.
    """

    def __init__(
        self, plan: AuditPlan, address: str, *, workers: int | None = None, threads: int = 1
    ) -> None:
        if min(1 if workers is None else workers, threads) < 1:
            raise ValueError(
                f"expected at least one worker and one thread, got {workers} and {threads}"
            )
        self._ray = _ray()
        self._plan = plan
        self._address = address
        self._workers = workers
        self._threads = threads
        self._folder = str(Path.cwd())
        self._started = False  # Ray was started here, and is shut down here
        self._actors: list[Any] = []
        self._idle: deque[Any] = deque()
        self._jobs: dict[Any, tuple[Any, tuple[int, list[Picture]] | None]] = {}
        self._description: dict[str, Any] | None = None
        self._unbegun = 0

    def __enter__(self) -> Cluster:
        self._connect()
        try:
            gpus = torch.device(self._plan.device).type == "cuda"
            resources = self._ray.cluster_resources()
            room = int(resources.get("GPU" if gpus else "CPU", 0)) // (1 if gpus else self._threads)
            wanted = self._workers or room
            if not 0 < wanted <= room:
                unit = "one GPU" if gpus else f"{self._threads} CPU"
                raise AuditError(
                    f"the cluster {self._address!r} has room for {room} workers of {unit} each, "
                    f"asked for {self._workers or 'one at least'}; the plan draws on "
                    f"{self._plan.device!r}"
                )
            self._make = self._ray.remote(Device).options(
                num_cpus=1 if gpus else self._threads, num_gpus=int(gpus), max_restarts=0
            )
            for _ in range(wanted):
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def describe(self) -> dict[str, Any]:
        """Returns what measures, once a first worker has loaded the model."""
        while self._description is None:
            self._next(None)
        return self._description

    def wait_for_all(self) -> None:
        """Waits until every worker has loaded the model; an audit need not."""
        while self._jobs:
            self._next(None)

    def results(
        self, todo: Sequence[tuple[int, list[Picture]]]
    ) -> Iterator[tuple[Described, int, Chunk | None]]:
        """Yields conditions whose pipeline was just made, then the chunk itself, in any order."""
        queue, lost = deque(todo), Counter[int]()
        while queue or any(work is not None for _, work in self._jobs.values()):
            while queue and self._idle:
                self._hand_out(queue.popleft(), lost)
            done = self._next(queue)
            if done is None:
                continue
            (index, _), result = done
            if result is None:
                lost[index] += 1
                continue
            entered, chunk = result
            if entered:
                yield entered, index, None
            yield {}, index, chunk

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        # Of Ray's coming default: a worker without a GPU sees the machine's, and does not use it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        settings: dict[str, Any] = {"logging_level": logging.WARNING, "include_dashboard": False}
        if self._address == LOCAL:
            settings["address"] = "local"
            if self._workers is not None:
                settings["num_cpus"] = self._workers * self._threads
        else:
            settings = {"logging_level": logging.WARNING, "address": self._address}
        try:
            self._ray.init(**settings)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise AuditError(
                f"there is no Ray cluster at {self._address!r}: {' '.join(str(error).split())}. "
                "Start one with `ray start --head`, or give 'local'. If it asks for a token, set "
                "RAY_AUTH_MODE=token here too"
            ) from error
        self._started = True

    def _start(self) -> None:
        """Starts one worker; it counts as running until its model is loaded."""
        actor = self._make.remote(self._plan, self._folder, self._threads)
        self._actors.append(actor)
        self._jobs[actor.begin.remote()] = (actor, None)

    def _hand_out(self, work: tuple[int, list[Picture]], lost: Counter[int]) -> None:
        index, pictures = work
        actor = self._idle.popleft()
        if lost[index] < _ATTEMPTS:
            job = actor.run.remote(pictures)
        else:
            reason = f"{lost[index]} workers were lost while they measured its chunk"
            job = actor.give_up.remote(pictures, reason)
        self._jobs[job] = (actor, work)

    def _next(self, queue: deque[tuple[int, list[Picture]]] | None) -> Any:
        """Waits for one job: ``(work, result)``, without result if its worker was lost."""
        (job,), _ = self._ray.wait(list(self._jobs), num_returns=1)
        actor, work = self._jobs.pop(job)
        try:
            result = self._ray.get(job)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # of the worker: an AuditError, a ModelError, ...
        except self._ray.exceptions.RayError as error:
            self._replace(actor, work, error)
            if work is None or queue is None:
                return None
            queue.appendleft(work)
            return work, None
        self._idle.append(actor)
        if work is None:
            self._check(*result)
            return None
        return work, result

    def _replace(self, actor: Any, work: Any, error: Exception) -> None:
        """Starts another worker in the place of one that is gone."""
        reason = str(error).strip().partition("\n")[0]
        self._unbegun += work is None
        if self._unbegun >= _ATTEMPTS:
            raise AuditError(
                f"{self._unbegun} workers were lost before they had loaded the model ({reason}); "
                "what was measured before is kept: start the same audit again"
            ) from error
        what = "before it began" if work is None else f"with chunk {work[0]}, which is done again"
        logger.warning("a worker was lost %s: %s", what, reason)
        self._actors.remove(actor)
        self._start()

    def _check(self, description: dict[str, Any], where: str) -> None:
        """Every worker must measure with the first one's weights."""
        self._unbegun = 0
        logger.info("a worker has begun: %s", where)
        if self._description is None:
            self._description = description
            return
        for name in ("weights_sha256", "scheduler_config", "versions"):
            first, other = self._description[name], description[name]
            if first == other:
                continue
            if name == "versions":
                logger.warning("%s has other versions: %s, the first %s", where, other, first)
                continue
            raise AuditError(
                f"{where} has another {name} than the first worker: expected {first}, got {other}. "
                "Records of two models must not be mixed"
            )


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ImportError(
            'an audit on a cluster needs ray: pip install "biasmap-fast[cluster]"', name="ray"
        ) from error
    return ray
