"""The table of a model beside a reference is that of NumPy, scipy and llama.cpp, for any pieces and masks."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchmetrics
from scipy.special import log_softmax, rel_entr
from sklearn.metrics import accuracy_score

from daq_lightning.numerics import divergence
from daq_lightning.numerics import logits as module
from daq_lightning.numerics.divergence import (
    DivergenceStats,
    answer_flips,
    compare_logits,
    kl_divergence_to_reference,
    perplexity_ratio,
    top_token_agreement,
    true_token_delta_p,
)


def case(tokens=300, entries=37, noise=0.1, seed=0):
    """(logits, reference_logits, target): float32, the target often on top of the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.randn(tokens, entries, generator=generator)
    logits = reference + noise * torch.randn(tokens, entries, generator=generator)
    target = torch.where(
        torch.rand(tokens, generator=generator) < 0.5,
        reference.argmax(-1),
        torch.randint(entries, (tokens,), generator=generator),
    )
    return logits, reference, target


def figures(stats):
    tables = (
        kl_divergence_to_reference,
        perplexity_ratio,
        true_token_delta_p,
        top_token_agreement,
        answer_flips,
    )
    return {key: float(value) for table in tables for key, value in table(stats)._asdict().items()}


def llama_cpp(log_q, log_p, target):
    """The figures as llama.cpp computes them, in float64: sums of x, of x^2 and of products, then errors of
    means by error propagation, the covariance of both models' nll; entries with log p <= -16 left out."""
    n, at = len(target), np.arange(len(target))
    nll, nll_ref = -log_q[at, target], -log_p[at, target]
    kld = np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(-1)
    difference = np.exp(-nll) - np.exp(-nll_ref)
    same = (log_q.argmax(-1) == log_p.argmax(-1)).sum() / n

    def mean_and_error(x):
        mean = x.sum() / n
        return mean, math.sqrt(((x**2).sum() / n - mean**2) / (n - 1))

    (log_ppl, error), (log_ppl_ref, error_ref) = mean_and_error(nll), mean_and_error(nll_ref)
    covariance = ((nll * nll_ref).sum() / n - log_ppl * log_ppl_ref) / (n - 1)
    ratio = math.exp(log_ppl - log_ppl_ref)
    mean_square, square_error = mean_and_error(difference**2)
    right, right_ref = log_q.argmax(-1) == target, log_p.argmax(-1) == target
    return {
        "kld_mean": mean_and_error(kld)[0],
        "kld_mean_error": mean_and_error(kld)[1],
        "kld_median": np.quantile(kld, 0.5),
        "kld_p99": np.quantile(kld, 0.99),
        "kld_p999": np.quantile(kld, 0.999),
        "kld_max": kld.max(),
        "perplexity": math.exp(log_ppl),
        "reference_perplexity": math.exp(log_ppl_ref),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * math.sqrt(error**2 + error_ref**2 - 2 * covariance),
        "delta_p_mean": mean_and_error(difference)[0],
        "delta_p_mean_error": mean_and_error(difference)[1],
        "delta_p_rms": math.sqrt(mean_square),
        "delta_p_rms_error": square_error / (2 * math.sqrt(mean_square)),
        "same_top": same,
        "same_top_error": math.sqrt(same * (1 - same) / (n - 1)),
        "flips": (right != right_ref).mean(),
        "flipped_right": (right & ~right_ref).mean(),
        "flipped_wrong": (~right & right_ref).mean(),
    }


def in_numpy(logits):
    return log_softmax(logits.double().numpy(), -1)


def assert_equal(found, expected):
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def assert_same_table(found, expected, rel=1e-9, width=1 / 1024):
    assert list(found) == list(expected)
    for key, value in expected.items():
        binned = key in ("kld_median", "kld_p99", "kld_p999")
        assert found[key] == pytest.approx(value, rel=width if binned else rel), key


@pytest.mark.parametrize("noise", [1e-3, 0.1, 2.0])
def test_the_table_is_that_of_llama_cpp(noise):
    logits, reference, target = case(noise=noise)
    expected = llama_cpp(in_numpy(logits), in_numpy(reference), target.numpy())
    assert_same_table(figures(compare_logits(logits, reference, target)), expected, rel=1e-7)


