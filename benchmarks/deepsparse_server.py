"""Times a network in DeepSparse 1.8, in a Python environment of its own (it needs an old numpy): see peers.py.

    python deepsparse_server.py MODEL.onnx BATCH THREADS

Compiles the model, prints "ready", then answers each line ``CALLS`` on standard input with that many latencies in
seconds, in one line, and "check" with the first output.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from deepsparse import Engine


def main(path: str, batch: int, threads: int) -> None:
    engine = Engine(path, batch_size=batch, num_cores=threads)
    x = [np.ascontiguousarray(np.load(path + ".x.npy"))]
    engine.run(x)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "check":
            np.save(path + ".y.npy", engine.run(x)[0])
            print("done", flush=True)
            continue
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            engine.run(x)
            seconds.append(time.perf_counter() - start)
        print(*seconds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
