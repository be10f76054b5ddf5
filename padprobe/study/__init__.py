"""What to train, what to probe, what to compare: a YAML's cells, each run once, and the results of all."""
