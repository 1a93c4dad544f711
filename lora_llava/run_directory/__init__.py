"""The directory of a run: lock, claim, files of the run, and resuming. Files that no run wrote are never touched."""
