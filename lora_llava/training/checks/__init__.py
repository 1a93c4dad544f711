"""Checks before, during and after training: each stops the run or warns. `check.py` has their interface."""
