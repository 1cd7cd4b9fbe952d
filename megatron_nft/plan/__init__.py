"""What a recipe will need, worked out without a GPU."""
