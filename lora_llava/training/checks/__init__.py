"""Checks around and during training; each stops or warns in plain words."""
