"""What files are made of: encodings of text, sheets of workbooks."""
