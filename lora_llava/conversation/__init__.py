"""Turns of a conversation as token ids and labels; templates, and where an answer ends."""
