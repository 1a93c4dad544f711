"""Images of records: opened, checked, preprocessed."""
