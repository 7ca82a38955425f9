"""A recorded step against its plain twin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from metagpen import graphs
from metagpen.graphs import WARM_UP, Captured, make_capturable, set_rate


class Fit:
    """A small network that learns to give back its input; one step is `update`."""

    def __init__(self, device: torch.device, capturable: bool, records: bool = False):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).to(device, torch.float64)
        self.optimiser = make_capturable(torch.optim.Adam(self.net.parameters(), lr=1e-2), device, capturable)
        self.run: Callable[[Tensor], dict[str, Tensor]] = Captured(self.update) if records else self.update

    def update(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.net(x) - x).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return {"loss": loss.detach()}

    def losses(self, steps: int) -> list[float]:
        generator, found = torch.Generator().manual_seed(1), []
        for step in range(steps):
            set_rate(self.optimiser.param_groups[0], 1e-2 / (1 + step))
            x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(next(self.net.parameters()).device)
            found.append(float(self.run(x)["loss"]))
        return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a CUDA device's")
def test_a_recorded_step_equals_its_plain_twin():
    """Through warm-up, recording and replay, with other inputs and another rate in every step."""
    cuda = torch.device("cuda")
    plain, recorded = Fit(cuda, True), Fit(cuda, True, records=True)  # both with rates in float32, on the device
    assert recorded.losses(WARM_UP + 5) == pytest.approx(plain.losses(WARM_UP + 5), rel=1e-12)


def test_inputs_of_other_shapes_have_a_recording_of_their_own(monkeypatch):
    monkeypatch.setattr(graphs, "Recording", lambda function: function)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    double = Captured(lambda x: {"twice": 2 * x})
    for x in (torch.ones(2), torch.ones(3), torch.zeros(2)):
        assert torch.equal(double(x)["twice"], 2 * x)
    assert len(double.recordings) == 2


def test_an_optimiser_made_capturable_and_back_goes_on_as_before():
    """A run may be resumed on another device, where its steps are not recorded."""
    cpu, plain, moved = torch.device("cpu"), *(Fit(torch.device("cpu"), False) for _ in range(2))
    for one in (plain, moved):
        one.losses(3)
    make_capturable(moved.optimiser, cpu, True)
    assert isinstance(moved.optimiser.param_groups[0]["lr"], Tensor)
    set_rate(moved.optimiser.param_groups[0], 0.5)
    assert float(moved.optimiser.param_groups[0]["lr"]) == 0.5
    make_capturable(moved.optimiser, cpu, False)
    assert moved.optimiser.param_groups[0]["lr"] == 0.5 and not moved.optimiser.param_groups[0]["capturable"]
    assert moved.losses(3) == plain.losses(3)
