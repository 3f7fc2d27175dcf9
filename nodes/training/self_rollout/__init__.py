"""Training causal Wan on its own rollouts by distribution matching (Self-Forcing, arXiv 2506.08009)."""
