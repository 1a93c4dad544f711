"""The forms in which data arrives: LLaVA JSON, tables, data sets of the `datasets` library."""
