"""How far a model is from a reference, on tokens: the table of llama.cpp as functions of additive sums.

For each token, with p the probabilities of the reference, q those of the model, t the true token:

    KLD      = sum_v p_v (log p_v - log q_v)           in nats, never below 0
    nll      = -log q_t,    nll_ref = -log p_t         only of tokens with a target
    delta-p  = q_t - p_t
    top      = the entry with the largest logit, the first of equals

| figure | formula over n tokens |
| --- | --- |
| mean of x, and its error | m = sum x / n,  sqrt((sum x^2 / n - m^2) / (n - 1)) |
| perplexity ratio, and its error | r = exp(mean(nll - nll_ref)),  r * error of that mean |
| RMS of delta-p, and its error | s = sqrt(mean of squares),  error of that mean / (2 s) |
| same top, and its error | a = share of equal tops,  sqrt(a (1 - a) / (n - 1)) |
| flips | share of tokens where one of both has the true token on top and the other has not |

The error of the ratio is that of llama.cpp, which takes it from var(nll) + var(nll_ref) - 2 cov: the variance
of the difference, summed here as such and so without its cancellation. An error is one standard error if
tokens were independent, which they are not quite; of a single token it is NaN. llama.cpp rounds the reference
to 16 bit and leaves out entries with log p <= -16, so its KLD may fall below 0; here nothing is rounded. Its
percentiles are exact, these within 0.1 % (see `histogram`).

Sources: llama.cpp, tools/perplexity (KL divergence mode); arXiv 2407.09141 (flips).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.histogram import BINS, histogram, quantile
from daq_lightning.numerics.logits import by_token


class DivergenceStats(NamedTuple):
    """Sums over tokens; those of two sets of tokens add, and of `kld_max` the larger stays.

    Counts are int64, sums float64, all of shape () but `kld_bins`.
    """

    n: Tensor
    """Tokens."""
    n_target: Tensor
    """Tokens with a target; the sums from `flipped_right` on, and those of nll and delta-p, are over them."""
    same_top: Tensor
    """Tokens whose top is that of the reference."""
    flipped_right: Tensor
    """Tokens whose true token is on top of the model and not of the reference."""
    flipped_wrong: Tensor
    """Tokens whose true token is on top of the reference and not of the model."""
    kld_bins: Tensor
    """Histogram of the KLD, (H,)."""
    kld: Tensor
    kld_sq: Tensor
    kld_max: Tensor
    nll: Tensor
    nll_delta: Tensor
    """Sum of nll - nll_ref."""
    nll_delta_sq: Tensor
    delta_p: Tensor
    delta_p_sq: Tensor
    delta_p_4: Tensor
    """Sum of delta-p to the fourth."""

    @classmethod
    def zero(cls, device: torch.device) -> DivergenceStats:
        """The sums over no token."""
        shapes = [()] * 5 + [(BINS,)] + [()] * 9
        dtypes = [torch.int64] * 6 + [torch.float64] * 9
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return cls._make(zeros)


class KLDivergence(NamedTuple):
    """Divergence from the reference, in nats a token: KL(reference || model)."""

    kld_mean: Tensor
    kld_mean_error: Tensor
    kld_median: Tensor
    kld_p99: Tensor
    kld_p999: Tensor
    kld_max: Tensor


class Perplexities(NamedTuple):
    """exp of the mean nll of the true tokens; above 1, the ratio says that the model predicts them worse."""

    perplexity: Tensor
    reference_perplexity: Tensor
    perplexity_ratio: Tensor
    perplexity_ratio_error: Tensor


class DeltaP(NamedTuple):
    """Change in the probability of the true token, in [-1, 1]: its mean says bias, its RMS says noise."""

    delta_p_mean: Tensor
    delta_p_mean_error: Tensor
    delta_p_rms: Tensor
    delta_p_rms_error: Tensor


class TopAgreement(NamedTuple):
    """Share of tokens whose top is that of the reference, in [0, 1] ("same top p")."""

    same_top: Tensor
    same_top_error: Tensor


class Flips(NamedTuple):
    """Shares of tokens that became right or wrong, in [0, 1], and their sum."""

    flips: Tensor
    flipped_right: Tensor
    flipped_wrong: Tensor


def compare_logits(
    logits: Tensor, reference_logits: Tensor, target: Tensor | None = None, mask: Tensor | None = None
) -> DivergenceStats:
    """Sums over the tokens of a batch.

    Args:
        logits: Of the model, (..., V): logits or log-probabilities of any floating dtype, taken in float64.
        reference_logits: Of the reference at the same places.
        target: The true token at each place, (...), -100 where a token does not count at all; None if only
            KLD and same top are wanted.
        mask: (...), not 0 where a token counts; None for everywhere.

    Returns:
        `DivergenceStats` on the device of the logits.

    Raises:
        ValueError: Shapes do not fit, a target is no entry of the vocabulary, or a logit is NaN or infinite.

    Example:
        >>> reference, model = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> stats = compare_logits(model, reference, target=torch.tensor([0, 0]))
        >>> round(float(kl_divergence_to_reference(stats).kld_mean), 4)
        0.2646
    """
    models = {"logits": logits, "reference_logits": reference_logits}
    kld, same_top, *true = by_token(_two_models, models, target, mask)
    nll, nll_ref, right, right_ref = true or [kld[:0]] * 4
    delta_p, nll_delta = (-nll).exp() - (-nll_ref).exp(), nll - nll_ref
    n, n_target = (torch.full((), len(tokens), dtype=torch.int64, device=kld.device) for tokens in (kld, nll))
    return DivergenceStats(
        n=n,
        n_target=n_target,
        same_top=same_top.sum().long(),
        flipped_right=(right > right_ref).sum(),
        flipped_wrong=(right < right_ref).sum(),
        kld_bins=histogram(kld),
        kld=kld.sum(),
        kld_sq=kld.square().sum(),
        kld_max=torch.cat([kld, kld.new_zeros(1)]).max(),
        nll=nll.sum(),
        nll_delta=nll_delta.sum(),
        nll_delta_sq=nll_delta.square().sum(),
        delta_p=delta_p.sum(),
        delta_p_sq=delta_p.square().sum(),
        delta_p_4=delta_p.pow(4).sum(),
    )


def kl_divergence_to_reference(stats: DivergenceStats) -> KLDivergence:
    """Mean, error, quantiles (within 0.1 %) and maximum (exact) of the KLD, in nats a token."""
    mean, error = _mean_and_error(stats.kld, stats.kld_sq, stats.n)
    median, p99, p999 = (quantile(stats.kld_bins, at, stats.kld_max) for at in (0.5, 0.99, 0.999))
    return KLDivergence(mean, error, median, p99, p999, torch.where(stats.n > 0, stats.kld_max, torch.nan))


def perplexity_ratio(stats: DivergenceStats) -> Perplexities:
    """Perplexity of both models, their ratio and its error; NaN without targets."""
    mean, error = _mean_and_error(stats.nll_delta, stats.nll_delta_sq, stats.n_target)
    nll, ratio = stats.nll / stats.n_target, mean.exp()
    return Perplexities(nll.exp(), (nll - mean).exp(), ratio, ratio * error)


def true_token_delta_p(stats: DivergenceStats) -> DeltaP:
    """Mean and RMS of the change in the probability of the true token; NaN without targets."""
    mean, error = _mean_and_error(stats.delta_p, stats.delta_p_sq, stats.n_target)
    square, square_error = _mean_and_error(stats.delta_p_sq, stats.delta_p_4, stats.n_target)
    rms = square.sqrt()
    rms_error = torch.where(
        square == 0, square_error, square_error / (2 * rms)
    )  # two equal models: 0, not 0/0
    return DeltaP(mean, error, rms, rms_error)


def top_token_agreement(stats: DivergenceStats) -> TopAgreement:
    """Share of tokens with the same top, and its error."""
    share = stats.same_top.double() / stats.n
    return TopAgreement(share, (share * (1 - share) / (stats.n - 1)).sqrt())


def answer_flips(stats: DivergenceStats) -> Flips:
    """Shares of tokens that became right, or wrong, on top; NaN without targets."""
    right, wrong = (count.double() / stats.n_target for count in (stats.flipped_right, stats.flipped_wrong))
    return Flips(right + wrong, right, wrong)


def _two_models(models: list[Tensor], target_T: Tensor | None) -> list[Tensor]:
    log_q_TV, log_p_TV = (torch.log_softmax(logits, -1) for logits in models)
    top_q_T, top_p_T = (logits.argmax(-1) for logits in models)
    # rounding alone may put the divergence of two equal distributions a hair below 0
    kld_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp(min=0)
    columns = [kld_T, (top_q_T == top_p_T).double()]
    if target_T is not None:
        columns += [-log.gather(-1, target_T[:, None]).squeeze(-1) for log in (log_q_TV, log_p_TV)]
        columns += [(top_T == target_T).double() for top_T in (top_q_T, top_p_T)]
    return columns


def _mean_and_error(total: Tensor, total_sq: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / n
    return mean, ((total_sq / n - mean.square()).clamp(min=0) / (n - 1)).sqrt()
