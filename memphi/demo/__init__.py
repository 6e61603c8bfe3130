"""The tiny demo model's world: its data, its scores and its checkpoint."""
