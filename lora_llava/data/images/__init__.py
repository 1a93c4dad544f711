"""Open, check and preprocess the images of records."""
