"""Times as people say them."""


def format_time(seconds: float) -> str:
    """In hours and minutes, or in seconds if there are few."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return " ".join(f"{number:,} {unit}" for number, unit in ((hours, "h"), (minutes, "min")) if number)
