"""The laws on a CUDA device, where rows agree within a tolerance and recorded steps with plain ones; `pytest -m gpu`.

Tolerances, over tiny random models whose weights are large: log-probabilities to 2e-3 nats in float32 (TF32 is off),
to 0.2 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.control.editor import StateEditor
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.sampler import RowSampling, sample
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import Results, control, on_device, random_head, run
from tests.engines.test_laws import CONTROLS, break_a_row, requests, tokens
from tests.engines.test_scheduler import small_core

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.2}
ARCHITECTURES = ["llama", "qwen2", "gemma2", "gpt2"]


def scored(count: int = 10, seed: int = 0) -> list[GenerationRequest]:
    """The laws' mix, greedy where its tokens are compared, with log-probabilities of what is drawn."""
    return [replace(r, sampling=r.sampling.model_copy(update={"logprobs": 3})) for r in requests(count, seed)]


def assert_alike(got: Results, expected: Results, tolerance: float) -> None:
    """Log-probabilities agree token by token, up to the first draw that a rounding has decided otherwise."""
    assert not any(FinishReason.ERROR in r.finish_reasons for r in (*got.values(), *expected.values()))
    compared = 0
    for key, result in expected.items():
        pairs = zip(result.chunks, got[key].chunks, strict=False)
        for mine, other in pairs:
            if not mine.logprobs or mine.token_ids != other.token_ids:
                break
            assert other.logprobs[0].logprob == pytest.approx(mine.logprobs[0].logprob, abs=tolerance)
            compared += 1
    assert compared > 0.8 * sum(len(result.token_ids) for result in expected.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_and_uncontrolled_gives_the_tokens_of_transformers_generate(
    load_tiny: Callable[..., LoadedModel], make_core: Callable[..., EngineCore], architecture: str
) -> None:
    plain, core = load_tiny(architecture, device="cuda").model, make_core(architecture, device="cuda")
    prompt = [(7 * i) % 250 for i in range(37)]
    ids = torch.tensor([prompt], device="cuda")
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0
    )[0, 37:].tolist()
    request = GenerationRequest("r", tuple(prompt), SamplingParams(max_tokens=30, temperature=0.0))
    assert run(core, [request])["r", 0].token_ids == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_agrees_with_a_mixed_batch(make_core: Callable[..., EngineCore], architecture: str, dtype: str) -> None:
    core, mixed = make_core(architecture, dtype=dtype, device="cuda"), scored()
    together = run(core, mixed, steps_between=2)
    alone: Results = {}
    for request in mixed:
        alone |= run(core, [request])
    assert_alike(alone, together, TOLERANCE[dtype])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_agrees_with_a_cpu(make_core: Callable[..., EngineCore], architecture: str) -> None:
    on_gpu, on_cpu = (run(make_core(architecture, device=device), scored(seed=1)) for device in ("cuda", "cpu"))
    assert_alike(on_gpu, on_cpu, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_batch_twice_gives_the_same_tokens(make_core: Callable[..., EngineCore], dtype: str) -> None:
    core = make_core(dtype=dtype, device="cuda")
    assert tokens(run(core, requests())) == tokens(run(core, requests()))


@pytest.mark.parametrize("null", [control({"good": 1.0}, steps=0), control({"good": 0.0})])
def test_null_control_gives_the_base_models_tokens(make_core: Callable[..., EngineCore], null: object) -> None:
    core, sampling = make_core(device="cuda", dtype="bfloat16"), SamplingParams(max_tokens=40, seed=3, logprobs=5)
    base, same = (run(core, [GenerationRequest("r", (1, 2, 3), sampling, c)])["r", 0] for c in (None, null))  # type: ignore[arg-type]
    assert same.token_ids == base.token_ids
    assert [c.logprobs for c in same.chunks] == [c.logprobs for c in base.chunks]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_control_moves_tokens_within_its_budget(make_core: Callable[..., EngineCore], architecture: str) -> None:
    steer = control({"good": 1.0}, step_size=5.0, steps=20, max_kl=0.2, max_shift=2.0)
    request = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=20, seed=3), control=steer)
    chunks = run(make_core(architecture, device="cuda"), [request])["r", 0].chunks
    assert all(chunk.edit is not None and 0 < chunk.edit.kl <= 0.2 for chunk in chunks)
    assert chunks[-1].control is not None
    assert chunks[-1].control.value_after["good"] > chunks[-1].control.value_before["good"]


def test_sequences_that_are_preempted_for_want_of_pages_end_as_they_would_alone(
    make_core: Callable[..., EngineCore],
) -> None:
    many = [
        GenerationRequest(f"r{i}", (1, 2, i), SamplingParams(max_tokens=150, seed=i, logprobs=0), CONTROLS[i % 4])
        for i in range(6)
    ]
    core = small_core(make_core, 8, device="cuda")
    together = run(core, many)
    assert all(r.finish_reasons in ([FinishReason.LENGTH], [FinishReason.STOP]) for r in together.values())
    roomy = make_core(device="cuda")
    alone: Results = {}
    for request in many:
        alone |= run(roomy, [request])
    assert_alike(together, alone, TOLERANCE["float32"])
    assert core.status().kv_cache_usage == 0


