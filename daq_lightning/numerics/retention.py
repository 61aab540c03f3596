"""What a quantized model kept of its training, on tokens: a direction, where a divergence is only a volume.

Three models look at the same tokens: base (before training), post (after it: the reference) and model (post,
quantized). For each token, with b, p, q their probabilities and <x, y> = sum_v p_v x_v y_v:

    update = log p - log b,    error = log q - log p       both less their mean under p
    gain   = 1 + sum <update, error> / sum <update, update>        sums over all tokens
    error  = (gain - 1) update  +  rest
             along                 across                  sum <update, rest> = 0

**Why this product.** It is the Fisher information of p, and the error is the very exponent that leads from p
to q, so KL(p || q) = <error, error> / 2 + third order. In this quadratic form the split is exact:

    sum <error, error> = (gain - 1)^2 sum <update, update> + sum <rest, rest>

The two parts are given as shares of the measured KL. `kld_along` is the cost of a wrong strength: if the gain
is below 1 the model went back towards the base, above 1 beyond post. A gain of 1.9 is no "190 % kept": `kept`
falls on both sides of 1, and `amplified` says on which. `kld_across` is all else that quantization did.

**Why one gain for all tokens.** Where two entries share nearly all probability any error lies along the
update, this way or that; a gain a token would call noise a change of strength. What only varies around the
one gain is across.

**Tops.** Of the tokens whose top (the entry with the largest logit, the first of equals) differs between base
and post, those where the model's top is that of post are kept, that of base reverted, any other elsewhere. Of
the tokens whose top training left alone, those where the model has another one are disturbed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.logits import by_token


class RetentionStats(NamedTuple):
    """Sums over tokens; those of two sets of tokens add. Counts are int64, sums float64, all of shape ()."""

    n: Tensor
    """Tokens."""
    n_changed: Tensor
    """Tokens whose top differs between base and post."""
    kept: Tensor
    reverted: Tensor
    disturbed: Tensor
    """Tokens with one top in base and post and another in the model."""
    update_sq: Tensor
    """Sum of <update, update>."""
    dot: Tensor
    """Sum of <update, error>."""
    error_sq: Tensor
    """Sum of <error, error>."""
    kld: Tensor
    """Sum of KL(post || model)."""
    kld_base: Tensor
    """Sum of KL(post || base)."""

    @classmethod
    def zero(cls, device: torch.device) -> RetentionStats:
        """The sums over no token."""
        dtypes = [torch.int64] * 5 + [torch.float64] * 5
        return cls._make(torch.zeros((), dtype=dtype, device=device) for dtype in dtypes)


class Retention(NamedTuple):
    """What was kept of an update. Shares in [0, 1], divergences in nats a token."""

    top_changed: Tensor
    """Share of all tokens whose top training changed."""
    top_kept: Tensor
    """Of these, the share with the top of post; with the next two it adds up to 1, all NaN if there is
    none."""
    top_reverted: Tensor
    top_elsewhere: Tensor
    top_disturbed: Tensor
    """Of the other tokens, the share whose top quantization changed."""
    update_gain: Tensor
    """Strength of the update: 1 in full, 0.4 mostly gone, 1.9 nearly doubled; without an update 1 if the
    model is post, else NaN."""
    update_kept: Tensor
    """max(0, 1 - |gain - 1|): the gain's distance from right, on either side; 0.1 for a gain of 1.9."""
    update_amplified: Tensor
    """max(0, gain - 1)."""
    kld_along: Tensor
    """Part of the mean KL(post || model) that is a wrong strength of the update."""
    kld_across: Tensor
    """The other part; both add up to the mean."""
    kld_base: Tensor
    """Mean KL(post || base): what there was to lose."""


