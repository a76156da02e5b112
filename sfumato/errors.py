"""The one error that is the user's to mend: what was asked, what was found, what to do."""


class UserError(ValueError):
    """A mistake in a config, a folder or a command. Shown as one message, without a traceback.

    Anything else that escapes is a defect of ours and keeps its traceback.
    """

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(f"asked: {asked}\nfound: {found}\n   do: {do}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        # Loader workers send their errors to the main process by pickle.
        return UserError, (self.asked, self.found, self.do)
