"""Files, processes, memory and the console: nothing about merging."""
