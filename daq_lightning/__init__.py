"""Delta-aware FP8 export for models fine-tuned with Lightning.

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
    from daq_lightning.metrics import SignPreservationRate as SignPreservationRate
    from daq_lightning.metrics import delta_metrics as delta_metrics
    from daq_lightning.numerics.formats import PerBlock as PerBlock
    from daq_lightning.numerics.formats import PerChannel as PerChannel
    from daq_lightning.numerics.formats import PerTensor as PerTensor
    from daq_lightning.numerics.quantize import absmax_scale as absmax_scale
    from daq_lightning.numerics.quantize import dequantize as dequantize
    from daq_lightning.numerics.quantize import quantize as quantize
    from daq_lightning.numerics.search.search import search_scale as search_scale
    from daq_lightning.numerics.search.settings import ScaleSearch as ScaleSearch
    from daq_lightning.numerics.search.stages import SearchResult as SearchResult
    from daq_lightning.report.figures import ExportReport as ExportReport
    from daq_lightning.training.callback import DeltaAwareQuantization as DeltaAwareQuantization

__all__ = [
    "Chain",
    "CheckpointError",
    "DeltaAwareQuantization",
    "DeltaCosineSimilarity",
    "DeltaGain",
    "DeltaMeanSquaredError",
    "ExportReport",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "ScaleSearch",
    "SearchResult",
    "SignPreservationRate",
    "absmax_scale",
    "delta_metrics",
    "dequantize",
    "export_checkpoint",
    "load_checkpoint",
    "quantize",
    "search_scale",
]
__version__ = "0.1.0"

# Each name is loaded when it is first used: torch takes seconds to import, torchmetrics and lightning take
# more (they import transformers and matplotlib where they are installed), and `daq-lightning --help` needs
# none of them.
_HOMES = {
    "Chain": "daq_lightning.audit.chain",
    "DeltaAwareQuantization": "daq_lightning.training.callback",
    "load_checkpoint": "daq_lightning.checkpoint.reader",
    "CheckpointError": "daq_lightning.checkpoint.tensor_file",
    "export_checkpoint": "daq_lightning.export.export",
    "DeltaCosineSimilarity": "daq_lightning.metrics",
    "DeltaGain": "daq_lightning.metrics",
    "DeltaMeanSquaredError": "daq_lightning.metrics",
    "SignPreservationRate": "daq_lightning.metrics",
    "delta_metrics": "daq_lightning.metrics",
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
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'daq_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
