"""Where memory runs out, or a capture breaks off, the work is done and the device stays usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.graphs import capture
from policies.graphs.branches import at_once
from policies.graphs.capture import GraphPool, Program
from policies.graphs.kept import Kept

from .taped import ScarcePool, TapedPool
from .test_capture import counting


class Failing:
    """Raises an error for the first `times` calls of a function, and does what it does then."""

    def __init__(self, does: Callable[..., Any], times: int, error: Exception) -> None:
        self._does, self.left, self._error, self.calls = does, times, error, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self._error
        return self._does(*given, **named)


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize("where", ["clone", "work", "empty_like"])
def test_where_memory_runs_out_it_is_freed_and_tried_once_more(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(capture.gc, "collect", lambda: freed.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("emptied"))
    pool = TapedPool("cpu", spare=lambda: freed.append("spared"))
    count = torch.zeros(1)
    double = Failing(lambda x: x * 2, where == "work", OUT_OF_MEMORY)

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        count.add_(1)
        return double(x), x + count

    program = Program(pool, "The test", work, state=[count])
    if where == "clone":
        monkeypatch.setattr(Tensor, "clone", lambda self, do=Tensor.clone: fail(do, self))
        fail = Failing(lambda do, self: do(self), 1, OUT_OF_MEMORY)
    elif where == "empty_like":  # of the second output
        fails = iter((False, True, False, False))
        make = torch.empty_like
        monkeypatch.setattr(
            torch, "empty_like", lambda x: Failing(make, next(fails), OUT_OF_MEMORY)(x)
        )
    for turn in (1.0, 2.0, 3.0):
        doubled, counted = program(torch.tensor([turn]))
        assert (doubled.tolist(), counted.tolist()) == ([2 * turn], [2 * turn])
    assert count.tolist() == [3.0]
    assert freed == ["spared", "collected", "emptied"]
    assert (pool.captured, pool.uncaptured, pool.fallen_back) == (1, 0, [])


def test_where_memory_runs_out_again_the_work_is_launched_from_then_on() -> None:
    pool = ScarcePool("cpu", room=1)
    fits, _ = counting("cpu", pool)
    x = torch.arange(4.0)
    fits(x)
    program, count = counting("cpu", pool)
    with pytest.warns(UserWarning, match="The test: out of memory while capturing"):
        said = program(x)[0]
    assert torch.equal(said, x)
    for turn in (2, 3):
        assert torch.equal(program(x)[0], x * turn)
    counting("cpu", pool)[0](x)  # a second warning would fail the test
    assert count.tolist() == [3.0]
    assert pool.fallen_back == ["The test: out of memory while capturing."] * 2
    assert (pool.captured, pool.uncaptured) == (1, 4)
    assert torch.equal(fits(x)[0], x * 2), "what was captured before is replayed on"


def test_what_is_kept_and_not_in_use_makes_room() -> None:
    kept: Kept[int, Program] = Kept(9)
    pool = ScarcePool("cpu", room=2, spare=kept.spare)

    def scaled(by: int) -> float:
        program = kept.get(by, lambda: Program(pool, f"Times {by}", lambda x: (x * by,)))
        return float(program(torch.ones(1))[0])

    assert [scaled(by) for by in (2, 3, 4, 5)] == [2, 3, 4, 5]
    assert (list(kept), pool.captured, pool.fallen_back) == ([4, 5], 4, [])
    with pytest.warns(UserWarning, match="Times 2"):
        assert [scaled(by) for by in (2, 4, 5, 2)] == [2, 4, 5, 2]
    assert list(kept) == [4, 5, 2], "what went and is wanted again shows that all do not fit"
    assert (pool.captured, pool.uncaptured) == (4, 2)


def test_a_launched_run_that_runs_out_of_memory_says_so() -> None:
    pool = TapedPool("cpu")
    big = Failing(lambda x: (x,), 3, OUT_OF_MEMORY)
    program = Program(pool, "The test", big)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.cuda.OutOfMemoryError),
    ):
        program(torch.ones(1))
    assert big.calls == 3, "two attempts, and the run itself"
    assert program(torch.ones(1))[0].tolist() == [1.0]


def test_other_errors_are_not_tried_again_and_the_first_of_them_is_told() -> None:
    pool = TapedPool("cpu", spare=lambda: pytest.fail("memory did not run out"))
    runs: list[int] = []

    def work(x: Tensor) -> tuple[Tensor]:
        runs.append(1)
        if len(runs) == 1:
            try:
                raise RuntimeError("Waited for the device.\nMore of it.")
            finally:
                raise RuntimeError("The capture was invalid.")  # as the end of a capture does
        return (x + 1,)

    program = Program(pool, "The test", work)
    with pytest.warns(UserWarning, match="The test: Waited for the device. Its kernels"):
        assert program(torch.ones(1))[0].tolist() == [2.0]
    assert len(runs) == 2


def test_an_error_that_a_caller_handles_has_nothing_to_do_with_it() -> None:
    def fails(x: Tensor) -> tuple[Tensor]:
        raise RuntimeError("Waited for the device.")

    pool = TapedPool("cpu", spare=lambda: pytest.fail("memory did not run out"))
    other = torch.cuda.OutOfMemoryError("of somebody else")
    try:
        raise other
    except torch.cuda.OutOfMemoryError:
        with (
            pytest.warns(UserWarning, match="The test: Waited for the device"),
            pytest.raises(RuntimeError, match="Waited for the device"),
        ):
            Program(pool, "The test", fails)(torch.ones(1))
    assert other.__traceback__ is not None


class Cuda:
    """Stands in for torch.cuda: streams by name, and captures that may break off."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, error: Exception | None) -> None:
        self.now, self.log, self._error = "default", list[str](), error

    def CUDAGraph(self) -> Any:
        return type("Graph", (), {})()

    def Stream(self, device: Any) -> Any:
        return Side()

    def graph_pool_handle(self) -> str:
        self.log.append("new memory")
        return "memory"

    def current_stream(self, device: Any) -> Any:
        return Side(self.now)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        self.now = stream.name
        yield
        if self._error is not None:
            raise self._error
        self.now = "default"

    def synchronize(self, device: Any) -> None:
        self.log.append("waited")

    def empty_cache(self) -> None:
        self.log.append("emptied")


