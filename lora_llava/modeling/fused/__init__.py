"""Decoder layers that compute LoRA inside the frozen products, with hand-written gradients."""
