"""Conversations as token ids and labels: chat templates, encoding, and end tokens."""
