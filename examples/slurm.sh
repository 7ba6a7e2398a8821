#!/bin/bash
# Train on several machines of a SLURM cluster: sbatch examples/slurm.sh
# Two minutes before its time is over the run saves and stops; the job is queued again until the run is finished.
#SBATCH --job-name=equiframe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

data=${DATA:-/data/photos} # where every machine sees it
out=${OUT:-runs/photos}    # on a file system that every machine sees
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
    -m equiframe train "$data" --backbone timm:resnet50 --batch-size 1024 --lr 0.4 --epochs 90 \
    --workers 8 --out "$out" --resume-or-start
status=$?

# metrics.json is the last file that a run writes; five tries are enough for a run that makes progress
if [[ ! -f $out/metrics.json && -f $out/checkpoints/last.pt && ${SLURM_RESTART_COUNT:-0} -lt 5 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
