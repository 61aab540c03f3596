"""What quantization did to a model, as torchmetrics on streams of logits: beside a reference and a base.

    model      the quantized one
    reference  the trained model before quantization
    base       the model before training; only `UpdateRetention` looks at it

Logits are (..., V), of any floating dtype, or log-probabilities; targets (...) are the true tokens at the
same places, -100 where a token counts nowhere; nothing is shifted. The states are the additive sums of
`daq_lightning.numerics.divergence` and `.retention`, so a value is that of all tokens together, over batches
and ranks. Counts and the histogram are int64, hence the same for every split of the tokens; sums are float64,
which over 1e9 tokens keep ten digits even if tokens come one by one (the bound is 1e9 2^-53: seven).

Each class has a function of its name, without state:
`kl_divergence_to_reference(compare_logits(logits, reference_logits))`.

Sources: llama.cpp, tools/perplexity (KL divergence mode); arXiv 2407.09141 (flips); the retention is this
project's.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from daq_lightning.metrics import SumsMetric
from daq_lightning.numerics import divergence
from daq_lightning.numerics.divergence import DivergenceStats
from daq_lightning.numerics.retention import RetentionStats, compare_update, update_retention


def model_metrics(prefix: str | None = None, *, sync: bool = True, base: bool = False) -> MetricCollection:
    """All figures of a model, from two looks at the logits (one without a base).

    Args:
        prefix: Put before every key, for example "val/".
        sync: Whether `compute` adds up the sums of all ranks, which all ranks must then call.
        base: Whether the logits of the base are known: adds `UpdateRetention`.

    Returns:
        A `MetricCollection`; give `update` its arguments by name, and Lightning
        `log_dict(metrics.compute())`, for each class has several values.

    Example:
        >>> import torch
        >>> metrics = model_metrics(base=True)
        >>> base, reference = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> metrics.update(logits=base, reference_logits=reference, base_logits=base)
        >>> {key: round(float(value), 2) for key, value in metrics.compute().items()}["top_reverted"]
        1.0
    """
    kinds = [KLDivergenceToReference, PerplexityRatio, TrueTokenDeltaP, TopTokenAgreement, AnswerFlips]
    members: dict[str, Metric | MetricCollection] = {
        kind.__name__: kind(sync_on_compute=sync) for kind in kinds
    }
    groups = [list(members)]
    if base:
        members["UpdateRetention"] = UpdateRetention(sync_on_compute=sync)
        groups.append(["UpdateRetention"])
    return MetricCollection(members, prefix=prefix, compute_groups=groups)


class _ReferenceMetric(SumsMetric):
    """Figures of `DivergenceStats`; subclasses say which. Takes the keyword arguments of `Metric`."""

    sums = DivergenceStats

    @staticmethod
    @abstractmethod
    def _figures(stats: DivergenceStats) -> Any:
        """A NamedTuple of figures."""

    def update(
        self,
        logits: Tensor,
        reference_logits: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Adds the tokens of a batch.

        Args:
            logits: Of the model, (..., V): logits or log-probabilities.
            reference_logits: Of the reference at the same places.
            target: The true tokens, (...), -100 where a token counts nowhere. Without them there are only KLD
                and same top: perplexity, delta-p and flips need the truth.
            mask: (...), not 0 where a token counts; None for everywhere.

        Raises:
            ValueError: Shapes do not fit, a target is no entry of the vocabulary, or a logit is NaN or
                infinite.
        """
        self._add(divergence.compare_logits(logits, reference_logits, target, mask))

    def compute(self) -> dict[str, Tensor]:
        """The figures over everything seen: float64 scalars, NaN where there was no token."""
        return self._figures(self.stats)._asdict()


