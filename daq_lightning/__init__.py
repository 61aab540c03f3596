"""Delta-aware FP8 and 4-bit export for models fine-tuned with Lightning.

Quantization to FP8 rounds much of what fine-tuning changed away. This package searches each scale so that the
direction of the change survives (arXiv 2603.22324), and writes checkpoints that vLLM, SGLang and transformers
load.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daq_lightning.audit.chain import Chain as Chain
    from daq_lightning.checkpoint.reader import load_checkpoint as load_checkpoint
    from daq_lightning.checkpoint.tensor_file import CheckpointError as CheckpointError
    from daq_lightning.export.export import export_checkpoint as export_checkpoint
    from daq_lightning.metrics import DeltaCosineSimilarity as DeltaCosineSimilarity
    from daq_lightning.metrics import DeltaGain as DeltaGain
    from daq_lightning.metrics import DeltaMeanSquaredError as DeltaMeanSquaredError
    from daq_lightning.metrics import DeltaNoise as DeltaNoise
    from daq_lightning.metrics import DeltaNorm as DeltaNorm
    from daq_lightning.metrics import PreservationByMagnitude as PreservationByMagnitude
    from daq_lightning.metrics import SignPreservationRate as SignPreservationRate
    from daq_lightning.metrics import delta_metrics as delta_metrics
    from daq_lightning.numerics.divergence import answer_flips as answer_flips
    from daq_lightning.numerics.divergence import compare_logits as compare_logits
    from daq_lightning.numerics.divergence import kl_divergence_to_reference as kl_divergence_to_reference
    from daq_lightning.numerics.divergence import perplexity_ratio as perplexity_ratio
    from daq_lightning.numerics.divergence import top_token_agreement as top_token_agreement
    from daq_lightning.numerics.divergence import true_token_delta_p as true_token_delta_p
    from daq_lightning.numerics.formats import PerBlock as PerBlock
    from daq_lightning.numerics.formats import PerChannel as PerChannel
    from daq_lightning.numerics.formats import PerTensor as PerTensor
    from daq_lightning.numerics.quantize import absmax_scale as absmax_scale
    from daq_lightning.numerics.quantize import dequantize as dequantize
    from daq_lightning.numerics.quantize import quantize as quantize
    from daq_lightning.numerics.retention import compare_update as compare_update
    from daq_lightning.numerics.retention import update_retention as update_retention
    from daq_lightning.numerics.search.search import search_scale as search_scale
    from daq_lightning.numerics.search.settings import ScaleSearch as ScaleSearch
    from daq_lightning.numerics.search.stages import SearchResult as SearchResult
    from daq_lightning.report.figures import ExportReport as ExportReport
    from daq_lightning.report.model_figures import AnswerFlips as AnswerFlips
    from daq_lightning.report.model_figures import KLDivergenceToReference as KLDivergenceToReference
    from daq_lightning.report.model_figures import PerplexityRatio as PerplexityRatio
    from daq_lightning.report.model_figures import TopTokenAgreement as TopTokenAgreement
    from daq_lightning.report.model_figures import TrueTokenDeltaP as TrueTokenDeltaP
    from daq_lightning.report.model_figures import UpdateRetention as UpdateRetention
    from daq_lightning.report.model_figures import model_metrics as model_metrics
    from daq_lightning.training.callback import DeltaAwareQuantization as DeltaAwareQuantization
    from daq_lightning.training.export_model import export_model as export_model

__all__ = [
    "AnswerFlips",
    "Chain",
    "CheckpointError",
    "DeltaAwareQuantization",
    "DeltaCosineSimilarity",
    "DeltaGain",
    "DeltaMeanSquaredError",
    "DeltaNoise",
    "DeltaNorm",
    "ExportReport",
    "KLDivergenceToReference",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PerplexityRatio",
    "PreservationByMagnitude",
    "ScaleSearch",
    "SearchResult",
    "SignPreservationRate",
    "TopTokenAgreement",
    "TrueTokenDeltaP",
    "UpdateRetention",
    "absmax_scale",
    "answer_flips",
    "compare_logits",
    "compare_update",
    "delta_metrics",
    "dequantize",
    "export_checkpoint",
    "export_model",
    "kl_divergence_to_reference",
    "load_checkpoint",
    "model_metrics",
    "perplexity_ratio",
    "quantize",
    "search_scale",
    "top_token_agreement",
    "true_token_delta_p",
    "update_retention",
]
__version__ = "0.2.0"

# Each name is loaded when it is first used: torch takes seconds to import, torchmetrics and lightning take
# more (they import transformers and matplotlib where they are installed), and `daq-lightning --help` needs
# none of them.
_HOMES = {
    "Chain": "daq_lightning.audit.chain",
    "DeltaAwareQuantization": "daq_lightning.training.callback",
    "export_model": "daq_lightning.training.export_model",
    "load_checkpoint": "daq_lightning.checkpoint.reader",
    "CheckpointError": "daq_lightning.checkpoint.tensor_file",
    "export_checkpoint": "daq_lightning.export.export",
    "DeltaCosineSimilarity": "daq_lightning.metrics",
    "DeltaGain": "daq_lightning.metrics",
    "DeltaMeanSquaredError": "daq_lightning.metrics",
    "SignPreservationRate": "daq_lightning.metrics",
    "delta_metrics": "daq_lightning.metrics",
    "DeltaNoise": "daq_lightning.metrics",
    "DeltaNorm": "daq_lightning.metrics",
    "PreservationByMagnitude": "daq_lightning.metrics",
    "answer_flips": "daq_lightning.numerics.divergence",
    "compare_logits": "daq_lightning.numerics.divergence",
    "kl_divergence_to_reference": "daq_lightning.numerics.divergence",
    "perplexity_ratio": "daq_lightning.numerics.divergence",
    "top_token_agreement": "daq_lightning.numerics.divergence",
    "true_token_delta_p": "daq_lightning.numerics.divergence",
    "compare_update": "daq_lightning.numerics.retention",
    "update_retention": "daq_lightning.numerics.retention",
    "PerBlock": "daq_lightning.numerics.formats",
    "PerChannel": "daq_lightning.numerics.formats",
    "PerTensor": "daq_lightning.numerics.formats",
    "absmax_scale": "daq_lightning.numerics.quantize",
    "dequantize": "daq_lightning.numerics.quantize",
    "quantize": "daq_lightning.numerics.quantize",
    "ScaleSearch": "daq_lightning.numerics.search.settings",
    "SearchResult": "daq_lightning.numerics.search.stages",
    "search_scale": "daq_lightning.numerics.search.search",
    "ExportReport": "daq_lightning.report.figures",
    "AnswerFlips": "daq_lightning.report.model_figures",
    "KLDivergenceToReference": "daq_lightning.report.model_figures",
    "PerplexityRatio": "daq_lightning.report.model_figures",
    "TopTokenAgreement": "daq_lightning.report.model_figures",
    "TrueTokenDeltaP": "daq_lightning.report.model_figures",
    "UpdateRetention": "daq_lightning.report.model_figures",
    "model_metrics": "daq_lightning.report.model_figures",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'daq_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