def test_a_row_that_is_not_finite_ends_alone(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(device="cuda")
    mixed = [GenerationRequest(f"r{i}", (5, i), SamplingParams(max_tokens=6, top_p=0.8, seed=i)) for i in range(4)]
    expected = tokens(run(core, mixed))
    break_a_row(core, monkeypatch)
    results = run(core, mixed)
    failed = [key for key, result in results.items() if result.finish_reasons == [FinishReason.ERROR]]
    assert len(failed) == 1
    kept = {key: ids for key, ids in tokens(results).items() if key not in failed}
    assert kept == {key: ids for key, ids in expected.items() if key not in failed}


def test_an_edit_that_is_not_finite_leaves_the_base_models_tokens(make_core: Callable[..., EngineCore]) -> None:
    core, broken = make_core(device="cuda"), random_head(4)
    broken.ascent_UD.fill_(float("nan"))
    core.use(core.registry.with_head("broken", on_device(broken, "cuda")))
    sampling = SamplingParams(max_tokens=8, seed=3)
    base, steered = (
        run(core, [GenerationRequest("r", (1, 2), sampling, c)])["r", 0] for c in (None, control({"broken": 1.0}))
    )
    assert steered.token_ids == base.token_ids
    summary = steered.chunks[-1].control
    assert summary is not None
    assert summary.nonfinite_edits == len(steered.token_ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_editing_and_drawing_do_not_wait_for_the_device(make_core: Callable[..., EngineCore], dtype: str) -> None:
    """CUDA itself watches: in this mode any synchronisation raises."""
    core = make_core(device="cuda", dtype=dtype)
    controls = [control({"good": 1.0}), None, control({"line": -1.0, "good": 0.5}), control({"line": 1.0})]
    rows = [RowSampling(1.0, 0.9, 0, (0, 0)), RowSampling(0.0, 1.0, 0, (0, 1)), RowSampling(0.7, 1.0, 5, (0, 2), 0.1)]
    rows.append(RowSampling(1.0, 1.0, 0, (0, 3)))
    hidden_BD = torch.randn(4, 32, device="cuda", dtype=getattr(torch, dtype))
    editor = StateEditor(core.lm_head)

    def once() -> torch.Tensor:
        plan = editor.plan(controls, core.registry, device=hidden_BD.device)
        logits_BV, _ = editor.logits(hidden_BD, plan)
        return sample(logits_BV, rows, [0, 1, 2, 3])

    with torch.inference_mode():
        expected = once()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = once()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


def test_a_step_of_all_that_changes_logits_does_not_wait_for_the_device(make_core: Callable[..., EngineCore]) -> None:
    """From the states to the next step's launch, with penalties, bias, log-probabilities and heads of every kind."""
    core, asking = make_core(device="cuda"), {"max_tokens": 40, "ignore_eos": True, "logprobs": 3, "top_p": 0.9}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {9: 2.0}}
    for i, steer in enumerate([None, control({"line": 1.0}), control({"good": 1.0})]):
        sampling = SamplingParams(seed=i, **asking, **(penalties if i < 2 else {}))
        core.add(core.sequences(GenerationRequest(f"r{i}", (5, 6, i), sampling, steer), lambda _: None))
    for _ in range(6):
        core.step()
    assert core._ahead is not None
    with torch.inference_mode():
        rows, hidden_BD = core._computed(*core._ahead)
        torch.cuda.set_sync_debug_mode("error")
        try:
            core._ahead = core._launch_behind(core._draw(rows, hidden_BD))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(rows) == 3
    core.abort_all()


def test_steps_that_are_launched_ahead_give_the_tokens_of_one_after_the_other(
    make_core: Callable[..., EngineCore],
) -> None:
    ahead, after = (run(make_core(device="cuda", runs_ahead=runs_ahead), scored()) for runs_ahead in (True, False))
    assert_alike(ahead, after, TOLERANCE["float32"])


def test_an_edit_that_is_recorded_is_the_plain_one_for_other_states_too(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(device="cuda")
    editor, hidden_BD = StateEditor(core.lm_head), torch.randn(4, 32, device="cuda")
    rows = [control({"line": weight}, step_size=2.0, max_kl=0.1) for weight in (1.0, -1.0, 3.0)]
    plan = editor.plan([*rows, None], core.registry, device=hidden_BD.device)
    with torch.inference_mode():
        editor.logits(hidden_BD, plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded_BV, _ = editor.logits(hidden_BD, plan)
        hidden_BD.copy_(torch.randn(4, 32, device="cuda"))
        graph.replay()
        expected_BV, _ = editor.logits(hidden_BD, plan)
    torch.testing.assert_close(recorded_BV, expected_BV)


def test_a_recorded_step_is_the_plain_one(make_core: Callable[..., EngineCore]) -> None:
    requests = [GenerationRequest(f"r{i}", (1, 2, 3 + i), SamplingParams(max_tokens=20, seed=i)) for i in range(5)]
    plain, core = make_core(device="cuda"), make_core(device="cuda")
    plain.runner.graphs = None
    assert core.runner.graphs is not None
    expected, got = run(plain, requests), run(core, requests)
    assert {key: r.token_ids for key, r in got.items()} == {key: r.token_ids for key, r in expected.items()}
