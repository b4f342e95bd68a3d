"""Sampling: a pure function of the logits, the parameters and the tokens so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perdure.workers.text.noise import exponential, fraction, uniform
from perdure.workers.text.parameters import Parameters
from perdure.workers.text.sampler import SampledRow, all_kept, choose, kept, score

CPU = torch.device("cpu")


def parameters(**fields: Any) -> Parameters:
    return Parameters.of({"prompt": "a", "seed": 1, **fields}, "request")


def logits(size: int = 50, seed: int = 0) -> Tensor:
    return torch.from_numpy(numpy.random.default_rng(seed).normal(size=size).astype(numpy.float32))


def row(
    fields: Parameters, output: Sequence[int] = (), prompt: Sequence[int] = (), ends: Sequence[int] = ()
) -> SampledRow:
    return SampledRow(fields, prompt, output, ends)


def chosen(values: Tensor, fields: Parameters, index: int = 0) -> int:
    return choose(values.unsqueeze(0), [row(fields, [0] * index)])[0]


def adjusted(values: Tensor, one: SampledRow) -> Tensor:
    values = values.clone()
    one.adjust(values)
    return values


def test_greedy_takes_the_lowest_of_equal_tokens():
    """Ties have one answer, in a vocabulary of any size."""
    assert chosen(torch.tensor([0.0, 3, 1, 3]), parameters()) == 1
    for size in (1000, 49_152, 151_936):
        values = torch.zeros(size)
        values[[size // 3, size // 2, size - 1]] = 1
        assert chosen(values, parameters()) == size // 3


def test_noise_depends_on_seed_position_and_token_only():
    """Not on how many tokens there are, nor on whom it is drawn together with."""
    whole = exponential([(7, 3), (8, 3), (7, 4)], 1000, CPU)
    assert torch.equal(exponential([(7, 3)], 500, CPU)[0], whole[0, :500])
    assert torch.equal(exponential([(7, 4), (7, 3)], 1000, CPU)[1], whole[0])
    for other in (whole[1], whole[2]):
        assert not (other == whole[0]).any()
    assert whole.min() > 0
    assert whole.isfinite().all()


def test_noise_is_the_same_for_ever():
    """A change here would change every seeded answer of every user."""
    words = uniform(42, 0, numpy.array([0, 1, 49151])) * 2**52
    assert [int(word) for word in words] == [1704597898904423, 2929977715766208, 244310753259266]
    found = fraction([(42, 0), (2**63 - 1, 70_000)], 49_152, CPU)[:, [0, 1, 49_151]] * 2**31
    assert found.tolist() == [[1959656576, 1219132544, 861833024], [1091408640, 1634722944, 777216832]]


def test_noise_is_that_of_the_hash(monkeypatch):
    """Against the same hash in plain integers of 32 bits."""
    low, high, mask = 123_456_789, 4_000_000_000, 2**32 - 1
    monkeypatch.setattr("perdure.workers.text.noise._key", lambda seed, position: (high << 32) | low)
    found = fraction([(0, 0)], 3000, CPU)[0]
    for token in (0, 1, 77, 2999):
        word = (token * 0x9E3779B9 + low) & mask
        word ^= word >> 16
        word = (word * 0x7FEB352D + high) & mask
        word ^= word >> 15
        word = (word * 0x846CA68B) & mask
        word ^= word >> 16
        assert found[token] == float(
            numpy.float32(numpy.float32(word >> 1) + numpy.float32(0.5)) * numpy.float32(2.0**-31)
        )


def test_noise_is_even():
    """Mean and variance of the exponential distribution; neighbours, in tokens or positions, have nothing in common."""
    values = exponential([(1, place) for place in range(40)], 20_000, CPU).double()
    assert abs(values.mean() - 1) < 0.005
    assert abs(values.var() - 1) < 0.02
    assert abs((values < math.log(2)).double().mean() - 0.5) < 0.003
    table = torch.stack([values[:-1, :-1].flatten(), values[1:, :-1].flatten(), values[:-1, 1:].flatten()])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 0.005


def test_draws_follow_the_softmax():
    """Over many positions, each token is drawn as often as its probability says."""
    values = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = [chosen(values, parameters(temperature=0.7), index) for index in range(4000)]
    expected = torch.softmax(values / 0.7, 0)
    assert (torch.bincount(torch.tensor(draws), minlength=4) / 4000 - expected).abs().max() < 0.03


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """One token holds all but a thousandth, which fifty thousand share: they are drawn once in a thousand times."""
    values = torch.zeros(50_000)
    values[123] = math.log(999 * 49_999)
    fields = parameters(temperature=1)
    draws = [chosen(values, fields, index) for index in range(6000)]
    assert 1 <= sum(token != 123 for token in draws) <= 15


def test_a_draw_is_the_same_beside_others():
    """In any place of a batch of any size, in vocabularies that fill no vector register."""
    for size in (50, 1001, 49_153):
        values = torch.stack([logits(size, seed) for seed in range(7)])
        given = [parameters(temperature=0.5 + seed, seed=seed, top_p=0.9, min_p=0.001 * seed) for seed in range(7)]
        alone = [choose(values[place : place + 1], [row(given[place], [1, 2])])[0] for place in range(7)]
        assert choose(values, [row(item, [1, 2]) for item in given]) == alone
        assert choose(values.flip(0), [row(item, [1, 2]) for item in given[::-1]]) == alone[::-1]


def reference(weights: NDArray[numpy.float64], top_k: int, top_p: float) -> list[int]:
    """What stays, in plain sums of a sorted list."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    total, held, stays = sum(weights[token] for token in order), 0.0, []
    for token in order:
        stays.append(token)
        held += weights[token]
        if top_p < 1 and held >= top_p * total:
            break
    return sorted(stays)


