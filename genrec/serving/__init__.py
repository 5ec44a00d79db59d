"""A Triton Inference Server on this machine, and the load that tests it."""
