"""Checkpoints: each is complete or absent, and resuming from one is exact or refused.

Write: the weights (`stage_artifact`) and the training state (`state`) go to a staging directory and are flushed to
disk; the manifest follows with the size and SHA-256 of every file (`files`); the directory gets its name in one rename;
then old checkpoints are removed, except the best and the last. `saver` decides when.
Resume: the newest checkpoint whose files match its manifest is taken (`resume`) and compared with the run
(`differences`).
"""
