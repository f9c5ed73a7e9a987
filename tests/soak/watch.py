"""The server under soak: started as anyone starts it, watched from outside by its process, its metrics and its log."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.speed.models import kv_bytes_per_token, text_config
from benchmarks.speed.servers import OUR_COMMAND, Server, free_port
from benchmarks.speed.setup import ModelSetup
from tests.soak.bad_input import MAX_BODY_BYTES
from tests.soak.client import MAX_CONNECTIONS
from tests.soak.plan import RECEIVE_TIMEOUT_S, SEND_TIMEOUT_S

KEY = "soak-key-of-no-secret"
_READY_S = 600.0
_SAMPLE = re.compile(r"^recontrol_(\w+?)\{(.*)\} (\S+)$", re.MULTILINE)
_ROWS, _WAITING = 16, 32
_PAGES_A_ROW = 2.0
"""Fewer than long rows need, so that some must give theirs up on the way."""
_MAX_LEN = 1536
_PAGE_TOKENS = 64
_REFUSED = (400, 404)
_LET_GO = "A client does not read"


@dataclass(slots=True, frozen=True)
class Metrics:
    """A scrape."""

    running: float
    waiting: float
    kv_cache_usage: float
    new_tokens: float
    ended: dict[str, int]
    """Sequences by finish reason."""

    @property
    def is_idle(self) -> bool:
        return self.running == self.waiting == self.kv_cache_usage == 0


@dataclass(slots=True, frozen=True)
class Held:
    """What a process has of the machine."""

    rss_bytes: int
    threads: int
    open_files: int
    """And sockets."""


class SoakedServer(Server):
    """`recontrol serve` with a small cache, few rows and a short queue, so that all of them run out."""

    def __init__(self, setup: ModelSetup) -> None:
        config = text_config(setup.folder)
        port, max_len = free_port(), min(_MAX_LEN, config.max_position_embeddings)
        pages = max(_ROWS * _PAGES_A_ROW, max_len / _PAGE_TOKENS + 1)
        cache_bytes = (pages + 1.5) * _PAGE_TOKENS * kv_bytes_per_token(config, dtype=setup.dtype)
        command = [sys.executable, "-c", OUR_COMMAND, "serve", "--model", setup.model, "--port", str(port)]
        command += ["--device", setup.device, "--dtype", setup.dtype, "--log-format", "json", "--log-level", "info"]
        command += ["--max-batch-size", str(_ROWS), "--max-waiting", str(_WAITING), "--max-model-len", str(max_len)]
        command += ["--kv-cache-gib", f"{cache_bytes / 2**30:.6f}"]
        command += ["--max-body-bytes", str(MAX_BODY_BYTES), "--max-connections", str(MAX_CONNECTIONS)]
        command += ["--receive-timeout-s", str(RECEIVE_TIMEOUT_S), "--send-timeout-s", str(SEND_TIMEOUT_S)]
        command += ["--heads-dir", str(setup.heads_dir)] if setup.heads_dir else []
        threads = {"OMP_NUM_THREADS": str(setup.threads), "RECONTROL_INSPECT_KEYS": KEY}
        threads["RECONTROL_PUBLIC_METRICS"] = "true"
        super().__init__(command, port, env=threads, log=setup.work / "soak-server.log")
        self._process = psutil.Process(self.pid)

    def wait_until_ready(self) -> dict[str, Any]:
        """The answers of /v1/models and /v1/heads. Raises PeerError."""
        with httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=_READY_S) as client:
            self.wait_until(client, "/ready", timeout_s=_READY_S)
            return {name: client.get(f"/v1/{name}").raise_for_status().json()["data"] for name in ("models", "heads")}

    def rss_bytes(self) -> int:
        return self._process.memory_info().rss

    def held(self) -> Held:
        process = self._process
        return Held(self.rss_bytes(), process.num_threads(), process.num_fds())

    def metrics(self) -> Metrics:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return parse_metrics(text)

    def health(self) -> int:
        return httpx.get(f"{self.url}/health", timeout=60).status_code


def parse_metrics(text: str) -> Metrics:
    found = {(name, labels): float(value) for name, labels, value in _SAMPLE.findall(text)}
    one = {name: value for (name, _), value in found.items()}
    reasons = {
        match[1]: int(value)
        for (name, labels), value in found.items()
        if name == "request_success_total" and (match := re.search(r'finished_reason="(\w+)"', labels))
    }
    return Metrics(
        running=one["num_requests_running"],
        waiting=one["num_requests_waiting"],
        kv_cache_usage=one["kv_cache_usage_perc"],
        new_tokens=one["generation_tokens_total"],
        ended=reasons,
    )


@dataclass(slots=True, frozen=True)
class Logged:
    """What the server's log tells."""

    statuses: dict[str, list[int]]
    """Request id -> the status of each of its lines; one line is right."""
    least_sequences: int
    """Sequences that were accepted, so many at least ..."""
    most_sequences: int
    """... and at most: of a request of several prompts that met a full queue, some prompts may have been in it."""
    errors: list[str]
    """Records of failures, and lines that are no records."""
    num_let_go: int
    """Clients that did not read."""


def read_log(path: Path) -> Logged:
    statuses: dict[str, list[int]] = {}
    errors: list[str] = []
    least = most = let_go = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            level = record["level"]
        except (ValueError, KeyError, TypeError):
            # While it loads, libraries may print what they like.
            errors += [line[:300]] * bool(statuses)
            continue
        if level in ("error", "critical"):
            errors.append(line[:300])
        let_go += str(record.get("message", "")).startswith(_LET_GO)
        if "path" in record and "status" in record:
            statuses.setdefault(record["request_id"], []).append(record["status"])
            if "prompts" in record and record["status"] not in _REFUSED:
                accepted, maybe = _sequences(record)
                least, most = least + accepted, most + maybe
    return Logged(statuses, least, most, errors, let_go)


def _sequences(record: Mapping[str, Any]) -> tuple[int, int]:
    """Accepted of one request: at least, at most."""
    if record["status"] == httpx.codes.TOO_MANY_REQUESTS:
        return 0, record["n"] * (record["prompts"] - 1)
    return record["n"] * record["prompts"], record["n"] * record["prompts"]


def growth_bytes(series: list[tuple[int, int]], warm_up: int) -> int | None:
    """Of memory after so many requests: the largest since less the largest until then; None for a shorter series."""
    before = [rss for done, rss in series if done <= warm_up]
    after = [rss for done, rss in series if done > warm_up]
    return max(after) - max(before) if before and after else None
