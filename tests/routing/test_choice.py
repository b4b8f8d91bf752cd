"""Adaptor choice: budgets, determinism, what the score does not depend on, and what must come last."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.prompt import Prompt
from edge_adapt.adapters.protocol import places
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.routing.candidates import Candidate, Cost, candidates, cost
from edge_adapt.routing.choice import (
    SAMPLES,
    WEIGHTS,
    Budget,
    Measured,
    Scored,
    Weights,
    choose,
    forward_kernel,
    reach,
    score,
    spectrum_of,
    tangent_kernel,
)
from edge_adapt.tail import Tail

WAYS = ("gradients", "forward")


@pytest.fixture(scope="module")
def tail(device_bundle) -> Tail:
    return Tail(device_bundle)


@pytest.fixture(scope="module")
def h(tail) -> Tensor:
    """Twelve tensors at the cut."""
    shape = tail.bundle.manifest.cut.shape
    return torch.randn(12, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def few(tail) -> tuple[Candidate, ...]:
    """One of each kind."""
    every = candidates(tail)
    kinds = {candidate.adapter.kind: candidate for candidate in every}
    assert len(kinds) == 5
    return tuple(kinds.values())


def names(rows: tuple[Scored, ...]) -> list[str]:
    return [row.candidate.name for row in rows]


class Still(LoRA):
    """An adapter whose parameters change nothing."""

    kind = "still"

    def weights(self, values, source):
        return {name: value + 0 * sum(v.sum() for v in values.values()) for name, value in source.items()}


class Broken(LoRA):
    """One whose weights are not finite."""

    kind = "broken"

    def weights(self, values, source):
        return {name: value * math.nan for name, value in super().weights(values, source).items()}


@dataclass(frozen=True)
class Scaled:
    """A tail whose logits are larger or smaller."""

    tail: Tail
    factor: float

    def __getattr__(self, name: str):
        return getattr(self.tail, name)

    def __call__(self, *given, **named) -> Tensor:
        return self.factor * self.tail(*given, **named)


# What there is to choose from


def test_every_candidate_has_a_name_of_its_own_and_answers_like_source_at_the_start(tail, h):
    every = candidates(tail)
    assert len({candidate.name for candidate in every}) == len(every)
    expected = tail(h)
    for candidate in every:
        torch.testing.assert_close(candidate.run(tail, candidate.start(0), h), expected)


def test_places_that_share_nothing_bear_no_low_rank(tail):
    assert not [candidate.name for candidate in candidates(tail) if candidate.name.endswith("@depthwise")]


@pytest.mark.parametrize("way", WAYS)
def test_prompts_where_the_cut_is_a_sequence_of_tokens(token_bundle, way):
    tail = Tail(token_bundle)
    prompts = [candidate for candidate in candidates(tail) if isinstance(candidate.adapter, Prompt)]
    assert prompts
    h = torch.randn(4, 17, 16, generator=torch.Generator().manual_seed(1))
    rows = choose(tail, h, among=[*prompts, *candidates(tail)[:3]], way=way)
    assert all(math.isfinite(row.score) for row in rows)


# Budgets


@pytest.mark.parametrize("way", WAYS)
def test_nothing_over_the_budget_is_in_the_table(tail, h, way):
    every = {candidate.name: cost(tail, candidate, h) for candidate in candidates(tail)}
    parameters = sorted(taken.parameters for taken in every.values())[len(every) // 3]
    size = sorted(taken.step_bytes(8) for taken in every.values())[len(every) // 2]
    budget = Budget(parameters=parameters, bytes=size, frames=8)
    rows = choose(tail, h, budget=budget, way=way)
    fitting = {name for name, taken in every.items() if taken.parameters <= parameters and taken.step_bytes(8) <= size}
    assert 0 < len(fitting) < len(every)
    assert set(names(rows)) == fitting


def test_a_budget_that_fits_exactly_is_enough_and_one_byte_less_is_not(tail, h, few):
    taken = cost(tail, few[0], h)
    exact = Budget(parameters=taken.parameters, bytes=taken.step_bytes(32))
    assert names(choose(tail, h, among=few[:1], budget=exact)) == [few[0].name]
    for less in (replace(exact, parameters=exact.parameters - 1), replace(exact, bytes=exact.bytes - 1)):
        with pytest.raises(ConfigError):
            choose(tail, h, among=few[:1], budget=less)


def test_when_nothing_fits_the_error_names_the_smallest_and_the_budget(tail, h):
    with pytest.raises(ConfigError) as error:
        choose(tail, h, budget=Budget(bytes=17, frames=3))
    costs = {candidate.name: cost(tail, candidate, h).step_bytes(3) for candidate in candidates(tail)}
    smallest = min(costs, key=costs.__getitem__)
    assert f"the smallest, {smallest}," in error.value.what
    assert " 17 bytes" in error.value.what
    assert str(costs[smallest]) in error.value.what


def test_a_bound_below_one_is_refused():
    with pytest.raises(ConfigError, match="parameters is 0"):
        Budget(parameters=0)


def test_no_candidate_at_all_is_refused(tail, h):
    with pytest.raises(ConfigError, match="no candidate"):
        choose(tail, h, among=())


def test_an_adapter_further_back_keeps_less(tail, h):
    layers = [Candidate(place.name, LoRA((place,), rank=2)) for place in places(tail)]
    sizes = [cost(tail, layer, h).bytes_per_frame for layer in layers]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0


# Determinism


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_table_in_any_order(tail, h, few, way):
    one, other = (choose(tail, h, among=given, way=way, seed=3) for given in (few, few[::-1]))
    assert names(one) == names(other)
    assert [row.score for row in one] == [row.score for row in other]


@pytest.mark.parametrize("way", WAYS)
def test_another_seed_draws_other_values(tail, h, few, way):
    one, other = (choose(tail, h, among=few, way=way, seed=seed) for seed in (0, 1))
    assert [row.score for row in one] != [row.score for row in other]


@pytest.mark.parametrize("way", WAYS)
def test_the_generator_of_the_process_and_the_tail_are_left_alone(tail, h, few, way):
    state, source = torch.get_rng_state(), {name: value.clone() for name, value in tail.parameters.items()}
    given = h.clone()
    choose(tail, h, among=few, way=way)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(h, given)
    assert all(torch.equal(tail.parameters[name], value) for name, value in source.items())


@pytest.mark.parametrize("way", WAYS)
def test_no_more_than_64_frames_are_used(tail, few, way):
    shape = tail.bundle.manifest.cut.shape
    many = torch.randn(2 * SAMPLES - 1, *shape, generator=torch.Generator().manual_seed(2))
    chosen = many[::2]
    assert len(chosen) == SAMPLES
    whole, part = (choose(tail, given, among=few[:1], way=way) for given in (many, chosen))
    assert whole[0].score == part[0].score


# What the numbers mean


def test_the_kernel_is_that_of_finite_differences(tail, h):
    """Of the parameters behind a linear change of the last layer, where the step may be large."""
    candidate = next(found for found in candidates(tail) if found.name == "ssf@head")
    start, samples = candidate.start(0), h[:3]
    start = {
        name: value if value.any() else 1e-2 * torch.ones_like(value) for name, value in start.items()
    }  # the drawn shift moves no derivative
    columns = []
    for name, value in start.items():
        for index in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[index] = 1.0
            moved = candidate.run(tail, {**start, name: value + step}, samples)
            columns.append(moved - candidate.run(tail, start, samples))
    changes = torch.stack(columns, 2)  # [N, K, P]
    changes = changes - changes.mean(1, keepdim=True)
    expected = torch.einsum("nkp,mkp->nm", changes, changes)
    torch.testing.assert_close(tangent_kernel(tail, candidate, samples), expected, rtol=1e-3, atol=1e-4)


def test_the_forward_kernel_is_about_that_of_the_gradients(tail, h):
    """On the features instead of the logits, but of the same parameters: large where the other is large."""
    for candidate in (found for found in candidates(tail) if found.name in ("lora-4@all", "ssf@all")):
        one, other = (kernel(tail, candidate, h) for kernel in (tangent_kernel, forward_kernel))
        assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) > 0.4


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e4])
def test_the_score_does_not_depend_on_the_scale_of_the_kernel(tail, h, few, factor):
    kernel, labels = tangent_kernel(tail, few[0], h), tail(h).argmax(1)
    one, other = spectrum_of(kernel, labels), spectrum_of(factor * kernel, labels)
    assert (one.rank, one.condition, one.fisher) == pytest.approx((other.rank, other.condition, other.fisher), 1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_the_order_does_not_depend_on_the_scale_of_the_logits(tail, h, few, way, factor):
    plain = choose(tail, h, among=few, way=way)
    scaled = choose(Scaled(tail, factor), h, among=few, way=way)
    assert names(plain) == names(scaled)
    steps = [other.score - one.score for one, other in zip(plain, scaled, strict=True)]
    assert steps == pytest.approx([WEIGHTS[way].reach * math.log(factor)] * len(few), abs=1e-2)


def test_reach_counts_every_parameter_alike(tail, h):
    """An adapter on more places reaches further than on any of them, and one with more parameters further too."""
    found = {candidate.name: reach(tail, candidate, h) for candidate in candidates(tail)}
    alone = {place.name: found[f"lora-4@{place.name}"] for place in places(tail)}
    assert found["lora-4@all"] > max(alone.values())
    assert all(found[f"lora-16@{place}"] > value > 0 for place, value in alone.items())


def test_rank_and_condition_of_kernels_that_are_known():
    labels = torch.tensor([0, 0, 1, 1])
    equal = spectrum_of(torch.eye(4), labels)
    assert (equal.rank, equal.condition) == pytest.approx((4, 1))
    single = spectrum_of(torch.ones(4, 4), labels)
    assert (single.rank, single.condition) == pytest.approx((1, 1))
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    assert spectrum_of(apart @ apart.T, labels).fisher > 100
    mixed = torch.tensor([0, 1, 0, 1])
    assert spectrum_of(apart @ apart.T, mixed).fisher < 0.1


@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_what_costs_more_scores_less(name):
    measured, weights = Measured(8.0, 4.0, 0.5, 2.0), replace(Weights(), **{name: -0.3})
    small, large = Cost(100, 1000), Cost(**{"parameters": 100, "bytes_per_frame": 1000, **_larger(name)})
    assert score(measured, small, weights) - score(measured, large, weights) == pytest.approx(0.3 * math.log(2))


def _larger(name: str) -> dict[str, int]:
    return {"parameters": 200} if name == "parameters" else {"bytes_per_frame": 2000}


# What must come last


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Still, Broken])
def test_what_can_learn_nothing_or_is_not_finite_comes_last(tail, h, few, way, kind):
    useless = Candidate("aaa", kind(places(tail)[:1], rank=1))
    rows = choose(tail, h, among=[useless, *few], way=way)
    assert names(rows)[-1] == "aaa"
    assert rows[-1].score == -math.inf
    assert all(math.isfinite(row.score) for row in rows[:-1])


@pytest.mark.parametrize("way", WAYS)
def test_frames_that_are_not_finite_are_left_out(tail, h, few, way):
    dirty = torch.cat([h, torch.full_like(h[:1], math.nan), torch.full_like(h[:1], math.inf)])
    clean, mixed = (choose(tail, given, among=few, way=way) for given in (h, dirty))
    assert [(row.candidate.name, row.score) for row in clean] == [(row.candidate.name, row.score) for row in mixed]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_frames_are_refused(tail, h, count):
    with pytest.raises(DataError, match=f"{count} of {count + 1} frames"):
        choose(tail, torch.cat([h[:count], torch.full_like(h[:1], math.nan)]))


@pytest.mark.parametrize("way", WAYS)
def test_equal_frames_give_a_table_all_the_same(tail, h, few, way):
    rows = choose(tail, h[:1].expand(8, *h.shape[1:]), among=few, way=way)
    assert all(row.measured.rank == pytest.approx(1, abs=1e-3) for row in rows)
    assert not any(math.isnan(row.score) for row in rows)


def test_ports_in_force_change_the_table(tail, h, few):
    channels = sum(site.channels for site in tail.bundle.manifest.sites)
    ports = (torch.full((channels,), 1.5), torch.full((channels,), 0.5))
    plain, ported = (choose(tail, h, among=few, ports=given) for given in (None, ports))
    assert [row.score for row in plain] != [row.score for row in ported]


def test_both_ways_have_weights():
    assert set(WEIGHTS) == set(WAYS)
