"""Words that several messages share."""


def flag_of(name: str) -> str:
    """Spell a setting as the flag that sets it.

    Example:
        >>> flag_of("moe_top_k")
        '--moe-top-k'
    """
    return "--" + name.replace("_", "-")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without its full stop, or what the error is.

    Example:
        >>> first_line(ValueError("no.\\nNever.")), first_line(MemoryError())
        ('no', 'MemoryError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
