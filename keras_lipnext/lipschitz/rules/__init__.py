"""One rule a layer class or operation: its constant, and the rounding of its evaluation."""
