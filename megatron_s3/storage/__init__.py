"""Files of torch and of a run: what they hold, whether that was written, which is the newest.

Nothing here knows Megatron, or imports another room of the package.
"""
