"""A study: encoders that a YAML lists are trained, probed and compared; each cell is run once."""
