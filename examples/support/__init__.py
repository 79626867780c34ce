"""What the examples share: data, rows, recipes, models and one training loop."""
