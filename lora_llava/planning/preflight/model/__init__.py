"""What the files of a base say before anything is loaded."""
