"""Convert data sets whose records must be joined or computed to LLaVA's JSON Lines: `run.convert`."""
