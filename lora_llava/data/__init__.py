"""From data files to tensors: records, images, the plan of rows, the rows themselves."""
