"""Outer loops: three engines that agree, against finite differences, and what each loop says in closed form."""

import importlib.util
import math
import sys

import pytest
import torch
from torch import Tensor

from metagpen.errors import ConfigError
from metagpen.gpen import layers
from metagpen.graphs import WARM_UP
from metagpen.meta import ENGINES, OUTER_LOOPS, Problem, Progress
from metagpen.meta.engines import batched, batched_reference, import_learn2learn
from metagpen.meta.multi_step import step_weights
from metagpen.meta.problem import MetaGradient, through_the_steps
from metagpen.meta.recorded import RecordedGradient
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, adapter, personal_forward
from metagpen.person.rule import InnerRule, RuleConfig
from metagpen.schedule import warmup_cosine

STEPS, PEOPLE = 3, 2
SPEC = AdapterSpec(tail_blocks=1, tail_rank=2)


def engine_called(name: str):
    """The engine, or a skip where its library is absent."""
    if name != "batched" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (make setup-learn2learn)")
    return ENGINES[name]


@pytest.fixture
def smooth(monkeypatch, tiny_model):
    """The tiny model in float64 with a smooth activation: leaky ReLU's kink makes finite differences lie."""
    def activation(x: Tensor, bias: Tensor, factor: Tensor | None = None) -> Tensor:
        bias, factor = (value.reshape(*value.shape, *[1] * (x.ndim - 2))
                        for value in (bias, torch.ones_like(bias) if factor is None else factor))
        return torch.nn.functional.softplus(factor * x + bias)
    monkeypatch.setattr(layers, "scaled_leaky_relu", activation)
    monkeypatch.setattr(adapter, "scaled_leaky_relu", activation)
    return tiny_model.double()


def problem_of(model: MetaGPEN, config: RuleConfig, people: int = PEOPLE, steps: int = STEPS) -> Problem:
    """Random faces; mean squared error inside and outside."""
    generator = torch.Generator().manual_seed(5)

    def images() -> tuple[Tensor, Tensor]:
        shape = (2, 2 * PEOPLE, 3, model.size, model.size)
        return tuple(torch.rand(shape, generator=generator, dtype=torch.float64)[:, :2 * people] * 2 - 1)

    def objective(parameters: dict[str, Tensor], poor: Tensor, truth: Tensor) -> Tensor:
        restored = personal_forward(model.gpen, poor, parameters, SPEC)
        return (restored - truth).square().unflatten(0, (people, -1)).mean(dim=(1, 2, 3, 4))

    rule = InnerRule(model.gpen, SPEC, config, lr_latent=0.3, lr_tail=0.2).double()
    with torch.no_grad():
        for value in rule.initial.values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return Problem(objective, objective, [images() for _ in range(steps)], images(), rule.begin(people),
                   [rule.rates(step, steps) for step in range(steps)], config.optimiser)


def on_device(problem: Problem, device: str) -> Problem:
    """The problem, its tensors on the device."""
    def placed(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in values.items()}

    return Problem(**{**vars(problem), "support": [tuple(x.to(device) for x in batch) for batch in problem.support],
                      "query": tuple(x.to(device) for x in problem.query), "begin": placed(problem.begin),
                      "rates": [placed(step) for step in problem.rates]})


def flat(gradient: MetaGradient) -> dict[str, Tensor]:
    found = {f"begin {name}": value for name, value in gradient.begin.items()}
    return found | {f"rate {k} {name}": value for k, step in enumerate(gradient.rates) for name, value in step.items()}


def assert_same(found: MetaGradient, expected: MetaGradient, tolerance: float = 1e-8) -> None:
    a, b = flat(found), flat(expected)
    assert a.keys() == b.keys() and len(a) > 10
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    for name in a:
        assert b[name].abs().max() > 0, name
        assert (a[name] - b[name]).abs().max() <= tolerance * b[name].abs().max(), name


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="graphs are a CUDA device's"))])
def test_recorded_inner_gradients_give_the_plain_meta_gradient(smooth, optimiser, device):
    """On a CPU what would be recorded is run as it is. Enough steps to warm up, record and play."""
    steps = WARM_UP + 3
    problem = on_device(problem_of(smooth, RuleConfig(optimiser, steps, per_step=True), steps=steps), device)
    smooth.to(device)
    gradient = RecordedGradient(problem.inner, list(problem.begin), list(problem.rates[0]), recorded=device == "cuda")
    found = through_the_steps(Problem(**{**vars(problem), "gradient": gradient}), batched, second_order=False)
    assert_same(found, through_the_steps(problem, batched, second_order=False), tolerance=1e-7)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_agree(smooth, engine, second_order, elementwise):
    config = RuleConfig(steps=STEPS, per_step=True, elementwise=elementwise)
    expected = through_the_steps(problem_of(smooth, config), batched_reference, second_order)
    found = through_the_steps(problem_of(smooth, config), engine_called(engine), second_order)
    assert_same(found, expected)


