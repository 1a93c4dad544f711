"""File formats of others: llava-hf, the original LLaVA, PEFT's adapters, transformers' processors."""
