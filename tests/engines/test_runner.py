"""Models that cannot be run exactly are refused when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.runner import ModelRunner
from server.errors import ConfigurationError, ModelLoadError
from tests.conftest import CONFIGS

# By transformers' modules, and by the native layers where there are any.
MODELS = [("llama", "float32"), ("wide_llama", "bfloat16")]


def create(model: Any) -> ModelRunner:
    return ModelRunner.create(model, max_len=64, max_sequences=2, kv_bytes=2**24)


def test_a_model_without_an_lm_head_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="LlamaModel has no LM head"):
        create(LlamaModel(CONFIGS["llama"]()))


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_a_model_that_does_more_to_its_logits_than_its_head_is_refused(
    load_tiny: Callable[..., LoadedModel], model: tuple[str, str]
) -> None:
    loaded = load_tiny(*model).model
    plain = loaded.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = plain(*args, **options)
        output.logits = output.logits.square()
        return output

    loaded.forward = forward
    with pytest.raises(ModelLoadError, match="does not explain its logits"):
        create(loaded)


def test_a_model_of_which_a_layer_attends_by_itself_is_refused(load_tiny: Callable[..., LoadedModel]) -> None:
    loaded = load_tiny("gpt2").model

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.cumsum(dim=1), None

    loaded.transformer.h[1].attn.forward = forward
    with pytest.raises(ModelLoadError, match="1 of its 2 layers do not attend, and what they carry"):
        create(loaded)


def test_a_model_whose_attention_takes_what_it_is_not_given_is_refused(load_tiny: Callable[..., LoadedModel]) -> None:
    loaded = load_tiny("gpt2").model

    def forward(*_: Any, **__: Any) -> Any:
        raise TypeError("forward() misses a bias")

    loaded.transformer.h[1].attn.forward = forward
    with pytest.raises(ModelLoadError, match=r"interface as this engine needs \(forward\(\) misses a bias\)"):
        create(loaded)


def test_weights_that_cannot_be_quantized_here_are_named(make_core: Callable[..., EngineCore]) -> None:
    with pytest.raises(ConfigurationError, match=r"quantization: .*q_proj \[32, 32\] in torch.float32"):
        make_core("llama", dtype="float32", bits=4)
