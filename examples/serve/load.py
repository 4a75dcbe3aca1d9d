"""Latency of the server under load on loopback: in batches, and one image at a time.

    python examples/serve/load.py nano --requests 1000 --clients 16

Starts the server twice, with ``--batch 1`` and with ``--batch N``. Each time, the clients send the images of
``examples/`` without a pause, each client the next one after its answer. Prints images per second, and the median and
the 99th percentile of a request.
"""

import argparse
import http.client
import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from server import positive

HERE = Path(__file__).resolve().parent


@contextmanager
def serving(*arguments: str) -> Iterator[int]:
    """A server in a process of its own, from its start to its end; the port that it took."""
    command = [sys.executable, str(HERE / "server.py"), "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if match := re.search(r"running on http://[\d.]+:(\d+)", line):
                    yield int(match[1])
                    break
            else:
                raise SystemExit("".join(lines))
        finally:
            process.terminate()


def client(port: int, images: Iterator[bytes]) -> list[float]:
    """The seconds of each request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seconds = []
    for image in images:
        start = time.perf_counter()
        connection.request("POST", "/classify", image, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {text}")
        seconds.append(time.perf_counter() - start)
    connection.close()
    return seconds


def measure(port: int, requests: int, clients: int) -> tuple[float, list[float]]:
    """The seconds of the whole run and of each request."""
    files = [path.read_bytes() for path in sorted(HERE.parent.glob("*.png"))]
    shares = [itertools.islice(itertools.cycle(files), i, requests, clients) for i in range(clients)]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(itertools.chain.from_iterable(pool.map(client, [port] * clients, shares)))
    return time.perf_counter() - start, seconds


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="as server.py takes it")
    for name, default in (("requests", 1000), ("clients", 16), ("batch", 16), ("wait", 5)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help="default: %(default)s")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    print(f"{args.requests} requests of {args.clients} clients\n{'':16} images/s   p50 ms   p99 ms")
    for title, batch in (("one at a time", 1), (f"batches of {args.batch}", args.batch)):
        options = ["--batch", batch, "--wait", args.wait, "--queue", 2 * args.clients]
        with serving(args.model, *map(str, options)) as port:
            measure(port, 4 * args.clients, args.clients)  # to warm up
            total, seconds = measure(port, args.requests, args.clients)
        median, high = statistics.median(seconds), statistics.quantiles(seconds, n=100, method="inclusive")[98]
        print(f"{title:16} {args.requests / total:8.0f} {median * 1000:8.1f} {high * 1000:8.1f}", flush=True)


if __name__ == "__main__":
    main()