class Side:
    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "attempts"), [(OUT_OF_MEMORY, 2), (RuntimeError("broke off"), 1)]
)
@pytest.mark.parametrize("broken", [True, False])
def test_behind_a_failed_attempt_the_stream_is_the_one_before(
    broken: bool, error: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the allocator is in no capture any more."""
    cuda = Cuda(error)

    def end(*given: Any) -> None:
        if not broken:
            raise RuntimeError("not currently recording")
        cuda.log.append("ended")

    monkeypatch.setattr(capture.torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    released = cuda.log.append
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *given: released("released"), raising=False
    )
    pool = GraphPool("cuda:0")
    with pytest.warns(UserWarning, match="The test"):
        assert pool.capture("The test", lambda: None, lambda: None) is None
    assert cuda.now == "default"
    assert cuda.log.count("waited") == attempts
    assert cuda.log.count("emptied") == attempts - 1
    assert cuda.log.count("ended") == cuda.log.count("released") == attempts * broken


def test_graphs_share_memory_while_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(None)
    monkeypatch.setattr(capture.torch, "cuda", cuda)
    pool = GraphPool("cuda:0")
    graphs = [pool.capture("The test", lambda: None, lambda: None) for _ in range(2)]
    assert cuda.log == ["new memory"]
    graphs.clear()
    pool.capture("The test", lambda: None, lambda: None)
    assert cuda.log == ["new memory"] * 2


MIB = 2**20


@pytest.fixture
def limit_mib() -> Iterator[Callable[[int], None]]:
    """Lets this process have so much more memory than it has now."""

    def limit(more: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        share = (torch.cuda.memory_reserved() + more * MIB) / whole
        torch.cuda.set_per_process_memory_fraction(share)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@torch.inference_mode()
def usable(pool: GraphPool) -> None:
    """Whether streams, memory, random numbers and captures are as if nothing had happened."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):  # memory that another stream has used comes back
        values = at_once(
            torch.device("cuda"),
            [lambda: torch.rand(3 * MIB, device="cuda"), lambda: torch.ones(3 * MIB).cuda()],
        )
        assert float((values[0] + values[1]).min()) >= 1
        del values
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
    captured = pool.captured
    program = Program(pool, "Fine", lambda x: (x + 1,))
    for turn in (1.0, 2.0):
        assert program(torch.full((4,), turn, device="cuda"))[0].tolist() == [turn + 1] * 4
    assert pool.captured == captured + 1


@pytest.mark.gpu
def test_a_gpu_that_runs_out_while_warming_up_launches_the_work(
    limit_mib: Callable[[int], None],
) -> None:
    pool, x = GraphPool("cuda"), torch.ones(64, MIB // 4, device="cuda")
    count = torch.zeros(1, device="cuda")

    def work(x: Tensor) -> tuple[Tensor]:
        count.add_(1)
        return ((x * 2).sum()[None] * count,)

    program = Program(pool, "Large", work, state=[count])
    limit_mib(96)  # for what the sum is of, not for a copy of the input beside it
    with pytest.warns(UserWarning, match="Large: out of memory while capturing"):
        said = program(x)[0].tolist()
    assert said == [2 * x.numel()]
    assert program(x)[0].tolist() == [4 * x.numel()]
    assert count.tolist() == [2.0]
    assert (len(pool.fallen_back), pool.captured, pool.uncaptured) == (1, 0, 2)
    usable(pool)


@pytest.mark.gpu
@pytest.mark.parametrize("aside", [False, True])
def test_a_gpu_that_runs_out_while_capturing_comes_back(
    aside: bool, limit_mib: Callable[[int], None]
) -> None:
    """On the capturing stream, or on one beside it."""
    pool, device = GraphPool("cuda"), torch.device("cuda")

    def large(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(512 * MIB, device="cuda")
        return x * 2

    def work(x: Tensor) -> tuple[Tensor, ...]:
        works = [lambda: x + 1, lambda: large(x)] if aside else [lambda: large(x), lambda: x + 1]
        return tuple(at_once(device, works))

    program = Program(pool, "Large", torch.no_grad()(work))
    limit_mib(128)
    x = torch.ones(4, device="cuda")
    with pytest.warns(UserWarning, match="Large: out of memory while capturing"):
        said = program(x)
    assert sorted(float(value[0]) for value in said) == [2.0, 2.0]
    usable(pool)


@pytest.mark.gpu
def test_on_a_gpu_what_is_not_in_use_makes_room(limit_mib: Callable[[int], None]) -> None:
    kept: Kept[int, Program] = Kept(9)
    pool, x = GraphPool("cuda", spare=kept.spare), torch.ones(32, MIB // 4, device="cuda")

    def scaled(by: int) -> float:
        program = kept.get(by, lambda: Program(pool, f"Times {by}", lambda x: ((x * by).sum(1),)))
        return float(program(x)[0].sum())

    limit_mib(120)  # for two copies of the input and a product, not for three
    assert [scaled(by) / x.numel() for by in (2, 3, 4, 4)] == [2, 3, 4, 4]
    assert (list(kept), pool.captured, pool.fallen_back) == ([4], 3, [])
    usable(pool)


@pytest.mark.gpu
def test_behind_a_capture_that_broke_off_a_gpu_is_usable() -> None:
    pool = GraphPool("cuda")
    waits = Program(pool, "Waiting", lambda x: (x[: int(x[0])],))
    with pytest.warns(UserWarning, match="Waiting: CUDA error"):
        waits(torch.full((8,), 3.0, device="cuda"))
    usable(pool)
