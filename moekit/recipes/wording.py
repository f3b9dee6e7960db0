"""Words that several messages share."""

from pathlib import Path


def flag_of(name: str) -> str:
    """Spell a setting as the flag that sets it.

    Example:
        >>> flag_of("moe_top_k")
        '--moe-top-k'
    """
    return "--" + name.replace("_", "-")


def no_place(folder: Path, error: OSError) -> str:
    """Say that there is no place for a run's folder.

    Example:
        >>> no_place(Path("/a"), OSError(13, "Permission denied"))
        '--logs: /a cannot be made or cleared (Permission denied); expected a place that can be written to.'
    """
    return (
        f"--logs: {folder} cannot be made or cleared ({error.strerror or error}); expected a place that can be "
        "written to."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without its full stop, or what the error is.

    Example:
        >>> first_line(ValueError("no.\\nNever.")), first_line(MemoryError())
        ('no', 'MemoryError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
