"""The error that is meant for a person: what is wrong, where it was set, how to mend it."""


class UserError(ValueError):
    """A mistake in a config, a dataset, a checkpoint or the environment.

    The command line prints it without a traceback. ``what`` says what is wrong, ``where`` names the file, config key
    or record that set it, and ``fix`` says what to do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        if fix is not None:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))
