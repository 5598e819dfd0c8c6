"""A program that stands in for Python in tests: what forked.py can run as Python would is run there, the rest by Python itself.

forked.py copies it to a folder, behind a line that names an interpreter, with settings.json beside it.
"""

import fcntl
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Variables that are looked up whenever they are needed, and those that commands and libraries set for themselves. Whatever else
# differs from the session's may have to be there before Python or a library starts.
FREE = (
    *("COLUMNS", "OLDPWD", "PWD", "PYTEST_", "PYTHONPATH", "PYTHONSAFEPATH", "QCONVERT_", "SOURCE_DATE_EPOCH"),
    *("GOMP_SPINCOUNT", "HF_HUB_DISABLE_PROGRESS_BARS", "KMP_", "MLFLOW_", "ORT_LIB_PATH", "TORCHINDUCTOR_CACHE_DIR"),
    *("TORCH_LOGS", "TRANSFORMERS_VERBOSITY"),
)
# Files on the import path that make another Python, or another qconvert, of the process.
OTHERS = ("sitecustomize.py", "usercustomize.py", "qconvert")
LIMITS = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_STACK")


def circumstances() -> dict[str, Any]:
    """What a process inherits and a forked one can't be given: it has to be as it was when the session began."""
    limits = {name: list(resource.getrlimit(getattr(resource, name))) for name in LIMITS}
    return {"environment": dict(os.environ), "limits": limits}


def is_served(arguments: list[str], session: dict[str, Any]) -> bool:
    """Whether a process that is forked would be the one that Python makes of these arguments."""
    if len(arguments) < 2 or arguments[0] != "-m" or arguments[1].partition(".")[0] != "qconvert":
        return False
    now, before = circumstances(), dict(session)
    environment, known = now.pop("environment"), before.pop("environment")
    added = set(environment.get("PYTHONPATH", "").split(os.pathsep)) - set(known.get("PYTHONPATH", "").split(os.pathsep))
    return (
        now == before
        and all(name.startswith(FREE) for name, _ in environment.items() ^ known.items())
        and not any(Path(entry, name).exists() for entry in added for name in OTHERS)
    )


def connect(settings: dict[str, Any]) -> socket.socket:
    """A connection to the server, which is started for the first client."""
    address = FOLDER / "socket"
    connection = socket.socket(socket.AF_UNIX)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(address))
        except OSError:
            address.unlink(missing_ok=True)
            start(address, settings)
            connection.connect(str(address))
    return connection


def start(address: Path, settings: dict[str, Any]) -> None:
    import subprocess  # which most clients do without

    with socket.socket(socket.AF_UNIX) as listener, (FOLDER / "log").open("ab") as log:
        listener.bind(str(address))
        listener.listen(64)
        command = [settings["python"], "-P", settings["server"], str(listener.fileno()), str(FOLDER)]
        # A group of its own: this client's may be ended as a whole.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=settings["session"]["environment"],
            pass_fds=[listener.fileno()],
            process_group=0,
        )


def run(arguments: list[str], settings: dict[str, Any]) -> int:
    """Have a command run by the server, and give its exit code, negative for a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too, and decides
    umask = os.umask(0)
    os.umask(umask)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd()), "umask": umask}
    more = {"cores": sorted(os.sched_getaffinity(0)), "group": os.getpgid(0), "executable": str(FOLDER / "python")}
    data = json.dumps({**request, **more}).encode()
    try:
        with connect(settings) as connection:
            socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
            connection.sendall(data)
            return int.from_bytes(received(connection), "big", signed=True)
    except ConnectionError:
        sys.exit(f"the process that commands are forked off has ended, and said:\n{(FOLDER / 'log').read_text()}")


def received(connection: socket.socket) -> bytes:
    """The four bytes of an exit code. Raises ConnectionError where the server ended without it."""
    if len(answer := connection.recv(4)) < 4:
        raise ConnectionResetError
    return answer


def main() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text())
    arguments = sys.argv[1:]
    if not is_served(arguments, settings["session"]):
        os.execv(settings["python"], [settings["python"], *arguments])
    code = run(arguments, settings)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
