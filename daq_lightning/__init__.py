"""Delta-aware FP8 export for models fine-tuned with Lightning.

Quantization to FP8 rounds much of what fine-tuning changed away. This package searches each scale so that the
direction of the change survives (arXiv 2603.22324), and writes checkpoints that vLLM, SGLang and transformers load.
"""

from daq_lightning.callback import DeltaAwareQuantization as DeltaAwareQuantization
from daq_lightning.checkpoint.reader import load_checkpoint as load_checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError as CheckpointError
from daq_lightning.export import export_checkpoint as export_checkpoint
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
from daq_lightning.numerics.search import ScaleSearch as ScaleSearch
from daq_lightning.numerics.search import SearchResult as SearchResult
from daq_lightning.numerics.search import search_scale as search_scale
from daq_lightning.report import ExportReport as ExportReport

__version__ = "0.1.0"
