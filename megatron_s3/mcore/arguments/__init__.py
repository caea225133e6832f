"""The plugin's flags, their validation, and the combinations that are rejected with an error.

``flags`` adds the flags to Megatron's parser.  ``validation`` wraps Megatron's validation and calls
``checks``.  ``readers`` return settings from arguments or an optimizer configuration.  ``mask``
makes Megatron treat the optimizer as Adam.  ``names`` converts between flags, destinations and
dtypes.
"""
