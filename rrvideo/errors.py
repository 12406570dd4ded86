"""What can go wrong in ways that a user can mend."""

__all__ = ["BudgetError", "Cancelled", "ModelError", "RRVideoError", "VideoError"]


class RRVideoError(Exception):
    """A known failure: `message` says what is wrong in one line, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class VideoError(RRVideoError):
    """The video cannot be used: it does not open, holds no picture, or the clip lies outside it."""


class ModelError(RRVideoError):
    """The checkpoint cannot be used: it is not there, not of a supported family, or lacks weights."""


class BudgetError(RRVideoError):
    """The frames asked for do not fit the model's context."""


class Cancelled(RRVideoError):  # noqa: N818 (nothing went wrong)
    """A watch or an answer was stopped because somebody asked for it."""
