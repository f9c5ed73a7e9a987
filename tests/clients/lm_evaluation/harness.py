"""Runs lm-eval's own evaluation as told, in an environment that has it, and prints what it found as one line of JSON.

Run in the folder of the tasks, with a JSON list of runs: {"model", "model_args", "tasks", "is_chat"}. Prints
{"versions": {package: version}, "runs": [{task: {"metrics": {name: number}, "answers": [one of each request]}}]}.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def evaluate(run: dict[str, Any], tasks: TaskManager) -> dict[str, Any]:
    found = simple_evaluate(
        model=run["model"],
        model_args=run["model_args"],
        tasks=run["tasks"],
        apply_chat_template=run["is_chat"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    assert found is not None
    return {
        task: {"metrics": metrics(values), "answers": answers(found["samples"][task])}
        for task, values in found["results"].items()
    }


def metrics(values: dict[str, Any]) -> dict[str, float]:
    """Without their standard errors and the name of the filter."""
    return {name.removesuffix(",none"): number for name, number in values.items() if isinstance(number, float)}


def answers(samples: list[dict[str, Any]]) -> list[Any]:
    """Of each request in the order of the documents: [log-likelihood, is greedy], a log-likelihood, or a text."""
    return [answer for sample in sorted(samples, key=lambda row: row["doc_id"]) for (answer,) in sample["resps"]]


if __name__ == "__main__":
    known = TaskManager(include_path=".", include_defaults=False)
    runs = [evaluate(run, known) for run in json.loads(sys.argv[1])]
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    print(json.dumps({"versions": versions, "runs": runs}))
