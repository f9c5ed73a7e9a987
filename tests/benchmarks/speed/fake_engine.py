"""A peer for tests, run by `workers/main.py`: it prints where libraries print, and dies or lies when it is told to."""

import os
import signal
import subprocess
import time


class Engine:
    def __init__(self, options):
        print("loading, said on stdout")
        if os.environ.get("FAKE_ENGINE") == "cannot load":
            raise OSError("no such weights")
        self._num_batches = 0

    def facts(self):
        return {"device": "none", "threads": int(os.environ["OMP_NUM_THREADS"])}

    def generate(self, prompts, new_tokens, seed, objectives):
        os.write(1, b"generating, said on descriptor 1\n")
        subprocess.run(["echo", "said by a child"], check=True)
        self._num_batches += 1
        if os.environ.get("FAKE_ENGINE") == "dies" and self._num_batches == 4:
            os._exit(7)
        if os.environ.get("FAKE_ENGINE") == "illegal" and self._num_batches == 4:
            os.kill(os.getpid(), signal.SIGILL)
        time.sleep(0.001 * new_tokens)
        return {"num_tokens": len(prompts) * new_tokens - (os.environ.get("FAKE_ENGINE") == "stops early")}

    def gpu_peak_bytes(self):
        return None
