"""Files of checkpoints: their contents, their checksums, and which checkpoint is the newest.

Nothing here depends on Megatron or imports another folder of the package, except its errors.
"""
