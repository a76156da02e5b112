"""How a command ends when it does not end well, and is not a defect of ours."""

CONTINUE = 75
"""The exit code that says "start the same command again": sysexits.h's EX_TEMPFAIL."""


class UserError(ValueError):
    """The user's to mend: what was asked, what was found, what to do. Shown without a traceback.

    A mistake in a config, a folder or a command. Anything else that escapes is a defect of ours and keeps its
    traceback, but for the two below.
    """

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(f"asked: {asked}\nfound: {found}\n   do: {do}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        # Loader workers send their errors to the main process by pickle.
        return UserError, (self.asked, self.found, self.do)


class Stopped(BaseException):
    """A run that was asked to end early and can go on: exit code 75.

    Raised by signals from any line before the loop, so no `except Exception` on the way may keep it.
    step: the applied step that is saved; None before the loop, where nothing was to be saved.
    """

    def __init__(self, why: str, step: int | None = None) -> None:
        self.why, self.step = why, step
        where = "before its first step" if step is None else f"at step {step}, which is saved"
        super().__init__(f"stopped {where}: {why}; the same command goes on (exit code {CONTINUE})")

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, int | None]]:
        return Stopped, (self.why, self.step)


class Lost(RuntimeError):
    """Another rank has died or hangs, which no rank can mend: shown without a traceback, exit code 1."""
