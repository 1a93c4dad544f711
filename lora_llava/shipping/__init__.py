"""Take a trained artifact elsewhere: merge, export, import, publish."""
