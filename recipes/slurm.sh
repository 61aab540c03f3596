#!/bin/bash
# Several nodes under Slurm: fine-tune and export, or export two folders that exist.
#
#   sbatch recipes/slurm.sh train    /shared/base /shared/run
#   sbatch recipes/slurm.sh quantize /shared/fine-tuned /shared/base /shared/fp8
#
# All paths lie on a file system that all nodes share. The same line again goes on after a time limit: training
# from its last checkpoint, quantize from the files that are complete. Times: docs/large_models.md.
#SBATCH --job-name=daq
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

gpus=8 cpus=8  # of a node and of a GPU, as above; srun does not take cpus from there
export OMP_NUM_THREADS="$cpus"

case "${1:?train or quantize}" in
train)
    # one task a GPU: Lightning reads rank and world size from Slurm, and nodes and devices must say the same
    srun --cpus-per-task="$cpus" python recipes/fsdp2_sft.py --model "${2:?base}" --out "${3:?out}" \
        --nodes "$SLURM_NNODES" --devices "$gpus" --steps 1000
    ;;
quantize)
    # one task a node: torchrun starts a process for each GPU, and "cuda" is the GPU of the local rank.
    # At least as many files as GPUs: each file is written by one of them. --resume goes on from the files that
    # an earlier job completed, and does no harm if there was none.
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" --cpus-per-task="$((gpus * cpus))" \
        torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
        -m daq_lightning quantize "${2:?fine-tuned}" --base "${3:?base}" --out "${4:?out}" \
        --device cuda --max-shard-bytes 2000000000 --resume
    ;;
*)
    echo "expected train or quantize, got $1" >&2
    exit 2
    ;;
esac
