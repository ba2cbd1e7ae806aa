"""What each expert changed, one parameter at a time."""
