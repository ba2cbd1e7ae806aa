"""Files, processes, memory and the console, independent of merging."""
