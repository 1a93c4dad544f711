"""What the questions and answers of records say: tags, languages, boxes, choices, and how answers are distributed."""
