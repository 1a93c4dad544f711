"""The recipe: typed settings, the YAML file, and what follows from them alone (schedule, defaults, errors)."""
