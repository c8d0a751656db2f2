"""The moving average: its formula, its precision, strict loading, swapping in and out, sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from util.ema import Ema


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype)), "b": nn.Parameter(torch.zeros(1, 3, dtype=dtype))}


def test_formula() -> None:
    params = parameters()
    ema = Ema(params, rate=0.75)
    for value in (5.0, 9.0):
        with torch.no_grad():
            params["a"].fill_(value)
        ema.update()
    # a0: 1 -> .75*1 + .25*5 = 2 -> .75*2 + .25*9 = 3.75; a1: 2 -> 2.75 -> 4.3125
    torch.testing.assert_close(ema.state_dict()["a"], torch.tensor([3.75, 4.3125]))
    assert torch.equal(ema.state_dict()["b"], torch.zeros(1, 3))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_extreme_rates(rate: float) -> None:
    params = parameters()
    ema = Ema(params, rate)
    with torch.no_grad():
        params["a"].fill_(7.0)
    ema.update()
    assert torch.equal(ema.state_dict()["a"], torch.tensor([1.0, 2.0]) if rate else torch.full((2,), 7.0))


def test_rate_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        Ema(parameters(), 1.5)


def test_warmup_by_hand():
    params = {"w": torch.nn.Parameter(torch.zeros(1))}
    ema = Ema(params, rate=0.5, has_warmup=True)
    with torch.no_grad():
        params["w"].fill_(1.0)
    expected = 0.0
    for done, rate in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5)):
        assert ema.rate_at(done) == pytest.approx(rate)
        ema.update(done)
        expected = rate * expected + (1 - rate)
        assert float(ema.state_dict()["w"]) == pytest.approx(expected)


def test_what_is_left_of_the_start():
    slow, warm = (Ema(parameters(), 0.9999, has_warmup) for has_warmup in (False, True))
    assert slow.start_share(40) == pytest.approx(0.9999**40)
    assert slow.start_share(0) == warm.start_share(0) == 1
    assert warm.start_share(1) == pytest.approx(0.1)
    assert warm.start_share(40) == 0 and slow.start_share(100_000) == 0


def test_nothing_to_average() -> None:
    ema = Ema({}, 0.9)
    ema.update()
    assert ema.state_dict() == {}


def test_low_precision_parameters_are_averaged_in_float32() -> None:
    params = parameters(torch.bfloat16)
    ema = Ema(params, 0.9999)
    with torch.no_grad():
        params["a"].fill_(2.0)
    for _ in range(100):
        ema.update()
    shadow = ema.state_dict()["a"]
    assert shadow.dtype == torch.float32
    assert 1.009 < shadow[0].item() < 1.011  # in bfloat16 it would not have moved
    before = params["a"].clone()
    with ema.applied():
        assert params["a"].dtype == torch.bfloat16
    assert torch.equal(params["a"], before)


def test_applied_swaps_in_place_and_back() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(dict(model.named_parameters()), 0.5)
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.mul_(3.14159)
    raw, storage = model.weight.detach().clone(), model.weight.data_ptr()
    with ema.applied():
        assert torch.equal(model.weight, average) and model.weight.data_ptr() == storage
        for call in (ema.update, lambda: ema.load_state_dict({})):
            with pytest.raises(RuntimeError, match="inside"):
                call()
        with pytest.raises(RuntimeError, match="inside"), ema.applied():
            pass
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, raw) and torch.equal(ema.state_dict()["weight"], average)


def test_applied_restores_after_an_exception() -> None:
    params = parameters()
    ema = Ema(params, 0.5)
    with torch.no_grad():
        params["a"].fill_(9.0)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError("sampling failed")
    assert torch.equal(params["a"], torch.full((2,), 9.0))
    ema.update()  # allowed again


def test_state_round_trip_is_exact() -> None:
    params = parameters()
    ema = Ema(params, 0.9)
    with torch.no_grad():
        params["a"].add_(0.1)
    ema.update()
    other = Ema(parameters(), 0.9)
    state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    other.update()  # must not write into the loaded dictionary
    assert torch.equal(state["a"], ema.state_dict()["a"])


def test_loading_is_strict() -> None:
    ema = Ema(parameters(), 0.9)
    with pytest.raises(ValueError, match="missing a; unexpected c"):
        ema.load_state_dict({"c": torch.zeros(1), "b": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"b has shape \(3, 1\), the parameter has \(1, 3\)"):
        ema.load_state_dict({"a": torch.full((2,), 5.0), "b": torch.zeros(3, 1)})
    assert torch.equal(ema.state_dict()["a"], torch.tensor([1.0, 2.0]))  # nothing was loaded half


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_sharded_parameters() -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.arange(4.0).view(4, 1)
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    ema = Ema({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter.mul_(3.0)
    ema.update()
    shadow = ema.state_dict()["w"]
    assert isinstance(shadow, DTensor) and torch.equal(shadow.full_tensor(), whole * 2)
    with ema.applied():
        assert torch.equal(parameter.full_tensor(), whole * 2)
    assert torch.equal(parameter.full_tensor(), whole * 3)
    ema.load_state_dict({"w": whole * 7})
    assert torch.equal(ema.state_dict()["w"].full_tensor(), whole * 7)