def test_orders_differ(smooth):
    """Otherwise the tests above would not know whether second derivatives were taken."""
    config = RuleConfig(steps=STEPS, per_step=True)
    first, second = (flat(through_the_steps(problem_of(smooth, config), batched, order)) for order in (False, True))
    assert all((first[name] - second[name]).abs().max() > 1e-6 * second[name].abs().max() for name in first
               if name.startswith("begin"))


def test_second_order_matches_central_differences(smooth):
    problem = problem_of(smooth, RuleConfig(steps=STEPS, per_step=True))
    found = through_the_steps(problem, batched, True)
    generator = torch.Generator().manual_seed(1)

    def loss_at(shift: float, name: str, direction: Tensor, step: int | None) -> float:
        begin, rates = dict(problem.begin), [dict(r) for r in problem.rates]
        place = begin if step is None else rates[step]
        place[name] = place[name] + shift * direction
        moved = Problem(**{**vars(problem), "begin": begin, "rates": rates})
        return float(through_the_steps(moved, batched_reference, False).loss)

    cases = [(name, None) for name in problem.begin] + [(name, 1) for name in problem.rates[1]]
    for name, step in cases:
        gradient = found.begin[name] if step is None else found.rates[step][name]
        value = problem.begin[name] if step is None else problem.rates[step][name]
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        h = 1e-5
        numeric = (loss_at(h, name, direction, step) - loss_at(-h, name, direction, step)) / (2 * h)
        analytic = float((gradient * direction).sum())
        assert math.isclose(numeric, analytic, rel_tol=1e-5, abs_tol=1e-9), (name, step, numeric, analytic)