def compare_update(
    logits: Tensor,
    reference_logits: Tensor,
    base_logits: Tensor,
    target: Tensor | None = None,
    mask: Tensor | None = None,
) -> RetentionStats:
    """Sums over the tokens of a batch.

    Args:
        logits: Of the quantized model, (..., V): logits or log-probabilities of any floating dtype, taken in
            float64.
        reference_logits: Of the trained model at the same places, before quantization.
        base_logits: Of the model before training.
        target: (...), looked at only for -100, where a token does not count.
        mask: (...), not 0 where a token counts; None for everywhere.

    Returns:
        `RetentionStats` on the device of the logits.

    Raises:
        ValueError: Shapes do not fit, a target is no entry of the vocabulary, or a logit is NaN or infinite.

    Example:
        >>> base, post = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> figures = update_retention(compare_update(base + 1.5 * (post - base), post, base))
        >>> [round(float(value), 4) for value in (figures.top_kept, figures.update_gain, figures.update_kept)]
        [1.0, 1.5, 0.5]
    """
    models = {"logits": logits, "reference_logits": reference_logits, "base_logits": base_logits}
    top, top_post, top_base, update_sq, dot, error_sq, kld, kld_base = by_token(
        _three_models, models, target, mask
    )
    changed = top_post != top_base
    return RetentionStats(
        n=torch.full((), len(top), dtype=torch.int64, device=top.device),
        n_changed=changed.sum(),
        kept=(changed & (top == top_post)).sum(),
        reverted=(changed & (top == top_base)).sum(),
        disturbed=(~changed & (top != top_post)).sum(),
        update_sq=update_sq.sum(),
        dot=dot.sum(),
        error_sq=error_sq.sum(),
        kld=kld.sum(),
        kld_base=kld_base.sum(),
    )


def update_retention(stats: RetentionStats) -> Retention:
    """Shares of tops, strength of the update, and the two parts of the divergence."""
    elsewhere = stats.n_changed - stats.kept - stats.reverted
    kept, reverted, elsewhere = (
        count.double() / stats.n_changed for count in (stats.kept, stats.reverted, elsewhere)
    )
    no_update = torch.where((stats.n > 0) & (stats.error_sq == 0), 0.0, torch.nan).to(stats.dot.dtype)
    excess = torch.where(stats.update_sq > 0, stats.dot / stats.update_sq, no_update)  # gain - 1
    along_sq = torch.where(stats.update_sq > 0, stats.dot * excess, 0.0)
    share_along = torch.where(stats.error_sq > 0, along_sq / stats.error_sq, 0.0).clamp(max=1)
    kld = stats.kld / stats.n
    return Retention(
        top_changed=stats.n_changed.double() / stats.n,
        top_kept=kept,
        top_reverted=reverted,
        top_elsewhere=elsewhere,
        top_disturbed=stats.disturbed.double() / (stats.n - stats.n_changed),
        update_gain=1 + excess,
        update_kept=(1 - excess.abs()).clamp(min=0),
        update_amplified=excess.clamp(min=0),
        kld_along=share_along * kld,
        kld_across=(1 - share_along) * kld,
        kld_base=stats.kld_base / stats.n,
    )


def _three_models(models: list[Tensor], _: Tensor | None) -> list[Tensor]:
    tops = [logits.argmax(-1) for logits in models]
    log_q_TV, log_p_TV, log_b_TV = (torch.log_softmax(logits, -1) for logits in models)
    p_TV = log_p_TV.exp()

    def mean_under_p(values_TV: Tensor) -> Tensor:
        return (p_TV * values_TV).sum(-1)

    update_TV, error_TV = log_p_TV - log_b_TV, log_q_TV - log_p_TV
    kld_base_T, kld_T = mean_under_p(update_TV), -mean_under_p(error_TV)
    update_TV, error_TV = update_TV - kld_base_T[:, None], error_TV + kld_T[:, None]
    squares = [
        mean_under_p(update_TV.square()),
        mean_under_p(update_TV * error_TV),
        mean_under_p(error_TV.square()),
    ]
    return [*tops, *squares, kld_T.clamp(min=0), kld_base_T.clamp(min=0)]
