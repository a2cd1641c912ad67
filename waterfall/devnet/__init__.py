"""A whole world on this machine: a local chain with everything deployed on it, and a real model."""
