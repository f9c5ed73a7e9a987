import pytest

from server.engines.embedded import attention
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
    kv = core.runner.kv
    assert kv.capacity < 128
    add(core, "long", 200, 3, [])
    while core.has_work:
        core.step()
    assert 203 <= kv.capacity <= core.max_model_len


def test_a_cache_that_could_not_grow_grows_when_it_can(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    add(core, "short", 3, 2, log)
    core.step()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_grown", lambda *_: 1 / 0)
        add(core, "long", 100, 2, log)
        while core.has_work:
            core.step()
    assert "long" not in log
    for name, length in (("after", 3), ("longer", 150)):
        add(core, name, length, 2, log)
        while core.has_work:
            core.step()
        assert log.count(name) == 2


def test_a_slot_that_was_moved_from_keeps_nothing(core: EngineCore) -> None:
    log: list[str] = []
    for name, length, max_tokens in (("a", 40, 3), ("b", 3, 30), ("c", 60, 12), ("d", 5, 20)):
        add(core, name, length, max_tokens, log)
    kv = core.runner.kv
    while core.has_work:
        core.step()
        held = {sequence.slot: sequence.cached_len for sequence in core._scheduler.sequences() if sequence.slot >= 0}
        for keys, _ in kv._layers.values():
            assert all(not keys[slot, :, held.get(slot, 0) :].any() for slot in range(kv.num_slots - 1))
