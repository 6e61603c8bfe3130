"""Official checkpoint files to our modules and back; executes no code from them."""
