"""Settings that were called otherwise: the old names go on working, and say so once."""

__all__ = ["RENAMED", "renamed"]

#: Names of Megatron's arguments: the old one, the new one.
RENAMED = {
    "s3_device": "plugin_device",
    "s3_log_grad_norm": "plugin_log_grad_norm",
    "s3_log_updates": "plugin_log_updates",
    "s3_metrics": "plugin_metrics",
    "s3_no_fused": "plugin_no_fused",
    "s3_no_verify_checkpoint": "plugin_no_verify_checkpoint",
}


def renamed(old: str, new: str) -> str:
    """Returns what is said of an old name."""
    return f"{old} is called {new} now, since it is not S3's alone; the old name goes on working"
