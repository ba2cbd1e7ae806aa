#!/bin/bash
# A fit on two nodes of eight GPUs that survives pre-emption and time limits:
#   sbatch configs/slurm.sh configs/adamerging.yaml runs/first
# Two minutes before the end Slurm sends SIGUSR1 to every process; the fit saves at its step's end and exits with
# 75, and the job is requeued and resumes from there. The run folder has to be on a file system that all nodes see.
#SBATCH --job-name=trainmerge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun trainmerge fit "$1" "$2" \
    --trainer.accelerator gpu --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.strategy ddp --model.sharded
code=$?
[ "$code" -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
