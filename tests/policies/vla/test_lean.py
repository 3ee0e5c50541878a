"""Parts of lerobot's policies in fewer kernels say what they say as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaMLP,
    GemmaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from policies.vla.families import family_of
from policies.vla.flow_captured import _lean
from policies.vla.lean import at_once, attend, lean_parts, masked_softmax
from tests.policies.kernels import kernels
from tests.policies.vla.lerobot_models import BUILDERS

B, N, M, WIDTH, HEADS, HEAD = 2, 5, 7, 24, 4, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(m: int = M) -> tuple[Tensor, Tensor]:
    """Bool [b, 1, n, m], and the same added to logits; each row sees something."""
    mask = randn(B, 1, N, m, seed=9) > 0
    mask[..., 0] = True
    return mask, torch.where(mask, 0.0, -2.3819763e38)


def ours(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What a module says in fewer kernels, and as it stands."""
    with torch.inference_mode():
        with lean_parts(module):
            assert "forward" in module.__dict__
            lean = module(*args, **kwargs)
        assert "forward" not in module.__dict__
        return lean, module(*args, **kwargs)


def close(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.allclose(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("held", [1, 2, 4])
@pytest.mark.parametrize("adds", [True, False])
def test_attention_is_transformers_own(adds: bool, held: int) -> None:
    query = randn(B, N, HEADS, HEAD)
    key, value = randn(2, B, held, M, HEAD, seed=1)
    mask, added = masks()
    own: Any = GemmaAttention(GemmaConfig(num_attention_heads=HEADS, num_key_value_heads=held), 0)
    seen, weights = attend(query, key, value, added if adds else mask, 0.3)
    want = eager_attention_forward(own.eval(), query.transpose(1, 2), key, value, added, 0.3)
    assert close(seen, want[0].flatten(2))
    assert close(weights.unflatten(2, (N, -1)).transpose(2, 3).flatten(1, 2), want[1])


def test_a_row_that_may_see_nothing_looks_everywhere_alike() -> None:
    nothing = torch.zeros(1, 1, 1, M, dtype=torch.bool)
    for mask in (nothing, torch.full(nothing.shape, -2.3819763e38)):
        weights = masked_softmax(randn(1, 1, 2, M), mask, 1.0, 2)
        assert close(weights, torch.full_like(weights, 1 / M))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_llamas_norm(kind: torch.dtype) -> None:
    norm: Any = LlamaRMSNorm(WIDTH, eps=0.1)
    nn.init.normal_(norm.weight)
    for module in (norm, norm.to(torch.bfloat16)):
        lean, want = ours(module, randn(B, N, WIDTH).to(kind))
        assert lean.dtype == want.dtype
        assert torch.allclose(lean.float(), want.float(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("conditioned", [True, False])
def test_pis_norm_and_its_gate(conditioned: bool) -> None:
    from lerobot.policies.pi_gemma import PiGemmaRMSNorm

    norm: Any = PiGemmaRMSNorm(WIDTH, eps=0.1, cond_dim=8 if conditioned else None)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    cond = randn(B, 8) if conditioned else None
    lean, want = ours(norm, randn(B, N, WIDTH), cond)
    assert close(lean[0], want[0])
    assert close(lean[1], want[1]) if conditioned else lean[1] is want[1] is None


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
def test_mlps_of_any_activation(activation: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 10}
    sizes["num_attention_heads"] = HEADS
    for module in (
        GemmaMLP(GemmaConfig(**sizes, hidden_act=activation)),
        LlamaMLP(LlamaConfig(**sizes, hidden_act=activation)),
    ):
        assert close(*ours(module, randn(B, N, WIDTH)))


@pytest.mark.parametrize("cached", [True, False])
def test_gemmas_attention_over_a_cache_and_its_hooks(cached: bool) -> None:
    config: Any = GemmaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=1, head_dim=HEAD
    )
    config._attn_implementation = "eager"
    own, rotary = GemmaAttention(config, 0).eval(), GemmaRotaryEmbedding(config)
    looked: list[Tensor] = []
    own.register_forward_hook(lambda module, args, output: looked.append(output[1]))
    x, places = randn(B, N, WIDTH), torch.arange(3, 3 + N).expand(B, -1)
    _, added = masks(N + 2 * cached)

    def run() -> tuple[Tensor, Any]:
        cache = DynamicCache() if cached else None
        if cache is not None:
            cache.update(*randn(2, B, 1, 2, HEAD, seed=3), 0)
        said, _ = own(
            x,
            position_embeddings=rotary(x, places),
            attention_mask=added,
            past_key_values=cache,
        )
        return said, cache

    with torch.inference_mode():
        want, theirs = run()
        with lean_parts(own):
            said, mine = run()
    assert close(said, want)
    assert len(looked) == 2
    assert close(*looked)
    if cached:
        assert close(mine.layers[0].keys, theirs.layers[0].keys)
        assert close(mine.layers[0].values, theirs.layers[0].values)


def test_other_modules_are_left_as_they_stand() -> None:
    class Own(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    network = nn.Sequential(Own(WIDTH), nn.LayerNorm(WIDTH))
    x = randn(1, 2, WIDTH)
    want = network(x)
    with lean_parts(network):
        assert torch.equal(network(x), want)


@pytest.mark.parametrize("on", ["instance", "class"])
def test_a_forward_of_a_users_own_stays(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = LlamaRMSNorm(WIDTH)
    twice = (lambda x: x * 2) if on == "instance" else (lambda self, x: x * 2)
    monkeypatch.setattr(norm if on == "instance" else LlamaRMSNorm, "forward", twice)
    x = randn(1, 2, WIDTH)
    with lean_parts(norm):
        assert torch.equal(norm(x), x * 2)
    assert torch.equal(norm(x), x * 2)


class Towers:
    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def embed_image(self, picture: Tensor) -> Tensor:
        self.calls.append(tuple(picture.shape))
        return picture.flatten(1) * 3


def test_pictures_that_are_alike_are_embedded_at_once() -> None:
    towers = Towers()
    pictures = [randn(2, 3, side, 4, seed=i) for i, side in enumerate((4, 8, 4))]
    with at_once(towers, pictures):
        said = [towers.embed_image(picture) for picture in pictures]
        another = towers.embed_image(pictures[0] + 1)
    assert towers.calls == [(4, 3, 4, 4), (2, 3, 8, 4), (2, 3, 4, 4)]
    assert torch.equal(another, (pictures[0] + 1).flatten(1) * 3)
    assert all(
        torch.equal(one, picture.flatten(1) * 3)
        for one, picture in zip(said, pictures, strict=True)
    )
    assert "embed_image" not in vars(towers)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_layers_of_the_prefix_take_far_fewer_kernels(kind: str) -> None:
    policy = BUILDERS[kind]().to("cuda")
    family = family_of(policy)
    embeds = randn(1, 40, 64).to("cuda")
    padding, blocks = (torch.ones(1, 40, dtype=torch.bool, device="cuda") for _ in range(2))

    def through() -> Tensor:
        cache, entering = DynamicCache(), family.entering(embeds, padding, ~blocks)
        return list(family.layers(range(family.depth), *entering, cache))[-1]

    with torch.inference_mode():
        stock, want = kernels(through), through()
        with _lean(family):
            lean, said = kernels(through), through()
    assert (said - want).abs().max() < 1e-3
    assert lean < 0.6 * stock
