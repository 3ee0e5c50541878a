"""A lean layer says what transformers' layer says, in fewer kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from policies.graphs import attention, layer
from policies.graphs.cache import StaticCache
from policies.probes import Attention, probing

from ..tiny_models import TEXT, qwen2_5_vl

FAMILIES = ["llama", "grouped", "biased", "gelu", "wide_heads", "qwen2", "qwen2_5_vl"]
WIDTH, PROMPT = 16, 9


def text_model(family: str) -> Any:
    """A tiny text model whose norms, and biases where it has them, are not those of a fresh one."""
    torch.manual_seed(0)
    more: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 4},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu_pytorch_tanh"},
        "wide_heads": {"head_dim": 32, "rms_norm_eps": 1e-2},
    }
    if family == "qwen2_5_vl":
        model: Any = qwen2_5_vl().model.language_model
    elif family == "qwen2":
        model = Qwen2Model(Qwen2Config(**TEXT))
    else:
        model = LlamaModel(LlamaConfig(**{**TEXT, **more.get(family, {})}))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def cache_of(model: Any, batch: int) -> StaticCache:
    own = model.layers[0].self_attn
    heads, weight = own.k_proj.out_features // own.head_dim, own.k_proj.weight
    return StaticCache([WIDTH], batch, heads, own.head_dim, weight.dtype, weight.device)


def positions(family: str, batch: int, start: int, n: int) -> Tensor:
    """Different ones on every axis where there are three."""
    ids = torch.arange(start, start + n).expand(batch, -1)
    return torch.stack([ids, ids * 2, ids * 3 + 1]) if family == "qwen2_5_vl" else ids


def passes(model: Any, run: Any, family: str, batch: int) -> list[Tensor]:
    """What layer 0 says of a prompt, and of one masked token behind it."""
    weight, cache = model.layers[0].self_attn.k_proj.weight, cache_of(model, batch)
    draw = torch.Generator().manual_seed(1)
    said = []
    for start, n in ((0, PROMPT), (PROMPT, 1)):
        x = torch.randn(batch, n, 64, generator=draw).to(weight)
        mask = None
        if start:
            places = torch.full((batch, n), start, device=weight.device)
            cache.append([places], [WIDTH])
            hidden = torch.arange(WIDTH, device=weight.device) > start
            mask = torch.zeros(batch, 1, n, WIDTH).to(weight).masked_fill_(hidden, -torch.inf)
        tables = model.rotary_emb(x, positions(family, batch, start, n).to(weight.device))
        said.append(
            run(
                x,
                attention_mask=mask,
                position_embeddings=tables,
                past_key_values=cache,
                use_cache=True,
            )
        )
    return said


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_prompt_and_a_step_come_out_as_from_the_stock_layer(family: str, batch: int) -> None:
    model = text_model(family)
    lean = layer.lean(model.layers[0])
    assert isinstance(lean, layer.LeanLayer)
    expected = passes(model, model.layers[0], family, batch)
    for got, want in zip(passes(model, lean, family, batch), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_probes_see_what_they_see_of_the_stock_layer() -> None:
    model = text_model("grouped")
    seen: list[Attention] = []
    with probing(model, {model.layers[0].self_attn: seen.append}):
        passes(model, model.layers[0], "grouped", 2)
        passes(model, layer.lean(model.layers[0]), "grouped", 2)
    assert len(seen) == 4
    for stock, lean in zip(seen[:2], seen[2:], strict=True):
        assert torch.allclose(lean.query, stock.query, atol=1e-5)
        assert torch.allclose(lean.key, stock.key, atol=1e-5)
        assert lean.scaling == stock.scaling


def test_what_is_not_known_exactly_stays_as_it_is() -> None:
    class Other(type(text_model("llama").layers[0])):  # type: ignore[misc]
        pass

    known = text_model("qwen2").layers[0]
    other = copy.copy(known)
    other.__class__ = Other
    assert layer.lean(other) is other
    known.self_attn.sliding_window = 8
    assert layer.lean(known) is known


class Counted(TorchDispatchMode):
    """Counts operators that compute; views and empty tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def a_step(model: Any, run: Any, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A masked token through `run`, layer 0 of the model."""
    cache, x = cache_of(model, 1), torch.zeros(1, 1, 64, device=device, dtype=dtype)
    place = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache.append([place], [WIDTH])
    tables, mask = model.rotary_emb(x, place), x.new_zeros(1, 1, 1, WIDTH)
    rest = {"past_key_values": cache, "use_cache": True}
    return lambda: run(x, attention_mask=mask, position_embeddings=tables, **rest)


@torch.inference_mode()
def test_a_step_takes_fewer_operators_where_nothing_is_fused_too() -> None:
    model = text_model("llama")
    counts = []
    for run in (model.layers[0], layer.lean(model.layers[0])):
        step = a_step(model, run, "cpu", torch.float32)
        with Counted() as counted:
            step()
        counts.append(len(counted.names))
    stock, lean = counts
    assert lean <= 21 < stock


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.inference_mode()
def test_a_step_on_a_gpu_is_at_most_twenty_kernels(family: str) -> None:
    model = text_model(family).to("cuda", torch.bfloat16)
    step = a_step(model, layer.lean(model.layers[0]), "cuda", torch.bfloat16)
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(names) <= 20, names


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_gpu_says_what_a_cpu_says(family: str) -> None:
    """bfloat16 on the GPU is about as near to float32 as the stock layer's is."""
    model = text_model(family)
    exact = passes(model, model.layers[0], family, 2)
    model.to("cuda", torch.bfloat16)
    assert layer.compiled() is not None
    stock = passes(model, model.layers[0], family, 2)
    lean = passes(model, layer.lean(model.layers[0]), family, 2)
    for got, usual, want in zip(lean, stock, exact, strict=True):
        error, usual_error = ((t.float().cpu() - want).norm() for t in (got, usual))
        assert float(error) <= 1.5 * float(usual_error)
