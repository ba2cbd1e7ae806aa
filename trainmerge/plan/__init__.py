"""What a step will hold and take, before it begins."""