def test_the_table_on_values_that_llama_cpp_stored():
    # its file holds log p in 16 bit over a range of at most 16 below the largest: a step of 2.4e-4
    logits, reference, target = case(tokens=3000, noise=0.5)
    log_p = in_numpy(reference)
    low = np.maximum(log_p.min(-1), log_p.max(-1) - 16)[:, None]
    step = (log_p.max(-1)[:, None] - low) / 65535
    stored = step * np.round((np.maximum(log_p, low) - low) / step) + low
    expected = llama_cpp(in_numpy(logits), stored, target.numpy())
    found = figures(compare_logits(logits, torch.from_numpy(stored), target))
    assert 0 < abs(found["kld_mean"] - expected["kld_mean"]) < 1e-4
    assert_same_table(found, expected, rel=2e-3, width=5e-3)


@pytest.mark.parametrize(
    ("same_top", "error", "tokens"),
    [  # tools/perplexity/README.md: LLaMA 2 (655 chunks of 255 scored tokens) and LLaMA 3 (564)
        (0.85584, 0.00086, 655 * 255),
        (0.94665, 0.00055, 655 * 255),
        (0.98846, 0.00026, 655 * 255),
        (0.71138, 0.00119, 564 * 255),
        (0.91901, 0.00072, 564 * 255),
        (0.97674, 0.00040, 564 * 255),
    ],
)
def test_the_error_of_same_top_is_the_published_one(same_top, error, tokens):
    zero = DivergenceStats.zero(torch.device("cpu"))
    stats = zero._replace(n=torch.tensor(tokens), same_top=torch.tensor(round(same_top * tokens)))
    assert round(float(top_token_agreement(stats).same_top_error), 5) == error