class KLDivergenceToReference(_ReferenceMetric):
    """Divergence of the model from its reference, in nats a token: the table of llama.cpp.

    Formula: ``KLD = sum_v p_v (log p_v - log q_v)`` of a token, p of the reference, q of the model. Keys:

    - ``kld_mean``, ``kld_mean_error``: mean m, and ``sqrt((mean(KLD^2) - m^2) / (n - 1))``;
    - ``kld_median``, ``kld_p99``, ``kld_p999``: quantiles, from a histogram of 28673 bins: within 0.1 % of
      the exact ones, below 1e-12 read as 0, the same for every split of the tokens;
    - ``kld_max``: exact.

    Example:
        >>> import torch
        >>> table = KLDivergenceToReference()(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        >>> round(float(table["kld_mean"]), 4)
        0.0671
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    _figures = staticmethod(divergence.kl_divergence_to_reference)


class PerplexityRatio(_ReferenceMetric):
    """How much worse the model predicts the true tokens: 1 is as well as the reference.

    Formula: ``perplexity_ratio = exp(m)`` with m the mean of ``log p_t - log q_t``, and its error
    ``ratio * sqrt((mean of squares - m^2) / (n - 1))``. Beside it ``perplexity`` and
    ``reference_perplexity``.

    Example:
        >>> import torch
        >>> reference, model = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> figures = PerplexityRatio()(model, reference, target=torch.tensor([0]))
        >>> round(float(figures["perplexity_ratio"]), 4)
        1.2048
    """

    higher_is_better = False
    _figures = staticmethod(divergence.perplexity_ratio)


class TrueTokenDeltaP(_ReferenceMetric):
    """Change in the probability of the true token, ``q_t - p_t`` in [-1, 1]: bias and noise.

    Formula: ``delta_p_mean`` is the mean, ``delta_p_rms`` the root of the mean square s^2; their errors are
    those of a mean, that of the RMS ``error(s^2) / (2 s)``.

    Example:
        >>> import torch
        >>> reference, model = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> figures = TrueTokenDeltaP()(model, reference, target=torch.tensor([0]))
        >>> round(float(figures["delta_p_mean"]), 4)
        -0.1497
    """

    higher_is_better = None
    _figures = staticmethod(divergence.true_token_delta_p)


class TopTokenAgreement(_ReferenceMetric):
    """Share of tokens whose top is that of the reference, in [0, 1]: "same top p" of llama.cpp.

    Formula: ``same_top = a = mean(argmax q == argmax p)``, the first of equals being the top;
    ``same_top_error = sqrt(a (1 - a) / (n - 1))``.

    Example:
        >>> import torch
        >>> reference, model = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> float(TopTokenAgreement()(model, reference)["same_top"])
        0.5
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _figures = staticmethod(divergence.top_token_agreement)


class AnswerFlips(_ReferenceMetric):
    """Share of tokens that became wrong or right, which a mere accuracy cancels.

    Formula: ``flipped_wrong`` are tokens with the true token on top of the reference and not of the model,
    ``flipped_right`` the other way round; ``flips`` is their sum (arXiv 2407.09141).

    Example:
        >>> import torch
        >>> reference, model = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> float(AnswerFlips()(model, reference, target=torch.tensor([0, 0]))["flipped_wrong"])
        0.5
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _figures = staticmethod(divergence.answer_flips)


class UpdateRetention(SumsMetric):
    """What the model kept of its training, base -> reference: a direction, where a divergence is only a
    volume.

    Of the tokens whose top differs between base and reference (``top_changed`` of all), the model has the top
    of the reference (``top_kept``), of the base (``top_reverted``), or another (``top_elsewhere``): three
    shares of sum 1. Of the others, ``top_disturbed`` has another top than both.

    With ``update = log p - log b`` and ``error = log q - log p``, less their means under p (b, p, q of base,
    reference and model), and sums over all tokens under p:

    - ``update_gain = 1 + <update, error> / <update, update>``: 1 in full, 0.4 mostly gone, 1.9 nearly
      doubled;
    - ``update_kept = max(0, 1 - |gain - 1|)`` and ``update_amplified = max(0, gain - 1)``: 1.9 x the update
      is 0.1 kept and 0.9 too much, never 190 % kept;
    - ``kld_along``, ``kld_across``: the mean KL(p || q), divided as ``(gain - 1)^2 <update, update>`` to the
      rest of ``<error, error>``. To second order <error, error> is twice the KL, and there the split is
      exact;
    - ``kld_base``: the mean KL(p || b), what there was to lose.

    Why so, and what a token counts: `daq_lightning.numerics.retention`.

    Example:
        >>> import torch
        >>> base, reference = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> figures = UpdateRetention()(base + 1.9 * (reference - base), reference, base)
        >>> [round(float(figures[key]), 2) for key in ("top_kept", "update_gain", "update_kept")]
        [1.0, 1.9, 0.1]
    """

    higher_is_better = None
    sums = RetentionStats

    def update(
        self,
        logits: Tensor,
        reference_logits: Tensor,
        base_logits: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Adds the tokens of a batch.

        Args:
            logits: Of the model, (..., V): logits or log-probabilities.
            reference_logits: Of the reference at the same places.
            base_logits: Of the base.
            target: (...), looked at only for -100, where a token counts nowhere.
            mask: (...), not 0 where a token counts; None for everywhere.

        Raises:
            ValueError: Shapes do not fit, a target is no entry of the vocabulary, or a logit is NaN or
                infinite.
        """
        self._add(compare_update(logits, reference_logits, base_logits, target, mask))

    def compute(self) -> dict[str, Tensor]:
        """The figures over everything seen: float64 scalars, NaN where there was no token."""
        return update_retention(self.stats)._asdict()
