"""What a run is told: settings, stages, the YAML file, and what is derived from them alone."""
