"""The text of `trainmerge fit --help`: the common options on one screen. `--help-all` has every key."""

FIT_HELP = """usage: trainmerge fit CONFIG RUN [options]

Learn the coefficients of CONFIG's merge in the folder RUN. The same command
resumes a stopped run.

  CONFIG                     a YAML file: recipe, model, data, trainer
  RUN                        the run folder; created if it does not exist
  --dry-run                  print the plan of memory and time, and stop
  --print-config             print every key with its value, and stop
  --resume auto|never|PATH   the folder's run, none, or a checkpoint's [auto]
  --save-every N             steps between snapshots [50]
  --memory 8GiB              split steps to fit into this memory (CPU only)
  --no-report                write no report at the end
  --seed-everything N        the seed of the data order [0]

any key of the configuration can be set here, with its path:
  --trainer.max-steps N      optimizer steps; 0 merges with the start
  --trainer.accelerator cpu|gpu, --trainer.devices N, and others of Lightning's
  --model.objective Entropy|Alignment        --model.objective.agreement 5.0
  --model.optimizer torch.optim.Adam         --model.optimizer.lr 0.02
  --model.initial X|PRESET|FILE              --model.constraint Box|Simplex|...
  --model.keep-better        keep the start if learning did not lower the loss
  --model.sharded            shard the model over the processes (FSDP2)
  --model.tasks-per-backward N   more take less time and more memory
  --data.batch-size N, --data.max-length N, --data.max-examples N
  --recipe.grouping.granularity task|block|tensor|chunk

examples:
  trainmerge fit configs/demo.yaml runs/demo --dry-run
  trainmerge fit configs/demo.yaml runs/demo
  trainmerge fit configs/demo.yaml runs/demo --trainer.max-steps 120
  trainmerge fit --config a.yaml --config b.yaml --run runs/both
      (b.yaml's keys replace a.yaml's)

trainmerge fit --help-all lists every option with its type.
"""