@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 3000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1])
def test_top_k_and_top_p_leave_the_strongest(top_k, top_p):
    """SampledRow by row and all at once; of equal ones the first."""
    rows = torch.exp(torch.stack([logits(2500, seed) * 3 for seed in range(3)] + [torch.zeros(2500)]))
    rows = (rows / rows.amax(dim=1, keepdim=True) * 1024).round() / 1024  # many are equal, and sums are exact
    for number, weights in enumerate(rows):
        expected = reference(weights.double().numpy(), top_k, top_p)
        found = kept(weights, top_k, top_p)
        stays = [token for token in expected if weights[token] > 0]
        assert found.nonzero().flatten().tolist() == stays
        assert torch.equal(found[stays], weights[stays])
        assert torch.equal(all_kept(rows, [top_k] * 4, [top_p] * 4)[number], found)


def test_top_p_over_a_flat_vocabulary_sorts_all_of_it():
    """More tokens than the quick way looks at; of equal ones the first."""
    assert kept(torch.ones(5000), 0, 0.5).nonzero().flatten().tolist() == list(range(2500))


def test_min_p_leaves_what_is_likely_enough():
    """After the temperature, as everywhere."""
    values = torch.tensor([0.5, 0.2, 0.1, 0.06, 0.04]).log()
    draws = {chosen(values, parameters(temperature=1, min_p=0.19), index) for index in range(400)}
    assert draws == {0, 1, 2}
    assert {chosen(values, parameters(temperature=100, min_p=0.9), index) for index in range(400)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    """Without overflow."""
    values = logits()
    assert chosen(values, parameters(temperature=temperature)) == int(values.argmax())


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1}, {"repetition_penalty": 1.2}, {"frequency_penalty": 1}])
def test_logits_that_are_no_numbers_are_no_token(bad, fields):
    """Their row has none, also behind penalties; the one beside it has its own."""
    values = torch.stack([logits(), logits()])
    values[0, 7] = bad
    some = [row(parameters(**fields), [7], [7]), row(parameters(**fields), [7], [7])]
    assert choose(values, some) == [-1, choose(values[1:], some[1:])[0]]


def penalised(values: Tensor, fields: dict[str, Any], prompt: list[int], output: list[int]) -> list[float]:
    """The formulas, token by token, in plain numbers of 32 bits."""
    exactly = numpy.float32
    result = []
    for token, logit in enumerate(values.tolist()):
        value = exactly(logit) + exactly(fields.get("logit_bias", {}).get(token, 0))
        if token in prompt or token in output:
            penalty = exactly(fields.get("repetition_penalty", 1))
            value = value / penalty if value > 0 else value * penalty
        times = sum(1 for one in output if one == token)
        value -= exactly(times) * exactly(fields.get("frequency_penalty", 0))
        if times > 0:
            value -= exactly(fields.get("presence_penalty", 0))
        result.append(float(value))
    return result


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {3: 5.5, 49: -100, 0: 0.1}},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 0.3},
        {"frequency_penalty": -2},
        {"presence_penalty": 1.7},
        {
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.6,
            "presence_penalty": -0.4,
            "logit_bias": {3: 5.5, 7: -2.5, 20: 1},
        },
    ],
    ids=lambda fields: "+".join(fields),
)
def test_bias_and_penalties_follow_their_formulas(fields):
    """To the last bit, whatever is in the prompt and in the output."""
    for case in range(20):
        chance = numpy.random.default_rng(case)
        values = logits(seed=case)
        prompt = chance.integers(0, 50, size=case).tolist()
        output = chance.integers(0, 50, size=3 * case % 31).tolist()
        found = adjusted(values, row(parameters(**fields), output, prompt))
        assert found.tolist() == penalised(values, fields, prompt, output)


