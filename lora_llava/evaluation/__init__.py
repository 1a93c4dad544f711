"""Answers to held-out questions: generated, scored, shown."""
