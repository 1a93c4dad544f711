"""The data doctor: opens all that a run would open, and says what is wrong with it and what to do."""
