"""A model as a graph of steps, and what is proven of each: its constant and its rounding."""
