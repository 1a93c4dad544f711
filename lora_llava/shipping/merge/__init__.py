"""Adapter and base become one model, tensor by tensor, and the result is asked the same questions as the two."""
