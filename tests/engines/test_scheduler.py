from server.engines.embedded.core import EngineCore
from server.types import GenerationChunk, GenerationRequest, SamplingParams


def add(core: EngineCore, name: str, prompt_len: int, max_tokens: int, log: list[str]) -> None:
    def emit(chunk: GenerationChunk) -> None:
        log.extend([name] * len(chunk.token_ids))

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    core.add(core.sequences(GenerationRequest(name, tuple(i % 250 for i in range(prompt_len)), sampling), emit))


def test_a_running_row_gets_a_token_at_every_step_while_a_long_prompt_comes_in(core: EngineCore) -> None:
    log: list[str] = []
    add(core, "short", 3, 30, log)
    core.step()
    add(core, "long", 220, 5, log)
    for step in range(2, 9):
        core.step()
        assert log.count("short") == step
    assert "long" in log


def test_a_request_joins_and_leaves_between_any_two_steps(core: EngineCore) -> None:
    log: list[str] = []
    add(core, "a", 4, 6, log)
    core.step()
    add(core, "b", 4, 2, log)
    core.step()
    core.step()
    assert log == ["a", "a", "b", "a", "b"]
    assert core.status().num_running == 1


def test_those_who_wait_are_served_in_their_order(core: EngineCore) -> None:
    log: list[str] = []
    for i in range(20):
        add(core, f"{i:02}", 4, 1, log)
    assert core.status().num_waiting == 20
    while core.has_work:
        core.step()
    assert log == sorted(log)


def test_memory_for_keys_and_values_grows_with_use(core: EngineCore) -> None:
    kv = core._runner.kv
    assert kv.capacity < 128
    add(core, "long", 200, 3, [])
    while core.has_work:
        core.step()
    assert 203 <= kv.capacity <= core.max_model_len
