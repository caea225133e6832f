"""Jobs that are not running: what Megatron says of their arguments, and what a rank would hold."""
