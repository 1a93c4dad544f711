"""Ask other software what it makes of what the kit ships: `make foreign`. Each script runs in its own environment."""
