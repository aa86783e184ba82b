"""Training: the step, the loop around it, masks for loops of one's own."""
