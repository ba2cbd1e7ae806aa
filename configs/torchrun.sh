#!/bin/bash
# The same under torchrun, once on every node:
#   NODES=2 HEAD=first-node bash configs/torchrun.sh configs/adamerging.yaml runs/first
# (`--` is for torchrun, which would take options for its own.) A node of which a process dies starts again (--max-restarts) from the last snapshot.
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:29500" \
    -m -- trainmerge.cli fit "$1" "$2" \
    --trainer.accelerator gpu --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-8}" \
    --trainer.strategy ddp --model.sharded