def test_counts_go_on_from_token_to_token():
    """A row that has seen its tokens come has the logits of one that is given all of them, as after a resume."""
    fields = parameters(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.1)
    output: list[int] = []
    growing = row(fields, output, [1, 2, 2])
    for token in [3, 3, 7, 1, 49, 3]:
        assert torch.equal(adjusted(logits(), growing), adjusted(logits(), row(fields, list(output), [1, 2, 2])))
        output.append(token)


def test_the_prompt_is_no_output():
    """Frequency and presence count what was generated alone."""
    fields = parameters(frequency_penalty=2, presence_penalty=2)
    assert torch.equal(adjusted(logits(), row(fields, [], [1, 2, 2])), logits())
    changed = adjusted(logits(), row(fields, [2, 4, 4], [1, 2, 2]))
    assert (changed != logits()).nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300, 1.7e308])
@pytest.mark.parametrize("temperature", [0, 1e-300, 1, 1e300])
def test_an_extreme_penalty_still_gives_a_token(penalty, temperature):
    """Beyond what numbers hold there is a largest one; never an error, never NaN."""
    values = logits() * 1e30
    values[3] = 0
    fields = parameters(repetition_penalty=penalty, temperature=temperature, top_p=0.9, top_k=20, frequency_penalty=2)
    for output in ([], [1], list(range(50))):
        one = row(fields, output, [5, 6])
        assert adjusted(values, one).isfinite().all()
        assert 0 <= choose(values.unsqueeze(0), [one])[0] < 50


def test_logprobs_are_those_of_the_softmax():
    """Against a plain sum of exact additions; likeliest first, of equal ones the lowest id."""
    row = logits().numpy()
    row[[4, 31, 9]] = 3.5
    total = math.fsum(math.exp(value) for value in row.tolist())
    expected = [value - math.log(total) for value in row.tolist()]
    found = score(row, 17, 5)
    assert found["logprob"] == pytest.approx(expected[17], abs=1e-12)
    order = sorted(range(50), key=lambda token: (-expected[token], token))[:5]
    assert order[:3] == [4, 9, 31]
    assert [token for token, _ in found["top_logprobs"]] == order
    assert [value for _, value in found["top_logprobs"]] == pytest.approx([expected[one] for one in order], abs=1e-12)
    assert score(row, 17, 0) == {"logprob": found["logprob"]}
    assert len(score(row, 0, 50)["top_logprobs"]) == len(score(row, 0, 60)["top_logprobs"]) == 50
    assert all(type(value) is float and type(token) is int for token, value in found["top_logprobs"])


def test_logprobs_of_large_logits_are_numbers():
    """The largest is taken off before the exponential."""
    row = numpy.array([1e30, 1e30, -1e30, 0], dtype=numpy.float32)
    assert score(row, 0, 2) == {"logprob": -math.log(2), "top_logprobs": [[0, -math.log(2)], [1, -math.log(2)]]}
    assert score(row, 2, 0)["logprob"] == -2 * float(row[0])


def test_what_ends_a_text_waits_for_min_tokens():
    """Whatever its bias; the others keep their logits."""
    values = logits()
    fields = parameters(min_tokens=2, logit_bias={7: 100})
    for count in range(4):
        one = row(fields, [3] * count, [1], [7, 9])
        early = count < 2
        assert (adjusted(values, one)[[7, 9]] == -torch.inf).tolist() == [early, early]
        others = torch.where(values == values[7], -9, values)
        assert choose(values.unsqueeze(0), [one]) == [int(others.argmax()) if early else 7]


def test_the_models_logits_are_not_changed():
    """They are what log-probabilities are told of."""
    values = torch.stack([logits(), logits()])
    choose(values, [row(parameters(logit_bias={1: 9}, temperature=1, top_p=0.5), [1], [2]), row(parameters())])
    assert torch.equal(values, torch.stack([logits(), logits()]))
