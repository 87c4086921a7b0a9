"""A process that has imported everything, and forks for each command of the documentation: no command waits for imports.

`start(folder)` writes two programs for the PATH, `python` and `tpn`, which pass their arguments, working directory, environment and
streams to this process. Its models of the zoo are narrow, to run a page in seconds; everything else is unchanged.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"streams"], [0, 1, 2])
    request = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ)}}
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or 1))
"""

SHORTER = {
    "train": "--epochs 1 --batch-size 2 --crop-size 64 --short-side 64 --workers 1",
    "evaluate": "--views 1x1",
    "predict": "--views 1x1",
    "features": "--views 1x1",
    "explain": "--method grad-cam",
}
"""Options added after those of the page, to do the same in less time."""


def start(folder, env):
    """Start the process; return it, and the environment in which `python` and `tpn` are its programs."""
    folder.mkdir()
    address = str(folder / "socket")
    for name in ("python", "tpn"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (folder / name).chmod(0o755)
    env = os.environ | env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, __file__, address]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    bin_of_python = Path(sys.executable).parent
    return process, env | {"PATH": os.pathsep.join((str(folder), str(bin_of_python), os.environ["PATH"]))}


def serve(address):
    narrow_networks()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            with client:
                if os.fork() == 0:
                    listener.close()
                    return answer(client)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def narrow_networks():
    import matplotlib.figure  # noqa: F401
    import small
    import torch.utils.data  # noqa: F401
    import torchvision.models  # noqa: F401

    import tpn.cli
    import tpn.predict
    import tpn.training.loop  # noqa: F401
    from tpn.zoo.checkpoints import CHECKPOINTS, Embedded

    for name, entry in CHECKPOINTS.items():
        if not isinstance(entry.source, Embedded):
            small.change_entry(name)


def answer(client):
    """Run one command in a fork, and send its exit code."""
    _, streams, _, _ = socket.recv_fds(client, len(b"streams"), 3)
    with client.makefile("rb") as file:
        request = json.load(file)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        client.send(str(os.waitstatus_to_exitcode(status) & 255).encode())
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    client.close()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    run(*request["argv"])


def run(program, *arguments):
    """Do what `python ...` or `tpn ...` does."""
    import tpn.cli

    name = Path(arguments[0]).name if arguments else ""
    sys.argv = [program, *arguments]
    excluded = {"--views", "--stride"} & set(arguments)  # windows have no views
    if name in SHORTER and not (excluded and "--views" in SHORTER[name]):
        sys.argv += SHORTER[name].split()
    if program == "tpn":
        return tpn.cli.main()
    del sys.argv[0]
    if name == "-c":
        return exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
