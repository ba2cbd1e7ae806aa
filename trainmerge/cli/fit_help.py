"""What `trainmerge fit --help` prints: what people set, on one screen. `--help-all` has every key."""

FIT_HELP = """usage: trainmerge fit CONFIG RUN [options]

Learn the coefficients of CONFIG's merge in the folder RUN. The same command again goes on where it stopped.

  CONFIG                     a YAML file: recipe, model, data, trainer; see configs/
  RUN                        the run folder; made if it is not there
  --dry-run                  print the plan of memory and time, and stop
  --print-config             print every key with its value, and stop
  --resume auto|never|PATH   auto goes on with the folder's run; PATH begins from that checkpoint [auto]
  --save-every N             steps between snapshots [50]
  --memory 8GiB              cut the step until its plan fits into this memory (CPU only)
  --no-report                draw no report at the end
  --seed-everything N        the seed of the data order [0]

any key of the configuration can be set here, with its path:
  --trainer.max-steps N      optimizer steps; 0 merges with the coefficients that it starts with
  --trainer.accelerator cpu|gpu, --trainer.devices N, and what else Lightning's Trainer takes
  --model.objective Entropy|Alignment              --model.objective.agreement 5.0
  --model.optimizer torch.optim.Adam               --model.optimizer.lr 0.02
  --model.initial X|PRESET|FILE                    --model.constraint Box|Simplex|...
  --model.keep-better        keep the start where learning did not lower the loss
  --model.sharded            shard the model over the processes (FSDP2)
  --model.tasks-per-backward N   more tasks per backward take less time and more memory
  --data.batch-size N, --data.max-length N, --data.max-examples N
  --recipe.grouping.granularity task|block|tensor|chunk

examples:
  trainmerge fit configs/demo.yaml runs/demo --dry-run
  trainmerge fit configs/demo.yaml runs/demo
  trainmerge fit configs/demo.yaml runs/demo --trainer.max-steps 120
  trainmerge fit --config a.yaml --config b.yaml --run runs/both   (b.yaml's keys replace a.yaml's)

trainmerge fit --help-all lists every option with its type.
"""
