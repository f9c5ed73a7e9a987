"""The scheduler class for `--scheduler-cls`: vLLM's own, whose outputs also tell what the edits did.

A step's report comes from the worker with the step's tokens, and leaves with them in each output's
`kv_transfer_params`, which vLLM hands to its front end as they are. So an edit never gets apart from its token. For
this program's engine every token's edit is sent; in a plain vLLM server, where nobody would read them, a summary with
the last token. A request whose control failed ends with an error. Enter at `ControlScheduler`.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.engine import FinishReason  # pyright: ignore[reportMissingImports]
from vllm.v1.request import RequestStatus  # pyright: ignore[reportMissingImports]

from server.engines.vllm.delivery import Delivery
from server.engines.vllm.wire import REPORT_KEY

_log = logging.getLogger(__name__)


class ControlScheduler:
    """Makes vLLM's asynchronous scheduler or its other one, as the configuration has it; neither does for both."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        kind = _AsyncControlScheduler if vllm_config.scheduler_config.async_scheduling else _ControlScheduler
        return kind(vllm_config, *args, **kwargs)


class _Reporting:
    """What is added to either."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._delivery = Delivery()

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        if request.sampling_params is not None:
            self._delivery.expect(request.request_id, request.sampling_params.extra_args)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        report = getattr(model_runner_output, REPORT_KEY, None)
        for output in (output for client in outputs.values() for output in client.outputs):
            fault = self._delivery.fill(output, report)
            if fault is not None:
                _log.error("Request %s ends with an error: %s", output.request_id, fault)
                # Harmless for one that has just ended by itself.
                self.finish_requests(output.request_id, RequestStatus.FINISHED_ERROR)
                output.finish_reason, output.new_token_ids = FinishReason.ERROR, []
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        finished = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        self._delivery.forget(request.request_id for request in finished)
        return finished


class _ControlScheduler(_Reporting, Scheduler): ...


class _AsyncControlScheduler(_Reporting, AsyncScheduler): ...