def test_the_divergence_is_that_of_scipy_and_torchmetrics():
    logits, reference, _ = case()
    found = float(kl_divergence_to_reference(compare_logits(logits, reference)).kld_mean)
    p, q = np.exp(in_numpy(reference)), np.exp(in_numpy(logits))
    assert found == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-12)
    theirs = torchmetrics.KLDivergence(log_prob=True)
    theirs.update(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_flips_are_what_an_accuracy_cancels():
    logits, reference, target = case(noise=1.0)
    table = answer_flips(compare_logits(logits, reference, target))
    gained = accuracy_score(target, logits.argmax(-1)) - accuracy_score(target, reference.argmax(-1))
    assert float(table.flipped_right - table.flipped_wrong) == pytest.approx(gained, abs=1e-12)
    assert float(table.flips) > abs(gained) > 0


def test_equal_models_have_a_table_of_zeros_and_ones():
    _, reference, target = case()
    found = figures(compare_logits(reference, reference + 3.0, target))  # a softmax does not see the 3
    ones = {"perplexity_ratio", "same_top"}
    for key in found.keys() - {"perplexity", "reference_perplexity"}:
        assert found[key] == pytest.approx(float(key in ones), abs=1e-6), key
    assert found["kld_max"] < 1e-12
    same = figures(compare_logits(reference, reference, target))
    assert {same[key] for key in ("kld_max", "kld_p999", "delta_p_rms", "delta_p_rms_error")} == {0.0}


def test_tiny_divergences_are_not_lost_in_rounding():
    # float32 would give 1e-7 of noise, with either sign
    reference = case()[1].double()
    shift = torch.zeros_like(reference)
    shift[:, 0] = 1e-5
    p = torch.softmax(reference, -1)[:, 0]
    expected = (p * (1 - p) * 1e-10 / 2).mean()
    table = kl_divergence_to_reference(compare_logits(reference + shift, reference))
    assert float(table.kld_mean) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_looked_at_in_float64(dtype):
    logits, reference, target = case()
    logits, reference = logits.to(dtype), reference.to(dtype)
    expected = llama_cpp(in_numpy(logits), in_numpy(reference), target.numpy())
    assert_same_table(figures(compare_logits(logits, reference, target)), expected, rel=1e-7)


def test_log_probabilities_give_the_same_as_logits():
    logits, reference, target = case()
    found = figures(compare_logits(torch.log_softmax(logits.double(), -1), reference.log_softmax(-1), target))
    assert_same_table(found, figures(compare_logits(logits, reference, target)), rel=1e-4)


# --- tokens ---


@pytest.mark.parametrize("shape", [(300,), (3, 100), (2, 3, 50)])
def test_any_leading_shape_is_a_list_of_tokens(shape):
    logits, reference, target = case()
    found = compare_logits(logits.view(*shape, -1), reference.view(*shape, -1), target.view(shape))
    expected = compare_logits(logits, reference, target)
    assert_equal(found, expected)


def test_a_single_token_needs_no_leading_dimension():
    logits, reference, target = case()
    found = compare_logits(logits[0], reference[0], target[0], torch.tensor(True))
    assert_equal(found, compare_logits(logits[:1], reference[:1], target[:1]))
    assert int(compare_logits(logits[0], reference[0], mask=torch.tensor(False)).n) == 0


def test_masked_and_ignored_tokens_count_nowhere_whatever_they_hold():
    logits, reference, target = case()
    mask = torch.ones(300, dtype=torch.int64)  # an attention mask of transformers
    mask[::3] = 0
    target[1::3] = -100
    logits[::3], reference[1::3] = torch.nan, torch.inf
    found = compare_logits(
        logits.view(3, 100, -1), reference.view(3, 100, -1), target.view(3, 100), mask.view(3, 100)
    )
    expected = compare_logits(logits[2::3], reference[2::3], target[2::3])
    assert int(found.n) == int(found.n_target) == 100
    assert_equal(found, expected)


def test_pieces_are_small_and_change_nothing(monkeypatch):
    logits, reference, target = case()
    whole = compare_logits(logits, reference, target)
    seen = []

    def spy(models, targets):
        seen.append(models[0].numel())
        return two_models(models, targets)

    two_models = divergence._two_models
    monkeypatch.setattr(module, "PIECE", 7 * 37 + 5)
    monkeypatch.setattr(divergence, "_two_models", spy)
    assert_equal(compare_logits(logits, reference, target), whole)
    assert max(seen) == 7 * 37
    assert sum(seen) == 300 * 37


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens():
    # in a process of its own: a peak never falls. All logits of a model in float64 would be 240 MiB here, and
    # a dozen such are made; a piece is 16 MiB
    code = """if True:
        import resource, torch
        from daq_lightning.numerics.retention import compare_update
        logits = torch.zeros(240, 2**17, dtype=torch.bfloat16)
        logits[:, ::7] = 1
        base = torch.flip(logits, (1,))
        compare_update(logits[:1], logits[:1], base[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        compare_update(logits[:, 1:], logits[:, 1:], base[:, 1:])
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(run.stdout) < 400


def test_the_first_of_equals_is_the_top():
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    reference = torch.tensor([[1.0, 0.0, 0.0]])
    assert int(compare_logits(logits, reference).same_top) == 1
    assert int(compare_logits(logits.flip(-1), reference).same_top) == 0


def test_no_token_gives_nan_and_no_target_only_a_divergence():
    logits, reference, _ = case()
    assert all(map(math.isnan, figures(compare_logits(logits[:0], reference[:0])).values()))
    found = figures(compare_logits(logits, reference))
    known = {key for key, value in found.items() if not math.isnan(value)}
    assert known == {key for key in found if key.startswith(("kld", "same_top"))}


# --- errors ---


@pytest.mark.parametrize("which", ["logits", "reference_logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_how_many_and_where(which, value):
    logits, reference, _ = case(tokens=12)
    broken = {"logits": logits.clone().view(3, 4, -1), "reference_logits": reference.clone().view(3, 4, -1)}
    broken[which][1, 2, 5:7] = value
    broken[which][2, 0, 0] = value
    with pytest.raises(
        ValueError,
        match=rf"^{which} has 3 NaN or infinite values in 2 of 12 tokens, the first at index \(1, 2\)",
    ):
        compare_logits(**broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5, 36)}, r"one shape .* got logits \(5, 36\), reference_logits \(5, 37\)"),
        ({"logits": torch.zeros(5, 0), "reference_logits": torch.zeros(5, 0)}, "V > 0"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target of shape \(5,\).* got \(4,\).*not shifted"),
        ({"mask": torch.ones(1, 5)}, r"mask of shape \(5,\).* got \(1, 5\)"),
        (
            {"target": torch.tensor([0, 36, 37, -1, -100])},
            "from 0 to 36, or -100 .* got 37 and others, 2 in all",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_came(change, message):
    logits, reference, target = case(tokens=5)
    with pytest.raises(ValueError, match=message):
        compare_logits(**({"logits": logits, "reference_logits": reference, "target": target} | change))
