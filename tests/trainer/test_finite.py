"""A step that is not finite leaves weights and optimizer as they were, and is told of one step later."""

import math

import pytest
import torch

from g4trainer.exits import NonFiniteLoss
from g4trainer.finite import FiniteGuard


def step(guard: FiniteGuard, optimizer: torch.optim.Optimizer, number: int, *, gradient: float, loss: float) -> None:
    """What the trainer does around `optimizer.step()`."""
    [weight] = optimizer.param_groups[0]["params"]
    weight.grad = torch.full_like(weight, gradient)
    guard.check()
    guard.watch(optimizer, norm=weight.grad.norm(), loss=torch.tensor(loss), step=number, learning_rate=0.1)
    optimizer.step()


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1, fused=True)


@pytest.mark.parametrize(
    ("gradient", "loss", "told"),
    [
        (math.nan, 1.0, "the gradient's norm is nan at step 2, the learning rate 0.1."),
        (math.inf, 1.0, "the gradient's norm is inf at step 2"),
        (1.0, math.inf, "the loss is inf at step 2"),
    ],
)
def test_the_step_is_passed_over(optimizer: torch.optim.Optimizer, gradient: float, loss: float, told: str) -> None:
    guard = FiniteGuard()
    step(guard, optimizer, 1, gradient=1.0, loss=1.0)
    [weight] = optimizer.param_groups[0]["params"]
    before = weight.detach().clone()
    assert not torch.equal(before, torch.ones(3)), "a finite step is taken"
    moments = {name: tensor.clone() for name, tensor in optimizer.state[weight].items()}
    step(guard, optimizer, 2, gradient=gradient, loss=loss)
    assert torch.equal(weight, before)
    assert all(torch.equal(tensor, moments[name]) for name, tensor in optimizer.state[weight].items())
    with pytest.raises(NonFiniteLoss, match=told):
        step(guard, optimizer, 3, gradient=1.0, loss=1.0)
    assert torch.equal(weight, before), "the next step is not taken either"


def test_finite_steps_are_those_of_a_plain_optimizer(optimizer: torch.optim.Optimizer) -> None:
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1, fused=True)
    guard = FiniteGuard()
    for number in range(1, 4):
        step(guard, optimizer, number, gradient=0.5 * number, loss=1.0)
        [weight] = plain.param_groups[0]["params"]
        weight.grad = torch.full_like(weight, 0.5 * number)
        plain.step()
    guard.check()
    guard.check()
    assert torch.equal(optimizer.param_groups[0]["params"][0], weight)
