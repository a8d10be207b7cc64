"""Several processes of one program that find each other, started in a tenth of a second; torchrun takes four.

    python tests/shared/ranks.py COUNT SCRIPT [ARGUMENT...]

Like torchrun it ends all of them when one fails, and then exits with 1.
"""
import os
import socket
import subprocess
import sys
import time


def main() -> int:
    count, command = int(sys.argv[1]), [sys.executable, *sys.argv[2:]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
             "LOCAL_WORLD_SIZE": str(count)}
    ranks = [subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(count)]
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    return int(any(rank.returncode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
