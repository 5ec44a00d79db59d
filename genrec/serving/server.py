"""One Triton Inference Server as a child process: started, watched until it is ready, and stopped without a trace."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from genrec.export.triton_server import Repository
from genrec.serving.program import Program, model_arguments

SHARED_MEMORY = Path("/dev/shm")  # where the server and its stubs exchange tensors
PATIENCE = 15  # seconds that requests under way are given when the server is stopped


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    host: str = "127.0.0.1"

    def check(self) -> None:
        """Raises ValueError for two equal ports, OSError for one that is not free."""
        numbers = {name: port for name, port in asdict(self).items() if name != "host"}
        if len(set(numbers.values())) < len(numbers):
            raise ValueError(f"ports are {list(numbers.values())}; expected three different ones")
        for name, port in numbers.items():
            if not 1 <= port <= 65535:
                raise ValueError(f"{name}_port is {port}; expected 1 to 65535")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise OSError(
                        f"{name}_port {port} cannot be had on {self.host} ({error.strerror}); stop what listens there "
                        f"or pass another --{name}_port"
                    ) from None


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    ports: Ports
    log: Path

    def wait(self, check: Callable[[], None]) -> None:
        """Until `check` raises, or it ends, which it does not by itself: raises OSError with its last words."""
        while self.process.poll() is None:
            check()
            time.sleep(0.1)
        raise OSError(f"tritonserver ended with exit code {self.process.returncode}: {last_words(self.log)}")


@contextmanager
def running(
    repository: Repository,
    program: Program,
    ports: Ports,
    log: Path,
    timeout: float = 120.0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Server]:
    """A server on the repository's models, ready; it and its stubs are gone when the block ends, however it ends.

    Raises OSError for a port that is not free, for a server that dies while it loads or is not ready after `timeout`
    seconds, and what `check` raises, which is called while the models load. The server's own words go to `log`.
    """
    ports.check()
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="genrec-serve-") as scratch, open(log, "wb") as words:
        process = subprocess.Popen(
            _command(repository, program, ports, Path(scratch)),
            env={**os.environ, **program.environment},
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone: we stop the server in good order
        )
        try:
            _wait_until_ready(process, ports, log, timeout, check)
            yield Server(process, ports, log)
        finally:
            _stop(process)
            for region in SHARED_MEMORY.glob(f"{Path(scratch).name}*"):  # a server that was killed leaves its own
                region.unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """What went wrong at last, as the server's log tells it, else the log's last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    wrong = [found[1] for line in lines if (found := re.match(r'E\d{4} .*?\] "(.*?)(\\n|"$)', line))]
    wrong = [message for message in wrong if "CudaDriverHelper" not in message]  # said wherever there is no GPU
    return (wrong or [line for line in lines if line.startswith("error:")] or lines or [f"{log} is empty"])[-1]


def _command(repository: Repository, program: Program, ports: Ports, scratch: Path) -> list[str]:
    backends = []
    if program.backend and program.stub:
        backend = scratch / "backends" / "python"
        shutil.copytree(program.backend, backend)
        shutil.copy(program.stub, backend / program.stub.name)  # the backend looks for it beside itself
        backends = [f"--backend-directory={backend.parent}"]
    return [
        str(program.executable),
        f"--model-repository={repository.directory.resolve()}",
        *model_arguments(repository, repository.directory.resolve()),
        *backends,
        f"--backend-config=python,shm-region-prefix-name={scratch.name}-",
        *(f"--{name}-address={ports.host}" for name in ("http", "grpc", "metrics")),
        *(f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")),
        f"--exit-timeout-secs={PATIENCE}",
    ]


def _wait_until_ready(
    process: subprocess.Popen[bytes], ports: Ports, log: Path, timeout: float, check: Callable[[], None]
) -> None:
    deadline = time.monotonic() + timeout
    while not _ready(ports):
        check()
        if process.poll() is not None:
            raise OSError(f"tritonserver ended with exit code {process.returncode} at its start: {last_words(log)}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"tritonserver is not ready after {timeout:g} seconds; its log is {log}")
        time.sleep(0.1)


def _ready(ports: Ports) -> bool:
    try:
        with urllib.request.urlopen(f"http://{ports.host}:{ports.http}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, then kill whatever is left of its session: the server first, and stubs that outlive it."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE + 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
