"""Jobs that are not running: Megatron's checks of their arguments, and the memory of a rank."""
