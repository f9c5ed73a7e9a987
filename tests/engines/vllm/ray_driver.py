"""What one vLLM engine answers, before and after a head was taken away and given back; also as a program.

Where Ray runs the workers, that program is what vLLM calls the driver. It is a process of its own since vLLM settles
on its platform once in a process. `python -m tests.engines.vllm.ray_driver SETTINGS_JSON RESULT_PICKLE`
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.wire import CONTROL_KEY, ID_KEY
from server.settings import Settings
from tests.conftest import Collected
from tests.engines.vllm.test_laws import CONTROLS, collect, collect_all, request


async def answers(settings: Settings) -> list[Collected]:
    """One for each of CONTROLS, and one more of "nonlinear" with its head loaded anew."""
    engine = VllmEngine(settings)
    await engine.start()
    try:
        collected = await collect_all(engine, [request(seed, name) for seed, name in enumerate(CONTROLS)])
        await engine.unload_head("positive")
        assert await reason_without_checks(engine, '{"objective": {"weights": {"positive": 1.0}}}') == "error"
        await engine.load_head("positive")
        return [*collected, await collect(engine, request(list(CONTROLS).index("nonlinear"), "nonlinear"))]
    finally:
        await engine.stop()


async def reason_without_checks(engine: VllmEngine, control: str) -> str | None:
    """Why a request ends whose heads only the workers look for."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    extra_args = {CONTROL_KEY: control, ID_KEY: "unchecked"}
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False, extra_args=extra_args)
    outputs = [output async for output in engine._llm.generate({"prompt_token_ids": [1, 2]}, sampling, "unchecked")]
    return outputs[-1].outputs[0].finish_reason


def main() -> None:
    settings, result = sys.argv[1:]
    collected = asyncio.run(answers(Settings.model_validate_json(settings)))
    Path(result).write_bytes(pickle.dumps(collected))


if __name__ == "__main__":
    main()
