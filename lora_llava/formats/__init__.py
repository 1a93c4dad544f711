"""How weights are named and stored: by llava-hf, by the original LLaVA, by PEFT."""
