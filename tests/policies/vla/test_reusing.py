"""Robot policies that take part of their prompt from the tick before, against whole prefills."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.vla.openvla import OpenVLAPolicy
from policies.vla.reusing import BEFORE
from stream.data import Budget, Observation
from stream.memory import Memory
from stream.reducers.vla_cache import VLACache
from tests.policies.vla.openvla_parts import observation, policy

HEADS = ("parallel", "autoregressive")
Actions = NDArray[np.float32]


def tick(
    one: OpenVLAPolicy, seen: Observation, tokens: int, memory: Memory, epoch: int = 0
) -> tuple[Actions, int]:
    """(actions, visual tokens that were computed)"""
    prefix = one.prefill(one.encode(seen), Budget(tokens), memory, epoch)
    chunk, attention = one.act(prefix, seen)
    assert attention.numel() == 32
    assert float(attention.min()) > 0  # reused tokens are looked at too
    one.remember(prefix, attention, memory)
    return chunk.actions, prefix.tokens


def untouched(head: str, seen: Observation) -> Actions:
    return tick(policy(head), seen, 32, Memory())[0]


def other_wrist(seen: Observation, by: Observation) -> Observation:
    return replace(seen, images={"scene": seen.images["scene"], "wrist": by.images["wrist"]})


@pytest.mark.parametrize("head", HEADS)
def test_the_first_tick_is_whole_and_an_identical_picture_acts_identically(head: str) -> None:
    one, seen, memory = policy(head, VLACache()), observation(), Memory()
    expected = untouched(head, seen)
    actions, computed = tick(one, seen, 1, memory)
    assert computed == 32
    assert np.array_equal(actions, expected)
    for budget in (1, 7, 31):
        actions, computed = tick(one, seen, budget, memory)
        assert computed == budget
        assert np.allclose(actions, expected, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_another_state_is_acted_upon_although_all_is_reused(head: str) -> None:
    one, memory = policy(head, VLACache()), Memory()
    seen = observation()
    tick(one, seen, 1, memory)
    later = replace(seen, state=seen.state + np.float32(2))
    actions, _ = tick(one, later, 1, memory)
    assert np.allclose(actions, untouched(head, later), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_reusing_nothing_is_bit_equal_to_the_untouched_policy(head: str) -> None:
    one, memory = policy(head, VLACache()), Memory()
    for seed in range(3):
        seen = observation(seed)
        actions, computed = tick(one, seen, 32, memory)
        assert computed == 32
        assert np.array_equal(actions, untouched(head, seen))


def test_the_error_is_that_of_what_changed_and_was_not_computed() -> None:
    """The wrist camera's 16 tokens are the last ones, so nothing else sees them."""
    before, seen = observation(0), other_wrist(observation(0), observation(1))
    expected, errors = untouched("parallel", seen), []
    for budget in (2, 8, 16):
        one, memory = policy("parallel", VLACache(relevant=0)), Memory()
        tick(one, before, budget, memory)
        actions, computed = tick(one, seen, budget, memory)
        assert computed == budget
        errors.append(float(np.abs(actions - expected).max()))
    stale = float(np.abs(untouched("parallel", before) - expected).max())
    assert errors[2] < 1e-5
    assert 1e-3 < errors[0] < 2 * stale
    assert errors[1] > 1e-4


@pytest.mark.parametrize("change", ["reset", "epoch", "camera", "text"])
def test_another_episode_or_layout_is_computed_whole(change: str) -> None:
    one, memory, epoch = policy("parallel", VLACache()), Memory(), 0
    tick(one, observation(0), 4, memory)
    seen = observation(1)
    if change == "reset":
        memory.reset()
    elif change == "epoch":
        epoch = 1
    elif change == "camera":
        memory.state[BEFORE] = replace(memory.state[BEFORE], layout=(0, ("scene",), 4))
    else:
        seen = observation(1, text=1)
    actions, computed = tick(one, seen, 4, memory, epoch)
    assert computed == 32
    assert np.array_equal(actions, untouched("parallel", seen))
    assert tick(one, seen, 4, memory, epoch)[1] == 4


def test_episodes_of_a_batch_are_what_they_are_alone() -> None:
    """One text is shorter, so it stands behind padding; then the order is another; then it is alone
    and without padding."""
    one = policy("parallel", VLACache())
    first = [observation(0, text=0), observation(1, text=1)]
    second = [other_wrist(first[0], observation(2)), other_wrist(first[1], observation(3))]
    third = [other_wrist(first[0], observation(4)), other_wrist(first[1], observation(5))]
    last = other_wrist(first[0], observation(6))
    alone = []
    for episode in zip(first, second, third, strict=True):
        memory = Memory()
        alone.append([tick(one, seen, 9, memory)[0] for seen in episode])

        if len(alone) == 1:
            expected = tick(one, last, 9, memory)[0]

    memories = [Memory(), Memory()]
    for step, seen in enumerate((first, second, third)):
        order = [1, 0] if step == 2 else [0, 1]
        seen, held = [seen[i] for i in order], [memories[i] for i in order]
        prefixes = one.prefill_batch(one.encode_batch(seen), Budget(9), held, [0, 0])
        assert [p.tokens for p in prefixes] == ([9, 9] if step else [32, 32])
        chunks, attention = one.act_batch(prefixes, seen)
        for i, prefix, chunk, row in zip(order, prefixes, chunks, attention, strict=True):
            one.remember(prefix, row, memories[i])
            assert np.allclose(chunk.actions, alone[i][step], atol=1e-5)
    actions, computed = tick(one, last, 9, memories[0])
    assert computed == 9
    assert np.allclose(actions, expected, atol=1e-5)
