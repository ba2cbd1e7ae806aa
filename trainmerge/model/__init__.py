"""The merged model in memory, its sharding, and its teachers."""
