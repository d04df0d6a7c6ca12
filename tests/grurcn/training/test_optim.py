"""Learning rates worked by hand, and an optimizer of what learns."""

import math

import pytest
import torch
from torch import nn

from grurcn.training.optim import OptimConfig, build_optimizer, learning_rate


def rates(num_steps, **settings):
    config = OptimConfig(learning_rate=8.0, **settings)
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_a_constant_rate_stays():
    assert rates(3) == [8, 8, 8]


def test_warming_up_ends_at_the_highest_rate_and_the_schedule_follows():
    assert rates(6, warmup_steps=4) == [2, 4, 6, 8, 8, 8]


def test_a_cosine_falls_from_the_highest_rate_towards_zero():
    half = 4 * math.sqrt(2) / 2
    assert rates(4, schedule="cosine") == pytest.approx([8, 4 + half, 4, 4 - half])
    assert rates(6, schedule="cosine", warmup_steps=2) == pytest.approx([4, 8, 8, 4 + half, 4, 4 - half])


def test_a_cosine_is_zero_after_its_end_and_does_not_rise_again():
    config = OptimConfig(learning_rate=8.0, schedule="cosine")
    assert learning_rate(4, 4, config) == pytest.approx(0)
    assert learning_rate(7, 4, config) == pytest.approx(0)


def test_steps_cut_the_rate_to_a_tenth_each_time():
    assert rates(7, schedule="steps", step_every=3) == pytest.approx([8, 8, 8, 0.8, 0.8, 0.8, 0.08])
    assert rates(6, schedule="steps", step_every=2, warmup_steps=2) == pytest.approx([4, 8, 8, 8, 0.8, 0.8])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule):
    assert rates(2, schedule=schedule, warmup_steps=4) == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate 0: expected above 0"),
        ({"learning_rate": -0.5}, "learning_rate -0.5: expected above 0"),
        ({"warmup_steps": -1}, "warmup_steps -1: expected at least 0"),
        ({"step_every": 0}, "step_every 0: expected at least 1"),
        ({"clip_norm": -2.0}, "clip_norm -2: expected at least 0"),
        ({"weight_decay": -3.0}, "weight_decay -3: expected at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def half_frozen():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_optimizer_leaves_out_what_is_frozen(name):
    model = half_frozen()
    optimizer = build_optimizer(model.parameters(), OptimConfig(optimizer=name))
    [group] = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model[1].parameters()]


def step(config, gradients):
    """Where a weight that starts at 1 is after steps along the given gradients."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer([weight], config)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return weight.item()


def test_sgd_has_momentum_and_adds_weight_decay_to_the_gradient():
    config = OptimConfig(optimizer="sgd", learning_rate=0.1)
    assert step(config, [2.0, 0.0]) == pytest.approx(1 - 0.1 * 2 - 0.1 * 0.9 * 2)
    decaying = OptimConfig(optimizer="sgd", learning_rate=0.1, weight_decay=0.5)
    assert step(decaying, [2.0]) == pytest.approx(1 - 0.1 * (2 + 0.5))


def test_adams_first_step_is_the_rate_whatever_the_gradient_and_weight_decay_is_apart():
    for gradient in (1e-3, 10.0):
        assert step(OptimConfig(learning_rate=0.1), [gradient]) == pytest.approx(0.9, abs=1e-5)
    decaying = OptimConfig(learning_rate=0.1, weight_decay=0.5)
    assert step(decaying, [1.0]) == pytest.approx(1 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_adadelta_takes_the_step_that_its_equations_say_with_the_decay_of_the_captioning_loss():
    """Zeiler 2012, rho 0.95, epsilon 1e-6; 1e-4 |theta|^2 in the loss is a gradient of 2e-4 theta."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    config = OptimConfig(optimizer="adadelta", learning_rate=1.0, weight_decay=2e-4)
    optimizer = build_optimizer([weight], config)
    wanted, squares, changes = weight.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(3):
        optimizer.zero_grad()
        (weight * torch.tensor([0.3, 0.1 * step], dtype=torch.float64)).sum().backward()
        optimizer.step()
        penalised = wanted.clone().requires_grad_()
        loss = (penalised * torch.tensor([0.3, 0.1 * step])).sum() + 1e-4 * penalised.square().sum()
        (gradient,) = torch.autograd.grad(loss, penalised)
        squares = 0.95 * squares + 0.05 * gradient**2
        change = -(changes + 1e-6).sqrt() / (squares + 1e-6).sqrt() * gradient
        changes = 0.95 * changes + 0.05 * change**2
        wanted = wanted + change
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-6, atol=1e-9)
