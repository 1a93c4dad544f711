"""Make a model answer: decoding, answers to records, chat."""
