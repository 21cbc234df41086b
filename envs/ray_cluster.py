"""Connection to a Ray cluster: its address, what it has, and errors of what happens on its nodes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Final
from urllib.parse import urlsplit

from specgym.decoding import SpecgymError, Terminated

MOST_LOST: Final = 3
"""Workers that may be lost with one task, or here one after another; Ray's own default for tasks (Ray 2.60)."""
_CONNECT_SECONDS: Final = 5.0
_UNITS: Final = 10_000
"""Parts of a resource that Ray tells apart (`MIN_RESOURCE_GRANULARITY` in `_private/ray_constants.py`, Ray 2.60)."""
_ROOT: Final = Path(__file__).resolve().parent.parent


class WorkerError(SpecgymError, RuntimeError):
    """There are no workers to be had, or too many were lost; the message says why and what to do."""


_cluster: ModuleType | None = None
_terminated = False


def cluster() -> Any:
    """Return the `ray` module within `on_ray`, else None."""
    return _cluster


@contextlib.contextmanager
def on_ray(option: Sequence[str] | None) -> Iterator[None]:
    """Let `run_tasks` use a Ray cluster.

    Args:
        option: value of a command's option ``--ray``: None where it was left out, and nothing happens; without an
            address the cluster that this machine belongs to, or a new one of this machine alone; or one address:
            ``auto`` or ``host:port`` of a cluster, ``ray://host:port`` of its Ray Client server, ``local``. Where Ray
            is connected already, it is used as it is.

    Raises:
        WorkerError: Ray is not installed, or nobody answers at the address.
    """
    global _cluster, _terminated
    if option is None:
        yield
        return
    if len(option) > 1:
        raise WorkerError(f"--ray takes one address, or none for this machine; got {' '.join(option)}")
    address = option[0] if option else None
    if address is not None:
        _check_address(address)
    try:
        import ray
    except ImportError as error:
        raise WorkerError('--ray needs Ray, which is not installed: pip install "specgym[ray]"') from error
    connected = ray.is_initialized()
    before, _terminated = _cluster, False
    with _noting_termination():
        if not connected:
            _connect(ray, address)
        _cluster = ray
        try:
            yield
        finally:
            _cluster = before
            if not connected:
                ray.shutdown()


@contextlib.contextmanager
def _noting_termination() -> Iterator[None]:
    """Remember that SIGTERM came, whatever its handler raises."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    act = handler

    def note(number: int, frame: FrameType | None) -> None:
        global _terminated
        _terminated = True
        act(number, frame)

    signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        if not _terminated:  # else the handler may have put another in its place
            signal.signal(signal.SIGTERM, handler)


def _connect(ray: Any, address: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or the first start asks, or says that it reports them
    # Workers of a cluster that runs already know nothing of the checkout, or the path, that this process imports from.
    path = os.pathsep.join(
        dict.fromkeys([str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    checkout = {"env_vars": {"PYTHONPATH": path}} if (_ROOT / "setup.cfg").is_file() else {}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    local = {} if address is not None and "://" in address else {"include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, runtime_env=checkout, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        # With an address Ray looks for a token only if it is told to (`ray.init` in `_private/worker.py`, Ray 2.60).
        token = (
            "" if address in (None, "auto", "local") else "; where the cluster asks for a token, RAY_AUTH_MODE=token"
        )
        raise WorkerError(f"--ray: cannot use Ray at {address or 'this machine'}: {reason}{token}") from error
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's own ends the driver at once (`_private/worker.py`, Ray 2.60)


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself gave up on one after 5 minutes (Ray 2.60)."""
    if address in ("auto", "local"):
        return
    scheme = host = port = None
    with contextlib.suppress(ValueError):
        place = urlsplit(address if "://" in address else f"//{address}")
        scheme, host, port = place.scheme, place.hostname, place.port
    if scheme not in ("", "ray") or not host or not port:
        raise WorkerError(
            f"--ray takes auto, local, host:port or ray://host:port, got {address!r}; `ray start --head` says the "
            "address of a cluster that it starts"
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise WorkerError(
            f"--ray: nobody answers at {address} ({error}); `ray start --head` starts a cluster, and says its address"
        ) from error


def share_of(resource: str, processes: int) -> float:
    """Return how much each of some processes asks Ray for: one, or a part if there are fewer; 0 without any.

    Args:
        resource: "CPU" or "GPU".
        processes: how many there will be at a time.
    """
    there = int(cluster().cluster_resources().get(resource, 0))
    if not there:
        return 0.0
    # As many on each, so that no node is too small; rounded down as Ray counts, or the last would wait for ever.
    return math.floor(_UNITS / -(-processes // there)) / _UNITS


def warn_unless_roomy(name: str, cpus: float, gpus: float) -> None:
    """Log a warning unless a node of the cluster is large enough for a task, which else waits for one to be added."""
    nodes = [node["Resources"] for node in cluster().nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        also = f" and {gpus:g} GPU" if gpus else ""
        logging.getLogger(__name__).warning(
            f"{name} waits for a node with {cpus:g} CPUs{also}; the cluster has none (fewer --threads need fewer CPUs)"
        )


@contextlib.contextmanager
def ray_errors(ray: Any, name: str, way_on: str) -> Iterator[None]:
    """Raise what a task raised as it was raised there, the loss of its worker as a WorkerError, and SIGTERM as such.

    Args:
        ray: the module.
        name: of the task, for the message.
        way_on: what to do when its worker was lost too often, the end of a sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        if _terminated:  # of whatever a handler raises inside a call, Ray makes a KeyboardInterrupt (Ray 2.60)
            raise Terminated from None
        raise
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
            raise error.cause from None
        raise
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.RayActorError,
    ) as error:
        raise lost_workers([name], f"see the logs of its node; {way_on}") from error


@contextlib.contextmanager
def named_node() -> Iterator[None]:
    """Name the node in errors of what it lacks, such as a model by its path."""
    try:
        yield
    except SpecgymError as error:
        where = f"on node {socket.gethostname()}, which needs every file that is named by a path"
        error.args = (f"{error} ({where})",)
        raise


def lost_workers(names: Sequence[str], way_on: str) -> WorkerError:
    """Return the error of tasks whose workers were lost too often, with their names and a way out."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return WorkerError(
        f"{', '.join(names[:3])}{more}: the worker was lost {MOST_LOST + 1} times, killed perhaps for lack of memory; "
        f"{way_on}"
    )
