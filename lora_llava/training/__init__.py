"""Train: `run` takes a recipe through its stages, `train` one stage from data to artifact. Start with `train`."""
