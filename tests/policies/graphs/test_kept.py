"""What is kept, and that what is not gives its memory back without the garbage collector."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch

from policies.graphs.capture import GraphPool, Program
from policies.graphs.kept import Kept, weakly
from policies.reasoner import VideoReasoner
from policies.vla.flow_policy import FlowPolicy
from stream.data import Budget
from stream.memory import Memory
from stream.pipeline import reduce_video
from stream.registry import build_reducer

from ..test_reasoner import FRAMES, family
from ..vla import lerobot_models, openvla_parts
from ..vla.test_flow_policy import observed


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_longest_unused_goes() -> None:
    made: list[str] = []

    def get(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return kept.get(key, make)

    kept: Kept[str, str] = Kept(2)
    assert [get(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"]
    assert (list(kept), kept.values(), len(kept)) == (["a", "b"], ["A", "B"], 2)
    kept.clear()
    assert len(kept) == 0


def test_sizes_share_a_room() -> None:
    sizes = {"a": 4, "b": 3, "c": 5, "d": 99}
    kept: Kept[str, str] = Kept(9, room=8)
    held = []
    for key in "abacbd":
        kept.get(key, key.upper, sizes[key])
        held.append("".join(kept))
    assert held == ["a", "ab", "ba", "c", "cb", "d"]


def test_all_but_the_last_used_makes_room_until_it_is_wanted_again() -> None:
    kept: Kept[str, str] = Kept(9, room=99)
    for key in "abcb":
        kept.get(key, key.upper, 9)
    kept.spare()
    assert list(kept) == ["b"]
    kept.get("d", str)
    kept.spare()
    assert list(kept) == ["d"]
    kept.get("b", str)
    kept.spare()
    assert list(kept) == ["d", "b"], "there is no room for all that is in use"
    kept.clear()
    kept.get("d", str)
    kept.get("b", str)
    kept.spare()
    assert list(kept) == ["b"]
    kept.clear()
    kept.spare()


@pytest.mark.usefixtures("uncollected")
def test_an_object_that_keeps_a_program_of_its_own_goes() -> None:
    class Scaled:
        def __init__(self) -> None:
            self.scale = torch.full((1,), 3.0)
            self.program = Program(GraphPool("cpu"), "The test", weakly(self.run, 2))

        def run(self, power: int, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x * self.scale**power,)

    scaled = Scaled()
    assert scaled.program(torch.ones(1))[0].tolist() == [9.0]
    gone = ref(scaled)
    del scaled
    assert gone() is None


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("method", ["holitom", "identity"])
def test_a_reasoner_goes_with_its_model(method: str) -> None:
    model, processor = family("llava_onevision")
    reasoner = VideoReasoner(
        copy.deepcopy(model), processor, build_reducer(method), capture="on", max_new_tokens=3
    )
    for _ in range(2):
        encoded = reasoner.encode(FRAMES[:3])
        video = reduce_video(encoded, build_reducer(method), Budget(encoded.grid.size), Memory())
        reasoner.answer(video, ["what moves", "where is it"])
    assert reasoner._steps is not None
    behind = reasoner._steps._behind.values()[-1]
    gone = [ref(reasoner), ref(behind), ref(reasoner._encoder), ref(reasoner._model)]
    gone.append(ref(reasoner._model.model.language_model.layers[0]))
    del reasoner, behind, encoded, video
    assert [left() for left in gone] == [None] * 5


@pytest.mark.usefixtures("uncollected")
def test_a_policy_goes_with_its_network_and_a_decoder_with_its_buffers() -> None:
    policy = openvla_parts.policy("parallel", build_reducer("fastv", layer=1), capture="on")
    assert policy.captured is not None
    observation = openvla_parts.observation(0)
    prefix = policy.prefill(policy.encode(observation), Budget(8), Memory())
    policy.act(prefix, observation)
    (decoder,) = policy.captured.decoders.values()
    evicted = ref(decoder)
    policy.captured.decoders.clear()
    del decoder
    assert evicted() is prefix.cache.cache.decoder, "a prefix is acted from in its decoder"
    del prefix
    assert evicted() is None
    policy.act(policy.prefill(policy.encode(observation), Budget(8), Memory()), observation)
    gone = [ref(policy), ref(policy.captured), ref(policy.model)]
    del policy
    assert [left() for left in gone] == [None] * 3


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("kind", sorted(lerobot_models.BUILDERS))
def test_a_flow_policy_goes_with_its_network(kind: str) -> None:
    own: Any = lerobot_models.BUILDERS[kind]()
    parts = own, *lerobot_models.processors(own)
    policy = FlowPolicy(*parts, build_reducer("vla_pruner"), capture="on")
    assert policy.captured is not None
    policy.act(policy.prefill(policy.encode(observed()), Budget(9), Memory()), observed())
    step, section = policy.captured.steps.values()[0], policy.captured.sections.values()[0]
    gone = [ref(policy), ref(policy.captured), ref(step), ref(section), ref(own)]
    del policy, step, section, own, parts
    assert [left() for left in gone] == [None] * 5
