"""Decide what can be decided before a weight is read: memory, speed, attention; and check that the run can start."""
