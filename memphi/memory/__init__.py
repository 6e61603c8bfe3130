"""What memory costs and how it is shared out: arithmetic on integers, without tensors."""
