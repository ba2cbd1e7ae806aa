"""trainmerge: learned-coefficient model merging."""
