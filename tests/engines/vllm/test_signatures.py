"""What this program uses of vLLM's inside, held to the installed vLLM's source: a new release that differs fails here.

The source is read and not imported, since Model Runner V2 cannot be without Triton. The fakes of test_runners.py rest
on what is written down here.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

RUNNER_V1, RUNNER_V2 = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
# File, class and method -> its first parameters after self, by name, as they are called or overridden.
METHODS = {
    (RUNNER_V1, "GPUModelRunner.execute_model"): ["scheduler_output", "intermediate_tensors"],
    (RUNNER_V1, "GPUModelRunner.sample_tokens"): ["grammar_output"],
    (RUNNER_V1, "GPUModelRunner.get_model"): [],
    (RUNNER_V2, "GPUModelRunner.execute_model"): ["scheduler_output", "intermediate_tensors", "dummy_run"],
    (RUNNER_V2, "GPUModelRunner.finish_requests"): ["scheduler_output"],
    (RUNNER_V2, "GPUModelRunner.add_requests"): ["scheduler_output"],
    (RUNNER_V2, "GPUModelRunner.sample"): ["hidden_states", "input_batch", "grammar_output"],
    (RUNNER_V2, "GPUModelRunner.sample_tokens"): ["grammar_output"],
    (RUNNER_V2, "GPUModelRunner.get_model"): [],
    ("v1/worker/gpu_worker.py", "Worker.init_device"): [],
    ("v1/worker/gpu_worker.py", "Worker.load_model"): [],
    ("v1/worker/cpu_worker.py", "CPUWorker.init_device"): [],
    ("v1/outputs.py", "AsyncModelRunnerOutput.get_output"): [],
    ("v1/core/sched/scheduler.py", "Scheduler.add_request"): ["request"],
    ("v1/core/sched/scheduler.py", "Scheduler.finish_requests"): ["request_ids", "finished_status"],
    ("v1/core/sched/scheduler.py", "Scheduler.update_from_output"): ["scheduler_output", "model_runner_output"],
    ("v1/engine/core_client.py", "AsyncMPClient.get_output_async"): [],
    ("v1/engine/async_llm.py", "AsyncLLM.generate"): ["prompt", "sampling_params", "request_id"],
    ("v1/engine/async_llm.py", "AsyncLLM.collective_rpc"): ["method", "timeout", "args"],
    ("v1/engine/async_llm.py", "AsyncLLM.shutdown"): [],
    ("v1/engine/async_llm.py", "AsyncLLM.errored"): [],
    ("v1/metrics/loggers.py", "StatLoggerBase.record"): ["scheduler_stats", "iteration_stats"],
    ("v1/metrics/loggers.py", "StatLoggerBase.log_engine_initialized"): [],
    ("v1/sample/logits_processor/interface.py", "LogitsProcessor.validate_params"): ["sampling_params"],
    ("v1/worker/gpu/sample/logits_processor/interface.py", "LogitsProcessor.validate_params"): ["sampling_params"],
    ("v1/worker/gpu/sample/logits_processor/interface.py", "LogitsProcessor.add_request"): [
        "req_idx", "sampling_params",
    ],
}  # fmt: skip
# File and class -> what is read of its objects.
NAMES = {
    ("v1/outputs.py", "ModelRunnerOutput"): ["req_ids", "sampled_token_ids"],
    ("v1/core/sched/output.py", "NewRequestData"): ["req_id", "sampling_params", "prompt_len"],
    ("v1/core/sched/output.py", "SchedulerOutput"): [
        "scheduled_new_reqs", "finished_req_ids", "preempted_req_ids", "num_scheduled_tokens",
    ],
    ("v1/worker/gpu_input_batch.py", "InputBatch"): ["req_ids", "num_computed_tokens_cpu"],
    (RUNNER_V1, "GPUModelRunner"): ["input_batch", "discard_request_mask"],
    ("v1/worker/gpu/input_batch.py", "InputBatch"): [
        "req_ids", "num_computed_tokens_np", "num_scheduled_tokens", "prefill_len_np", "logits_indices",
    ],
    ("v1/worker/gpu_worker.py", "Worker"): ["use_v2_model_runner", "model_runner"],
    ("v1/engine/__init__.py", "EngineCoreOutput"): [
        "request_id", "new_token_ids", "finish_reason", "kv_transfer_params",
    ],
    ("v1/engine/__init__.py", "EngineCoreOutputs"): ["outputs"],
    ("v1/metrics/stats.py", "SchedulerStats"): [
        "num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "kv_cache_usage",
    ],
    ("v1/metrics/stats.py", "RequestStateStats"): ["queued_ts", "scheduled_ts", "first_token_ts"],
    ("model_executor/layers/logits_processor.py", "LogitsProcessor"): ["soft_cap", "scale"],
    ("sampling_params.py", "SamplingParams"): ["extra_args", "output_kind", "detokenize", "stop_token_ids"],
    ("engine/arg_utils.py", "EngineArgs"): [
        "model", "dtype", "max_model_len", "max_num_seqs", "enable_prefix_caching", "tensor_parallel_size",
        "pipeline_parallel_size", "distributed_executor_backend", "load_format", "trust_remote_code",
        "generation_config", "skip_tokenizer_init", "disable_log_stats", "worker_cls", "scheduler_cls",
        "additional_config", "kv_cache_memory_bytes", "logits_processors",
    ],
    ("config/parallel.py", "ParallelConfig"): ["enable_batch_sharded_sampling", "tensor_parallel_size"],
    ("config/vllm.py", "VllmConfig"): ["speculative_config", "lora_config", "diffusion_config", "additional_config"],
}  # fmt: skip
# Function -> how often it speaks of `compute_logits`: one more place would be edited, or left unedited, by mistake.
USES = {
    RUNNER_V1: {"execute_model": 2, "_get_prompt_logprobs_dict": 1, "_dummy_sampler_run": 1},
    RUNNER_V2: {"sample": 1, "sample_tokens": 2, "_dummy_sampler_run": 1},
}


@cache
def tree(file: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / file).read_text())


def class_of(file: str, name: str) -> ast.ClassDef:
    return next(node for node in tree(file).body if isinstance(node, ast.ClassDef) and node.name == name)


@pytest.mark.parametrize(("file", "method"), METHODS)
def test_a_method_takes_what_it_is_given(file: str, method: str) -> None:
    owner, name = method.split(".")
    (function,) = [
        node
        for node in class_of(file, owner).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    expected = METHODS[file, method]
    arguments = [argument.arg for argument in function.args.args][1:]
    assert arguments[: len(expected)] == expected
    required = len(arguments) - len(function.args.defaults)
    assert required <= len(expected)


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_an_object_has_what_is_read_of_it(file: str, name: str) -> None:
    found: set[str] = set()
    for node in ast.walk(class_of(file, name)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.arg):
            found.add(node.name if isinstance(node, ast.FunctionDef) else node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    assert set(NAMES[file, name]) <= found


@pytest.mark.parametrize("file", USES)
def test_logits_are_computed_where_they_were(file: str) -> None:
    found: dict[str, int] = {}
    for node in class_of(file, "GPUModelRunner").body:
        if isinstance(node, ast.FunctionDef):
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "compute_logits"]
            if uses:
                found[node.name] = len(uses)
    assert found == USES[file]


def test_a_runners_output_can_carry_a_report_and_a_schedulers_stay_in_order() -> None:
    output = class_of("v1/outputs.py", "ModelRunnerOutput")
    assert [ast.unparse(decorator) for decorator in output.decorator_list] == ["dataclass"]
    source = ast.unparse(class_of("v1/engine/async_llm.py", "AsyncLLM"))
    assert "outputs = await engine_core.get_output_async()" in source


def test_runner_v2_throws_a_token_away_while_there_is_more_to_be_computed_first() -> None:
    assert "is_chunked_prefilling = seq_len < prefill_len" in ast.unparse(tree("v1/worker/gpu/input_batch.py"))
    assert "all_token_ids=new_req_data.prefill_token_ids" in ast.unparse(class_of(RUNNER_V2, "GPUModelRunner"))
