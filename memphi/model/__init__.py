"""Plain nn.Modules of Phi-4-multimodal, without global state and trainable as they stand."""
