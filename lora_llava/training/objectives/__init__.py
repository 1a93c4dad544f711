"""What a stage minimizes: the loss of each row, and what the losses of a step are averaged over."""
