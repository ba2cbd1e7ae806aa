"""Several experts in one folder beside their base: written of a run, loaded and unpacked by task."""
