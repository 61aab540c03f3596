"""Two folders of weights in, one FP8 folder out: no Trainer, no data.

python recipes/two_folders.py fine-tuned/ base/ fp8/
"""

import sys

from daq_lightning import export_checkpoint

fine_tuned, base, out = sys.argv[1:]
report = export_checkpoint(fine_tuned, base, out, progress=True)
print(report.summary())