def test_first_order_is_the_gradient_at_the_end(smooth):
    problem = problem_of(smooth, RuleConfig(steps=STEPS))
    found = OUTER_LOOPS["fomaml"].gradient(problem, batched, Progress())
    leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
    end = {name: value.detach().requires_grad_()
           for name, value in batched_reference(problem, leaves, problem.rates, False)[-1].items()}
    loss = problem.outer(end, *problem.query).mean()
    expected = dict(zip(end, torch.autograd.grad(loss, list(end.values())), strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(found.begin[name], value, rtol=1e-10, atol=1e-14)


def test_reptile_points_from_the_end_to_the_beginning(smooth):
    problem = problem_of(smooth, RuleConfig(steps=STEPS))
    found = OUTER_LOOPS["reptile"].gradient(problem, batched, Progress())
    leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
    end = batched_reference(problem, leaves, problem.rates, False)[-1]
    for name in problem.begin:
        torch.testing.assert_close(found.begin[name], ((problem.begin[name] - end[name]) / PEOPLE).detach())
    assert not any(found.rates)


def test_a_batch_of_people_is_the_mean_of_its_people(smooth):
    """One person's gradient does not depend on who shares the batch."""
    config = RuleConfig(steps=STEPS)
    alone = through_the_steps(problem_of(smooth, config, people=1), batched, True)
    together = through_the_steps(problem_of(smooth, config), batched, True)
    for name, value in alone.begin.items():
        torch.testing.assert_close(together.begin[name][:1] * PEOPLE, value, rtol=1e-8, atol=1e-12)


def test_slow_weights_get_the_querys_direct_gradient(smooth):
    smooth.requires_grad_(True)
    weight = smooth.gpen.generator.conv1.conv.modulation.weight
    problem = problem_of(smooth, RuleConfig(steps=STEPS))
    problem.slow = [weight]
    for second_order in (True, False):
        found = through_the_steps(problem, batched, second_order)
        leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
        end = {k: v.detach() for k, v in batched_reference(problem, leaves, problem.rates, False)[-1].items()}
        expected, = torch.autograd.grad(problem.outer(end, *problem.query).mean(), weight)
        torch.testing.assert_close(found.slow[0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", list(OUTER_LOOPS))
def test_every_loop_descends(smooth, name):
    """A small step against the gradient lowers the loss after adaptation (Reptile's: the support's)."""
    loop = OUTER_LOOPS[name]
    shape = {"moving": loop.moving} if loop.moving else {}
    config = RuleConfig(steps=STEPS, per_step=loop.per_step, elementwise=loop.elementwise, **shape)
    problem = problem_of(smooth, config)
    if name == "reptile":
        problem.query = problem.support[0]
        problem.support = [problem.query] * STEPS
    before = loop.gradient(problem, batched, Progress())
    norm = sum(value.square().sum() for value in before.begin.values()).sqrt()
    moved = {n: (value - 1e-3 / norm * before.begin.get(n, 0)).detach() for n, value in problem.begin.items()}
    after = loop.gradient(Problem(**{**vars(problem), "begin": moved}), batched, Progress())
    assert after.loss < before.loss
    still = set(problem.begin) - set(problem.rates[0])
    assert (still == {n for n in problem.begin if not n.startswith("latent.")}) if name == "anil" else not still
    assert bool(before.rates[0]) == loop.learns_rates


def test_multi_step_weights_move_to_the_last_step():
    assert step_weights(4, 0.0) == pytest.approx([0.25] * 4)
    assert step_weights(4, 1.0) == pytest.approx([0.03, 0.03, 0.03, 0.91])
    for done in (0.0, 0.2, 0.7):
        assert sum(step_weights(5, done)) == pytest.approx(1.0)


@pytest.mark.parametrize("second_order", [True, False])
def test_a_loss_after_every_step_keeps_no_more_memory_than_one(smooth, second_order):
    """And its gradient is that of the plain sum."""
    weights = [0.2] * STEPS

    def kept(weights: list[float] | None) -> int:
        total = 0

        def keep(value: Tensor) -> Tensor:
            nonlocal total
            total += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            through_the_steps(problem_of(smooth, RuleConfig(steps=STEPS)), batched, second_order, weights)
        return total

    assert kept(weights) <= kept(None)
    problem = problem_of(smooth, RuleConfig(steps=STEPS))
    found = through_the_steps(problem, batched, second_order, weights)
    leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
    path = batched_reference(problem, leaves, problem.rates, second_order)
    loss = sum(0.2 * problem.outer(parameters, *problem.query).mean() for parameters in path)
    for name, expected in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(found.begin[name], expected, rtol=1e-8, atol=1e-12)


def test_adam_inside_in_first_order_and_not_in_second(smooth):
    problem = problem_of(smooth, RuleConfig(optimiser="adam", steps=STEPS))
    assert through_the_steps(problem, batched, False).loss.isfinite()
    with pytest.raises(ConfigError, match="only sgd"):
        through_the_steps(problem, batched, True)
    for name in ("higher", "learn2learn"):
        with pytest.raises(ConfigError, match="use engine: batched"):
            through_the_steps(problem, engine_called(name), False)


def test_learn2learn_leaves_no_empty_modules():
    """Empty modules let its algorithms be imported; who wants the real ones later must not find those."""
    engine_called("learn2learn")
    assert import_learn2learn().MetaSGD is import_learn2learn().MetaSGD
    assert not {"learn2learn.vision", "learn2learn.gym", "learn2learn.text", "learn2learn.data"} & sys.modules.keys()


def test_an_unknown_kind_of_parameter_is_refused():
    with pytest.raises(ConfigError, match="some of latent"):
        RuleConfig(moving=("latents",))


def test_rates_of_longer_and_shorter_runs(tiny_model):
    """A run of T steps takes the table as it is, one of n walks through it at its own pace, times (T/n)^shrink."""
    rule = InnerRule(tiny_model.gpen, SPEC, RuleConfig(steps=4, per_step=True))
    table = torch.tensor([0.1, 0.2, 0.4, 0.8])
    with torch.no_grad():
        for own in rule.log_rates.values():
            own.copy_(table.log().reshape(4, *[1] * (own.ndim - 1)).expand_as(own))
        rule.shrink.fill_(1.0)
    exact = torch.stack([rule.rates(step, 4)["linear.bias"].flatten()[0] for step in range(4)])
    torch.testing.assert_close(exact, table)
    longer = torch.stack([rule.rates(step, 7)["linear.bias"].flatten()[0] for step in range(7)])
    torch.testing.assert_close(longer[::2], table * 4 / 7)
    assert (longer.diff() > 0).all()
    torch.testing.assert_close(rule.rates(0, 1)["linear.bias"].flatten()[0], table[0] * 4)
    rule.rates(1, 2)["linear.bias"].sum().backward()
    assert rule.shrink.grad.abs() > 0


def test_a_cosine_over_the_learned_rates(tiny_model):
    """As rates by hand have it: at 32 steps a warm-up over four, then down to a twentieth."""
    flat, cosine = (InnerRule(tiny_model.gpen, SPEC, RuleConfig(steps=8, schedule=name)) for name in ("flat", "cosine"))
    for steps in (1, 8, 32):
        for step in range(steps):
            ratio = cosine.rates(step, steps)["linear.bias"] / flat.rates(step, steps)["linear.bias"]
            assert ratio.item() == pytest.approx(warmup_cosine(step, steps, steps // 8, 0.05), rel=1e-5)
    assert warmup_cosine(31, 32, 4, 0.05) == pytest.approx(0.05)
    assert InnerRule.from_dict(tiny_model.gpen, cosine.to_dict()).config == cosine.config
    with pytest.raises(ConfigError, match="flat or cosine"):
        RuleConfig(schedule="linear")
