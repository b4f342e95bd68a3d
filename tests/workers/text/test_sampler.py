"""Sampling: a pure function of the logits, the parameters and the index."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from perdure.workers.text.noise import gumbel, uniform
from perdure.workers.text.parameters import Parameters
from perdure.workers.text.sampler import adjust, choose, nucleus, score, strongest


def parameters(**fields: Any) -> Parameters:
    return Parameters.of({"prompt": "a", "seed": 1, **fields}, "request")


def logits(size: int = 50, seed: int = 0) -> NDArray[numpy.float32]:
    return numpy.random.default_rng(seed).normal(size=size).astype(numpy.float32)


def test_greedy_takes_the_lowest_of_equal_tokens():
    """Ties have one answer."""
    assert choose(numpy.array([0, 3, 1, 3], dtype=numpy.float32), parameters(), 0) == 1


def test_noise_depends_on_seed_position_and_token_only():
    """Not on which tokens it is asked for together with."""
    everything = uniform(7, 3, numpy.arange(1000))
    assert numpy.array_equal(uniform(7, 3, numpy.arange(500, 510)), everything[500:510])
    for other in (uniform(8, 3, numpy.arange(1000)), uniform(7, 4, numpy.arange(1000))):
        assert not (other == everything).any()
    assert everything.min() > 0
    assert everything.max() < 1


def test_noise_is_the_same_for_ever():
    """A change here would change every seeded answer of every user."""
    words = uniform(42, 0, numpy.array([0, 1, 49151])) * 2**52
    assert [int(word) for word in words] == [1704597898904423, 2929977715766208, 244310753259266]


def test_noise_is_even():
    """Mean and variance of the uniform distribution, and of Gumbel's."""
    values = uniform(1, 2, numpy.arange(200_000))
    assert abs(values.mean() - 0.5) < 0.003
    assert abs(values.var() - 1 / 12) < 0.001
    assert abs(gumbel(1, 2, numpy.arange(200_000)).mean() - 0.5772) < 0.01


def test_draws_follow_the_softmax():
    """Over many positions, each token is drawn as often as its probability says."""
    row = numpy.array([0.0, 1.0, 2.0, -1.0], dtype=numpy.float32)
    draws = [choose(row, parameters(temperature=0.7), index) for index in range(4000)]
    expected = numpy.exp(row / 0.7) / numpy.exp(row / 0.7).sum()
    assert numpy.abs(numpy.bincount(draws, minlength=4) / 4000 - expected).max() < 0.03


def test_top_k_leaves_the_strongest():
    """And of equal ones the first."""
    assert list(strongest(numpy.array([1.0, 5, 3, 5, 3, 3]), 3)) == [1, 2, 3]
    assert list(strongest(numpy.array([1.0, 2]), 5)) == [0, 1]
    row = logits()
    best = set(numpy.argsort(-row)[:5])
    draws = {choose(row, parameters(temperature=5, top_k=5), index) for index in range(300)}
    assert draws == best


def test_top_p_leaves_the_smallest_set_that_holds_it():
    """The token that crosses the line belongs to it."""
    values = numpy.log(numpy.array([0.1, 0.5, 0.15, 0.25]))
    assert list(nucleus(values, 0.5)) == [1]
    assert list(nucleus(values, 0.51)) == [1, 3]
    assert list(nucleus(values, 0.76)) == [1, 2, 3]
    assert list(nucleus(values, 1 - 1e-16)) == [0, 1, 2, 3]


def test_top_p_over_a_flat_vocabulary_sorts_all_of_it():
    """More tokens than the quick way looks at; of equal ones the first."""
    assert list(nucleus(numpy.zeros(5000), 0.5)) == list(range(2500))


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    """Without overflow."""
    row = logits()
    assert choose(row, parameters(temperature=temperature), 0) == int(row.argmax())


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf])
def test_logits_that_are_no_numbers_fail(bad):
    """They are never a token."""
    row = logits()
    row[7] = bad
    for temperature in (0, 1):
        with pytest.raises(ArithmeticError, match="output 4"):
            choose(row, parameters(temperature=temperature), 4)


def penalised(row: NDArray[Any], fields: dict[str, Any], prompt: list[int], output: list[int]) -> list[float]:
    """The formulas, token by token, in plain numbers."""
    result = []
    for token, logit in enumerate(row.tolist()):
        value = logit + fields.get("logit_bias", {}).get(token, 0)
        if token in prompt or token in output:
            penalty = fields.get("repetition_penalty", 1)
            value = value / penalty if value > 0 else value * penalty
        times = sum(1 for one in output if one == token)
        value -= fields.get("frequency_penalty", 0) * times
        if times > 0:
            value -= fields.get("presence_penalty", 0)
        result.append(value)
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
        row = logits(seed=case)
        prompt = chance.integers(0, 50, size=case).tolist()
        output = chance.integers(0, 50, size=3 * case % 31).tolist()
        found = adjust(row, parameters(**fields), numpy.array(prompt, dtype=numpy.int64), output)
        assert found.dtype == numpy.float64
        assert found.tolist() == penalised(row, fields, prompt, output)


def test_without_bias_and_penalties_the_logits_stay_as_they_are():
    """The very array: what was asked before there were any is computed as before."""
    row = logits()
    assert adjust(row, parameters(temperature=1), numpy.array([1]), [2, 3]) is row


def test_the_prompt_is_no_output():
    """Frequency and presence count what was generated alone."""
    row = logits()
    fields = parameters(frequency_penalty=2, presence_penalty=2)
    assert numpy.array_equal(adjust(row, fields, numpy.array([1, 2, 2]), []), row)
    changed = adjust(row, fields, numpy.array([1, 2, 2]), [2, 4, 4])
    assert numpy.flatnonzero(changed != row).tolist() == [2, 4]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300, 1.7e308])
@pytest.mark.parametrize("temperature", [0, 1e-300, 1, 1e300])
def test_an_extreme_penalty_still_gives_a_token(penalty, temperature):
    """Beyond what numbers hold there is a largest one; never an error, never NaN."""
    row = logits() * numpy.float32(1e30)
    fields = parameters(repetition_penalty=penalty, temperature=temperature, top_p=0.9, top_k=20, frequency_penalty=2)
    for output in ([], [1], list(range(50))):
        values = adjust(row, fields, numpy.array([5, 6]), output)
        assert numpy.isfinite(values).all()
        assert 0 <= choose(values, fields, len(output)) < 50


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf])
def test_penalties_do_not_hide_logits_that_are_no_numbers(bad):
    """The failure is the same as without them."""
    row = logits()
    row[7] = bad
    with pytest.raises(ArithmeticError, match="output 2"):
        adjust(row, parameters(repetition_penalty=1.2), numpy.array([7]), [7, 8])


def test_logprobs_are_those_of_the_softmax():
    """Against a plain sum of exact additions; likeliest first, of equal ones the lowest id."""
    row = logits()
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
    row = logits()
    fields = parameters(min_tokens=2, logit_bias={7: 100})
    for count in range(4):
        values = adjust(row, fields, numpy.array([1]), [3] * count, {7, 9})
        early = count < 2
        assert (values[[7, 9]] == -numpy.inf).tolist() == [early, early]
        assert choose(values, fields, count) == (int(numpy.where(row == row[7], -9, row).argmax()) if early else 7)
    assert adjust(row, parameters(min_tokens=2), numpy.array([1]), [3] * 2, {7}) is row
