"""The machine and its terminal: files, devices, processes, progress, text."""
