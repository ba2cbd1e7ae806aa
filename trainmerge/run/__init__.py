"""A run on disk: recipe, folder, configuration, trajectory and scores."""
