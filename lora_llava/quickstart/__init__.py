"""The quickstart: download a small model and data, train on a CPU, evaluate."""
