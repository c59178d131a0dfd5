"""Attention processors of diffusers made sparse: the class variant, the site it calls, and the clock of a run."""
