"""What a model kept of its training: tops counted one by one, strength and split as NumPy has them."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from daq_lightning.numerics.retention import RetentionStats, compare_update, update_retention


def case(strength=1.0, noise=0.1, update=0.5, tokens=400, entries=31, seed=0):
    """(logits, reference_logits, base_logits): base + strength * (reference - base) + noise."""
    generator = torch.Generator().manual_seed(seed)
    base = 2 * torch.randn(tokens, entries, generator=generator)
    reference = base + update * torch.randn(tokens, entries, generator=generator)
    rest = noise * torch.randn(tokens, entries, generator=generator)
    return base + strength * (reference - base) + rest, reference, base


def figures(*models, **arguments):
    found = update_retention(compare_update(*models, **arguments))
    return {key: float(value) for key, value in found._asdict().items()}


def oracle(logits, reference, base):
    """The definitions: tops token by token, and the projection as a weighted least squares problem."""
    log_q, log_p, log_b = (log_softmax(t.double().numpy(), -1) for t in (logits, reference, base))
    tops = list(zip(*(log.argmax(-1) for log in (log_q, log_p, log_b)), strict=True))
    changed = [(q, p, b) for q, p, b in tops if p != b]
    weights = np.sqrt(np.exp(log_p))

    def centered(values):
        return (weights * (values - (np.exp(log_p) * values).sum(-1, keepdims=True))).ravel()

    update, kept = centered(log_p - log_b), centered(log_q - log_b)
    gain = np.linalg.lstsq(update[:, None], kept)[0][0]  # kept = gain * update + rest, the rest orthogonal
    along, across = (np.sum(part**2) for part in ((gain - 1) * update, kept - gain * update))
    kld = rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1).mean()
    return {
        "top_changed": len(changed) / len(tops),
        "top_kept": sum(q == p for q, p, b in changed) / len(changed),
        "top_reverted": sum(q == b for q, p, b in changed) / len(changed),
        "top_elsewhere": sum(q not in (p, b) for q, p, b in changed) / len(changed),
        "top_disturbed": sum(q != p for q, p, b in tops if p == b) / (len(tops) - len(changed)),
        "update_gain": gain,
        "update_kept": max(0, 1 - abs(gain - 1)),
        "update_amplified": max(0, gain - 1),
        "kld_along": kld * along / (along + across),
        "kld_across": kld * across / (along + across),
        "kld_base": rel_entr(np.exp(log_p), np.exp(log_b)).sum(-1).mean(),
    }


@pytest.mark.parametrize("strength", [-0.3, 0.0, 0.4, 1.0, 1.9, 2.5])
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_the_figures_are_those_of_the_definition(strength, noise):
    models = case(strength, noise)
    found, expected = figures(*models), oracle(*models)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(
    ("strength", "kept", "amplified"), [(0.0, 0, 0), (0.4, 0.4, 0), (1, 1, 0), (1.9, 0.1, 0.9), (2.5, 0, 1.5)]
)
def test_amplified_is_not_kept(strength, kept, amplified):
    # logits on the line from base to reference
    found = figures(*case(strength, noise=0.0))
    assert found["update_gain"] == pytest.approx(strength, abs=1e-6)
    assert found["update_kept"] == pytest.approx(kept, abs=1e-6)
    assert found["update_amplified"] == pytest.approx(amplified, abs=1e-6)
    assert found["kld_across"] == pytest.approx(0, abs=1e-9)
    assert (found["kld_along"] > 1e-3) is (strength != 1)


def test_the_base_itself_has_reverted_everything():
    _, reference, base = case()
    found = figures(base, reference, base)
    assert (found["top_kept"], found["top_reverted"], found["top_elsewhere"]) == (0, 1, 0)
    assert found["update_gain"] == pytest.approx(0, abs=1e-12)
    assert found["kld_along"] == pytest.approx(found["kld_base"], rel=1e-12)
    found = figures(reference, reference, base)
    assert (found["top_kept"], found["top_disturbed"], found["update_gain"]) == (1, 0, 1)
    assert (found["kld_along"], found["kld_across"]) == (0, 0)


def test_noise_that_knows_nothing_of_the_update_is_across():
    models = case(strength=1.0, noise=0.3, tokens=4000)
    found = figures(*models)
    assert found["update_gain"] == pytest.approx(1, abs=0.05)
    assert found["kld_across"] > 100 * found["kld_along"]
    # a gain for each token instead would call a good part of this noise a change of strength
    log_q, log_p, log_b = (torch.log_softmax(model.double(), -1) for model in models)
    p, update, error = log_p.exp(), log_p - log_b, log_q - log_p
    update, error = (values - (p * values).sum(-1, keepdim=True) for values in (update, error))
    along = (p * update * error).sum(-1) ** 2 / (p * update**2).sum(-1)
    assert float(along.sum() / (p * error**2).sum()) > 0.1


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_both_parts_add_up_to_the_divergence_and_are_half_the_squares(noise):
    # the reason for the product: KL = <error, error> / 2 up to third order
    models = case(strength=1 + noise, noise=noise)
    stats, found = compare_update(*models), figures(*models)
    n = int(stats.n)
    assert found["kld_along"] + found["kld_across"] == pytest.approx(float(stats.kld) / n, rel=1e-12)
    assert float(stats.error_sq) / 2 == pytest.approx(float(stats.kld), rel=noise)
    along = (found["update_gain"] - 1) ** 2 * float(stats.update_sq)
    assert found["kld_along"] == pytest.approx(along / 2 / n, rel=noise)


def test_without_an_update_there_is_no_strength():
    logits, reference, _ = case()
    found = figures(reference, reference, reference)
    assert (found["update_gain"], found["kld_along"], found["kld_across"]) == (1, 0, 0)
    found = figures(logits, reference, reference)
    assert math.isnan(found["update_gain"])
    assert math.isnan(found["top_kept"])
    assert (found["kld_along"], found["top_changed"]) == (0, 0)
    assert found["kld_across"] > 0
    assert found["top_disturbed"] > 0


def test_no_token_gives_nan():
    empty = figures(*(tensor[:0] for tensor in case()))
    assert all(map(math.isnan, empty.values()))


def test_tokens_that_do_not_count_are_not_looked_at():
    models = case()
    target, mask = torch.zeros(400, dtype=torch.int64), torch.ones(400)
    target[::2], mask[1::4] = -100, 0
    for model in models:
        model[::2] = torch.nan
    found = compare_update(*models, target=target, mask=mask)
    expected = compare_update(*(model[3::4] for model in models))
    assert isinstance(found, RetentionStats)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="base_logits has 31 NaN"):
        compare_update(models[0][1:2], models[1][1:2], models[2][:1])


def test_sums_of_parts_add_up_to_those_of_the_whole():
    models = case()
    parts = [compare_update(*(model[rows] for model in models)) for rows in (slice(0, 9), slice(9, None))]
    for first, second, whole in zip(*parts, compare_update(*models), strict=True):
        assert float(first + second) == pytest.approx(float(whole), rel=1e-12)
