"""From what a person has to what the model eats, on the CPU; imports no torch."""
