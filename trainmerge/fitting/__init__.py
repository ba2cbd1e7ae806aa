"""A fit: the module, its preparation, the trainer, snapshots and logs."""
