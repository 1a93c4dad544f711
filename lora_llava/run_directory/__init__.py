"""The directory of a run: locked, claimed, written, opened again, and never robbed of what the kit did not write."""
